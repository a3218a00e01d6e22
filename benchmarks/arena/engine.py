"""What each candidate of the search brings: `python -m benchmarks.arena.engine`, on other splits of the tables

The arena's test rows are for the end. Decisions are made here, on splits of the same sizes that are drawn anew."""
import csv, sys, warnings
from argparse import ArgumentParser
from pathlib import Path
import numpy as np, torch
from fastai_dropconnect import fit_best
from fastai_dropconnect.ensemble.blend import BlendedModel
from .ours import fitted
from .outsiders import outputs
from .results import cpu_name, scores
from .tables import TABLES, Options, Table, load_table

FIELDS = 'table seed what error change epochs seconds weight cpu'.split()
BY_TIME = 'hotel_rates','auctions'      # their rows cannot be split anew


def split_again(t:Table, seed:int) -> Table: # With parts of the same sizes, in each class
    "Draw other splits"
    rng,split = np.random.default_rng(seed),t.df.split.to_numpy().copy()
    strata = np.zeros(len(t.df)) if t.task=='reg' else t.df.target.to_numpy()
    for s in np.unique(strata):
        rows = np.flatnonzero(strata==s)
        split[rows] = split[rng.permutation(rows)]
    return Table(t.name, t.task, t.df.assign(split=split))


class _KeptSearch(fit_best.Search):
    "A search that can be looked at afterwards"
    last = None
    def run(self):
        _KeptSearch.last = self
        return super().run()


def searched(t:Table, seed:int, budget:str):
    "Fit the estimator; return it and the search with the candidates that it has tried"
    before,fit_best.Search = fit_best.Search,_KeptSearch
    try: return fitted(t, seed, budget=budget),_KeptSearch.last
    finally: fit_best.Search = before


def error_of(t, model, network): # Of the test rows
    learn = model.learner_
    before,learn.model = learn.model,network
    try: return scores(t, outputs(model, t, t.x('test')))['error']
    finally: learn.model = before


def rows_of(t:Table, seed:int, budget:str):
    "Yield the error of the blend, of each candidate alone, and of the blend without it"
    model,search = searched(t, seed, budget)
    whole = error_of(t, model, model.learner_.model)
    yield dict(what='blend', error=whole, change=0., seconds=sum(c.seconds for c in search.candidates))
    average,candidates = model.learner_.model.average,list(search.candidates)
    for c,weight in zip(candidates, model.leaderboard_.weight, strict=True):
        error = error_of(t, model, BlendedModel(c.models, average=average))
        yield dict(what=f'{c.name} alone', error=error, change=error/whole-1, epochs=c.epochs, seconds=c.seconds, weight=weight)
        search.candidates = [o for o in candidates if o is not c]
        if not search.candidates: continue
        error = error_of(t, model, fit_best._blend(search, average)[0])
        yield dict(what=f'without {c.name}', error=error, change=error/whole-1)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--tables', default=','.join(n for n in TABLES if n not in BY_TIME))
    parser.add_argument('--wheels', default=None, help='folder with wheels, as for the arena')
    parser.add_argument('--budget', default='default')
    parser.add_argument('--seed', type=int, default=17, help='of the splits and of the search')
    parser.add_argument('--out', default=str(Path(__file__).parent.parent/'results'/'engine.csv'))
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    out = Path(args.out)
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    for name in args.tables.split(','):
        if any(r['table']==name and r['seed']==str(args.seed) for r in rows): continue
        options = Options(wheels=Path(args.wheels)) if args.wheels else Options()
        table = split_again(load_table(name, options), args.seed)
        new = [dict.fromkeys(FIELDS) | dict(table=name, seed=args.seed, cpu=cpu_name()) | r for r in rows_of(table, args.seed, args.budget)]
        rows += [{k: f'{v:.5g}' if isinstance(v, float) else v for k,v in r.items()} for r in new]
        with out.open('w', newline='') as f:
            writer = csv.DictWriter(f, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        for r in new: print(f'{name:14} {r["what"]:22} {r["error"]:.4f} {100*r["change"]:+.1f} %', flush=True)
    for what in dict.fromkeys(r['what'] for r in rows):
        changes = [100*float(r['change']) for r in rows if r['what']==what]
        print(f'{what:37} {np.mean(changes):+.2f} % on {len(changes)} tables')


if __name__=='__main__': sys.exit(main())
