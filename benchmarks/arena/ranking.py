"Compare methods over tables: error relative to the best boosted model, ranks, and Elo with intervals"
import numpy as np, pandas as pd

ANCHOR,ANCHOR_ELO = 'rf',1000      # as TabArena anchors its list
STEPS,SAMPLES = 4000,300            # Of the ratings, and of the tables for the intervals
ENOUGH = .9                        # A method is ranked if it has so many of the tables


def errors_of(
    results:pd.DataFrame # From `results`
) -> pd.DataFrame: # A row for each table and a column for each method, means over the seeds
    "Arrange the errors; fits that failed are left out"
    done = results.dropna(subset=['error'])
    return done.groupby(['table','method'], sort=False).error.mean().unstack()


def relative(
    errors:pd.DataFrame, # From `errors_of`
    reference:list # Names of methods
) -> pd.DataFrame: # Percent; empty if there is no reference
    "Compare errors with the best of some methods in each table"
    best = errors[[m for m in reference if m in errors]].min(axis=1)
    return (errors.div(best, axis=0)-1)*100


def complete(errors:pd.DataFrame) -> pd.DataFrame:
    "Return the methods that have nearly all tables, and the tables that all of them have"
    return errors.dropna(axis=1, thresh=int(np.ceil(ENOUGH*len(errors)))).dropna()


def wins_of(
    errors:np.ndarray # (n_tables, n_methods)
) -> np.ndarray: # (n_tables, n_methods, n_methods), 1 where the first is better, .5 where both are equal
    "Compare each pair of methods in each table"
    a,b = errors[:,:,None],errors[:,None,:]
    return (a<b)+.5*(a==b)


def elo(
    wins:np.ndarray # Shares of wins, (..., n_methods, n_methods)
) -> np.ndarray: # (..., n_methods), mean 0
    "Find the ratings that expect the given wins, in steps of 8 points; their number keeps finite who always wins"
    n = wins.shape[-1]
    others = 1-np.eye(n)
    rating = np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        expected = 1/(1+10**((rating[...,None,:]-rating[...,:,None])/400))
        rating += 8*((wins-expected)*others).sum(-1)
    return rating


def _anchored(rating, names):
    at = list(names).index(ANCHOR) if ANCHOR in names else None
    return rating+ANCHOR_ELO-(rating[...,[at]] if at is not None else rating.mean(-1, keepdims=True))

def elo_table(
    errors:pd.DataFrame, # From `complete`
    seed:int=0 # Of the samples of tables, drawn with replacement
) -> pd.DataFrame: # Columns `elo`, `low`, `high`
    "Return Elo and the interval that 95 % of the samples are in; the random forest has 1000 by definition"
    wins = wins_of(errors.to_numpy())
    drawn = np.random.default_rng(seed).integers(len(wins), size=(SAMPLES, len(wins)))
    ratings = _anchored(elo(wins[drawn].mean(1)), errors.columns)
    low,high = np.percentile(ratings, [2.5,97.5], axis=0)
    return pd.DataFrame(dict(elo=_anchored(elo(wins.mean(0)), errors.columns), low=low, high=high), index=errors.columns)


def board_of(
    results:pd.DataFrame,
    reference:list, # Boosted models
    odd:list=() # Tables that one of the means leaves out
) -> pd.DataFrame: # A row for each method that is ranked, the best first
    "Summarise each method over the tables that all of them have"
    every = errors_of(results)
    errors = complete(every)
    rel,usual = relative(every, reference).loc[errors.index, errors.columns],~errors.index.isin(odd)
    cpu = results.dropna(subset=['error']).groupby(['table','method']).cpu_s.mean().unstack().reindex_like(errors)
    board = dict(error=rel.mean(), usual=rel[usual].mean(), median=rel.median(), worst=rel[usual].max(), wins=(rel<0).sum(),
                 rank=errors.rank(axis=1).mean(), cpu_s=cpu.mean())
    return pd.DataFrame(board).join(elo_table(errors)).sort_values('elo', ascending=False)
