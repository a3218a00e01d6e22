"Tables in markdown, and a figure of error against time"
import pandas as pd
from matplotlib.figure import Figure
from .methods import BOOSTED, METHODS
from .ranking import ANCHOR, board_of, complete, errors_of, relative
from .tables import TABLES

# Split by date: the test rows are later than all others, and some columns go on beyond their training range
ODD = ['hotel_rates']


def title(method): return METHODS[method].title if method in METHODS else method

def _table(header, rows):
    return '\n'.join([f'| {" | ".join(header)} |', '|---'*len(header)+'|', *(f'| {" | ".join(r)} |' for r in rows)])

def _percent(x): return '' if pd.isna(x) else f'{x:+.1f} %'

def _number(x, form): return '' if pd.isna(x) else format(x, form)


def board_text(board:pd.DataFrame) -> str: # Markdown
    "Write a row for each method, the best first"
    header = ['method','Elo','mean rank','error','worst table','CPU s']
    return _table(header, [[title(r.Index), f'{r.elo:.0f} ({r.low:.0f} to {r.high:.0f})', f'{r.rank:.1f}', _percent(r.usual),
                            _percent(r.worst), f'{r.cpu_s:.1f}'] for r in board.itertuples()])


def tables_text(results:pd.DataFrame) -> str: # Markdown
    "Write the errors of each table: of the boosted models as they are, then all relative to the best of these"
    errors = errors_of(results)
    rel = relative(errors, BOOSTED)
    errors,rel = [d.loc[[t for t in TABLES if t in d.index] or d.index] for d in (errors,rel)]
    names = [m for m in METHODS if m in errors]
    best = errors[[m for m in BOOSTED if m in errors]].min(axis=1)
    metric = results.groupby('table').task.first().map(dict(reg='RMSE', clf='log loss'))
    rows = [[t, metric[t], _number(best[t], '.4f'), *(_number(rel.loc[t,m], '+.1f') for m in names)] for t in errors.index]
    return _table(['table','metric','best boosted',*map(title, names)], rows)


def auc_text(results:pd.DataFrame) -> str: # Markdown, '' without tables of two classes
    "Write the area under the curve for each table of two classes, means over the seeds"
    auc = results.dropna(subset=['auc']).groupby(['table','method']).auc.mean().unstack()
    names = [m for m in METHODS if m in auc]
    return _table(['AUC',*map(title, names)], [[t, *(_number(auc.loc[t,m], '.4f') for m in names)] for t in auc.index]) if len(auc) else ''


def notes(
    results:pd.DataFrame,
    skipped:dict # Why tables and methods were left out
) -> list: # Sentences
    "Say what the numbers are"
    ranked = complete(errors_of(results))
    cpus = ', '.join(sorted(set(results.cpu.dropna()))) or 'unknown'
    seeds = results.dropna(subset=['error']).groupby(['table','method']).seed.nunique()
    failed = results[results.error.isna()]
    left = [t for t in errors_of(results).index if t not in ranked.index]
    anchor = 'a random forest has' if ANCHOR in ranked else 'the mean is'
    boosted = ', '.join(title(m) for m in BOOSTED if m in set(results.method))
    return [f'Error: RMSE or log loss of the test rows relative to the best of {boosted or "no boosted model"} in each table, mean over the tables'
            + (f' without {", ".join(ODD)}' if set(ODD) & set(ranked.index) else '') + '. Below 0 is better than the best of these.',
            f'Tables: {len(ranked)}; seeds: {_span(seeds)}. Elo: {anchor} 1000; in brackets what 95 % of samples of the tables give.',
            f'CPU: process time of one fit, encoding and predicting included, one thread; {cpus}.',
            *([f'Not compared, as a method lacks it: {", ".join(left)}.'] if left else []),
            *(f'Left out: {k}: {v}.' for k,v in skipped.items()),
            *(f'Failed: {r.method} on {r.table}, seed {r.seed}: {r.note}.' for r in failed.itertuples())]

def _span(n): return str(n.min()) if n.min()==n.max() else f'{n.min()} to {n.max()}'


def board(results:pd.DataFrame) -> pd.DataFrame:
    "Compare the methods with the best boosted model"
    return board_of(results, BOOSTED, ODD)


def report_text(board:pd.DataFrame, results:pd.DataFrame, skipped:dict=None) -> str: # Markdown
    "Write everything"
    parts = [board_text(board), tables_text(results), auc_text(results), '\n'.join(f'- {n}' for n in notes(results, skipped or {}))]
    return '\n\n'.join(p for p in parts if p)


def _label(method): return title(method).removeprefix('DropConnect').strip(', ') or 'DropConnect'     # of ours, the first word is said once

def plot_board(board:pd.DataFrame) -> Figure: # From `board_of`
    "Plot error against time: lower left is better"
    fig = Figure(figsize=(7.2, 4.6), dpi=110, layout='constrained')
    ax = fig.subplots()
    mine = [m for m in ('ours-quick','ours','ours-best') if m in board.index]
    cpu_s = board.cpu_s.clip(lower=.01)      # for the scale
    ax.plot(cpu_s[mine], board.usual[mine], color='C0', alpha=.4)
    for r in board.itertuples():
        color = 'C0' if r.Index in METHODS and METHODS[r.Index].ours else 'C1'
        ax.plot(cpu_s[r.Index], r.usual, 'o', color=color)
        below = color=='C0' and not r.Index.endswith('gbm')     # which lie close to those without
        place = dict(xytext=(0,-6), va='top') if below else dict(xytext=(0,5), va='bottom')
        ax.annotate(_label(r.Index), (cpu_s[r.Index],r.usual), ha='center', textcoords='offset points', color=color, fontsize=9, **place)
    ax.axhline(0, color='.6', lw=.8)
    ax.set(xscale='log', xlabel='CPU seconds of a fit, one thread (mean over the tables)', ylabel='error relative to the best\nof three boosted models, %')
    ax.margins(x=.15, y=.15)
    ax.xaxis.set_major_formatter(lambda x, pos: f'{x:g}')
    ax.grid(alpha=.3); ax.spines[['top','right']].set_visible(False)
    return fig
