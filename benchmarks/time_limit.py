"""How well the estimators keep their time limit: `python benchmarks/time_limit.py [--rows 1000 100000] [--limit 60]`

Prints the seconds of `fit` as a share of `time_limit`, and the memory at the peak, for tables of several sizes. Reading the frame,
splitting, training, blending and, with `--time`, the training on all rows count. The aim is at most 1.1.
"""
import argparse, resource, time, warnings
import numpy as np, pandas as pd, torch

def table(n, n_columns=20, seed=0):
    "Return rows of numbers, categories and a date, and a target"
    r = np.random.default_rng(seed)
    df = pd.DataFrame({f'x{i}': r.normal(0, 1, n).astype('float32') for i in range(n_columns-5)})
    for i,levels in enumerate((3, 30, 300, 3000)): df[f'c{i}'] = r.integers(0, levels, n).astype(str)
    df['day'] = pd.Timestamp('2020-01-01') + pd.to_timedelta(np.sort(r.integers(0, 900, n)), unit='D')
    return df,df.x0*df.x1.abs() + np.where(df.c0=='1', 1, -1) + r.normal(0, .3, n)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, nargs='+', default=[300, 3000, 30_000, 300_000, 1_000_000])
    parser.add_argument('--limit', type=float, default=60., help='seconds')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--time', action='store_true', help='split by time, and train on all rows at the end')
    args = parser.parse_args()
    from fastai_dropconnect.estimators import DropConnectRegressor
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    DropConnectRegressor(budget='quick', time_limit=2., verbose=0).fit(*table(300))      # compiles the kernels
    print('rows       limit   seconds   ratio   peak GB   networks')
    for n in args.rows:
        df,y = table(n)
        start = time.monotonic()
        model = DropConnectRegressor(time_limit=args.limit, random_state=0, verbose=0).fit(df, y, time='day' if args.time else None)
        seconds = time.monotonic()-start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
        print(f'{n:<10,} {args.limit:<7g} {seconds:<9.1f} {seconds/args.limit:<7.2f} {peak:<9.1f} {len(model.leaderboard_)}', flush=True)

if __name__=='__main__': main()
