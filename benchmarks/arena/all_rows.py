"""The call on the three tables of the accuracy benchmark, fitted to all rows before the test rows: `python -m benchmarks.arena.all_rows`

Boosted trees were fitted to the same rows there, with settings found by a search on the validation rows. Here nothing is searched by hand: the call
holds rows out by itself, at random, or the latest ones of the auctions."""
import csv, sys, time, warnings
from argparse import ArgumentParser
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai_dropconnect import estimators
from .ours import compile_kernels
from .outsiders import outputs
from .results import cpu_name, scores
from .tables import Options, load_table

TABLES = dict(california='california', adult='adult', auctions='bulldozers')      # name here: name in accuracy.csv
RESULTS = Path(__file__).parent.parent/'results'


def references(name:str) -> dict: # Family: mean test score, RMSE or AUC
    "Return what trees reached on the same rows"
    rows = pd.read_csv(RESULTS/'accuracy.csv').query('dataset==@name and family in ("lightgbm","xgboost","catboost")')
    return rows.groupby('family').test.mean().to_dict()


def fit_all_rows(name:str, seed:int, options:Options, **settings) -> dict: # 'score' (RMSE or AUC), 'cpu'
    "Fit the call to the training and validation rows, and score it on the test rows"
    t = load_table(name, options)
    x = pd.concat([t.x('train'), t.x('valid')], ignore_index=True)
    y = np.concatenate([t.y('train'), t.y('valid')]).astype(float if t.task=='reg' else str)
    make = estimators.DropConnectRegressor if t.task=='reg' else estimators.DropConnectClassifier
    start = time.process_time()
    model = make(random_state=seed, verbose=0, device='cpu', **settings).fit(x, y, time='saleElapsed' if name=='auctions' else None)
    found = scores(t, outputs(model, t, t.x('test')))
    return dict(score=found['error' if t.task=='reg' else 'auc'], cpu=time.process_time()-start)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--tables', default=','.join(TABLES))
    parser.add_argument('--data', default=None, help="Kaggle's TrainAndValid.csv of bulldozers")
    parser.add_argument('--wheels', default=None, help='folder with wheels, as for the arena')
    parser.add_argument('--budget', default='default')
    parser.add_argument('--with-gbm', action='store_true', help='blend boosted trees with the networks')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--out', default=str(RESULTS/'all_rows.csv'))
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    compile_kernels()
    out = Path(args.out)
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    options = Options(args.data, Path(args.wheels)) if args.wheels else Options(args.data)
    settings = dict(budget=args.budget) | (dict(with_gbm=True) if args.with_gbm else {})
    call = args.budget + (', trees' if args.with_gbm else '')
    for name in args.tables.split(','):
        if name=='auctions' and args.data is None: continue
        for seed in range(args.seeds):
            key = dict(table=name, budget=call, seed=str(seed))
            if any(key.items()<=r.items() for r in rows): continue
            found = fit_all_rows(name, seed, options, **settings)
            rows.append(key | dict(score=f'{found["score"]:.5g}', cpu=f'{found["cpu"]:.1f}', machine=cpu_name()))
            with out.open('w', newline='') as f:
                writer = csv.DictWriter(f, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        ours = np.mean([float(r['score']) for r in rows if r['table']==name and r['budget']==call])
        print(f'{name:11} {ours:.4f}', *(f'  {k} {v:.4f} ({100*(ours/v-1):+.1f} %)' for k,v in references(TABLES[name]).items()), flush=True)


if __name__=='__main__': sys.exit(main())
