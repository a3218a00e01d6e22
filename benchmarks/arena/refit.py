"""What networks are worth that are trained again on all rows: `python -m benchmarks.arena.refit`

A quarter of the rows of a table tests, drawn anew and not as in the arena. The call searches on the others and trains its heaviest kinds again on all
of them. The new networks get several shares of the blend, and for each the change of the test error against the search alone is printed in percent."""
import sys, warnings
from argparse import ArgumentParser
from math import inf
from pathlib import Path
import numpy as np, torch
from sklearn.metrics import log_loss, root_mean_squared_error
from sklearn.model_selection import train_test_split
from fastai_dropconnect import estimators
from fastai_dropconnect.refit import blend_in, heaviest
from .ours import compile_kernels
from .tables import Options, load_table

SHARES = 1/3,1/2,2/3,1
MOST_ROWS = 14_000


def split(t) -> list: # Rows to train and to test, their targets
    "Draw the rows that test"
    rows = np.random.RandomState(5).permutation(len(t.df))[:MOST_ROWS]
    x,y = t.df[[*t.cats, *t.conts]].iloc[rows],t.df.target.iloc[rows].to_numpy(float if t.task=='reg' else str)
    return train_test_split(x, y, test_size=.25, random_state=10, stratify=None if t.task=='reg' else y)


def error(model, x, y) -> float:
    "Return the RMSE or the log loss"
    if hasattr(model, 'classes_'): return log_loss(y, model.predict_proba(x), labels=model.classes_)
    return root_mean_squared_error(y, model.predict(x))


def changes(t, seed:int) -> list: # In percent, one for each share; `None` if the table is cut into folds
    "Measure what the new networks change"
    make = estimators.DropConnectRegressor if t.task=='reg' else estimators.DropConnectClassifier
    class Searched(make):
        kept = None
        def _refit(self, again, share, end): self.kept = heaviest(again),self._all_rows()
    x,x_test,y,y_test = split(t)
    model = Searched(random_state=seed, verbose=0, device='cpu').fit(x, y)
    if model.kept is None: return None
    again,[dls] = model.kept
    models,weights = [train(dls, inf) for train,_ in again],np.array([w for _,w in again])
    alone,res = model.learner_,[]
    before = error(model, x_test, y_test)
    for share in SHARES:
        model.learner_ = blend_in(alone, dls, models, (share*weights/weights.sum()).tolist())
        res.append(100*(error(model, x_test, y_test)/before-1))
    return res


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--tables', default='credit,magic,california,satimage,deliveries,gss_wages,mlc_churn')
    parser.add_argument('--wheels', default=None, help='folder with wheels, as for the arena')
    parser.add_argument('--seeds', type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    compile_kernels()
    print(f'{"share of the new networks":28}', *(f'{s:7.2f}' for s in SHARES))
    options,found = Options(wheels=Path(args.wheels)) if args.wheels else Options(),[]
    for name in args.tables.split(','):
        for seed in range(args.seeds):
            res = changes(load_table(name, options), seed)
            print(f'{name:20} seed {seed:2}', *(['   folds, so no refit'] if res is None else (f'{r:+7.2f}' for r in res)), flush=True)
            if res: found.append(res)
    if found: print(f'{"mean":28}', *(f'{r:+7.2f}' for r in np.mean(found, 0)))


if __name__=='__main__': sys.exit(main())
