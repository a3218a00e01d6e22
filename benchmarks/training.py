"""Time of training and of predictions, plain fastai compared with `accelerate`: `make bench`, or

    OMP_NUM_THREADS=1 python benchmarks/training.py [--quick] [--rounds 5] [--data TrainAndValid.csv] [--out DIR]

prints a table and writes it as a CSV that names the machine. In each round each Learner trains an epoch, in changing order: 200 batches, or
100,000 rows where that is less, and 64 validation rows. A ratio is the median over the rounds of plain fastai's CPU time divided by the
other's, so above 1 is faster than plain fastai. For members it is the time of eight plain networks divided by that of a masked ensemble of eight.
"""
import os, sys, warnings
from functools import partial
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parent))
import numpy as np, pandas as pd, torch
from contestants import clock_of
from fastai.tabular.all import (Categorify, FillMissing, Normalize, RegressionBlock, TabularPandas, noop,
                                tabular_learner as fastai_learner)
from fastcore.script import call_parse
from fastai_dropconnect.all import tabular_dropconnect_config, tabular_learner
from layers import machine, results, save

real_sales = Path(__file__).parent.parent.parent/'shared'/'data'/'bulldozers'/'TrainAndValid.csv'
# Least ratios: by the first word of the case or 'sales', the layers and the rows in a batch
aims = {('epoch','[200,100]',64): dict(exact=3., example=2.2), ('epoch','[200,100]',512): dict(example=1.2),
        ('epoch','[200,100]',1024): dict(exact=1.9), ('epoch','[500,250]',128): dict(example=1.2), ('epoch','[500,250]',256): dict(example=1.),
        ('epoch','[500,250]',1024): dict(exact=1.4), ('sales','[200,100]',128): dict(exact=3.5), ('sales','[500,250]',128): dict(exact=2.7, example=1.3),
        ('members','[200,100]',64): dict(exact=1/.16), ('get_preds','[200,100]',64): dict(exact=15.)}
full = dict(rows=100_000, batches=200, shapes=[((200,100), 64), ((200,100), 128), ((200,100), 256), ((200,100), 512), ((200,100), 1024),
                                  ((500,250), 64), ((500,250), 128), ((500,250), 256), ((500,250), 512), ((500,250), 1024)])
tiny = dict(rows=600, batches=8, shapes=[((16,8), 64)])

def made_up(rows:int, seed:int=0) -> pd.DataFrame:
    "Make a table of ten categorical columns with 3 to 300 levels, ten continuous columns, and a target that depends on them"
    r = np.random.default_rng(seed)
    levels = dict(zip([f'c{i}' for i in range(10)], [3,5,8,12,20,30,50,80,150,300]))
    df = pd.DataFrame({c: r.integers(0, k, rows).astype(str) for c,k in levels.items()})
    x = r.standard_normal((rows, 10)).astype('float32')
    df = df.assign(**{f'x{i}': x[:,i] for i in range(10)})
    effects = sum(r.standard_normal(k)[df[c].astype(int)] for c,k in levels.items())/3
    return df.assign(y=(effects + np.sin(2*x[:,0]) + x[:,1]*x[:,2]/2 + r.normal(0, .3, rows)).astype('float32'))

def made_up_pandas(rows:int, valid_rows:int) -> TabularPandas:
    "Encode made-up rows; the last `valid_rows` are for validation"
    df = made_up(rows+valid_rows)
    splits = list(range(rows)),list(range(rows, rows+valid_rows))
    return TabularPandas(df, [Categorify,FillMissing,Normalize], [c for c in df if c[0]=='c'], [c for c in df if c[0]=='x'],
                         'y', y_block=RegressionBlock(), splits=splits)

def auction_pandas(data) -> tuple: # Encoded sales, and which they are
    "Encode real auction sales if the file `data` is there, else synthetic ones"
    from fastai_dropconnect.bulldozers.data import bulldozers_pandas, read_bulldozers
    from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
    is_real = Path(data).exists()
    sales = read_bulldozers(data) if is_real else synthetic_bulldozers(16_825)
    return bulldozers_pandas(sales),'real sales' if is_real else 'synthetic sales'

def learners(to, layers, bs) -> dict: # From a name to a Learner
    "Make the Learners that are compared"
    def dls(): return to.dataloaders(bs=bs, device='cpu')
    config = tabular_dropconnect_config(weight_p=.1, mode='example')
    res = dict(plain=fastai_learner(dls(), layers=list(layers)),
               exact=tabular_learner(dls(), layers=list(layers), fast=True),
               example=tabular_learner(dls(), layers=list(layers), config=config, fast=True))
    for learn in res.values():
        learn.logger = noop
        learn.remove_cb(learn.progress)
    return res

def masked(to, layers, bs):
    "Make a Learner of a masked ensemble of eight networks"
    config = tabular_dropconnect_config(members=8)
    learn = tabular_learner(to.dataloaders(bs=bs, device='cpu'), layers=list(layers), config=config, fast=True)
    learn.logger = noop
    learn.remove_cb(learn.progress)
    return learn

def in_rounds(jobs:dict, rounds:int, clock) -> dict: # From a name to a list of CPU times, one for each round
    "Run all jobs in each round, in changing order, once before to warm up"
    for job in jobs.values(): job()
    times = {name: [] for name in jobs}
    names = list(jobs)
    for i in range(rounds):
        for name in names[i%len(names):]+names[:i%len(names)]:
            start = clock()[0]
            jobs[name]()
            times[name].append(clock()[0]-start)
    return times

def compared(times:dict, n_calls:int) -> dict: # 'ms_NAME' of a call, and 'NAME' for plain/NAME
    "Compute the medians of the times and of the ratios within a round"
    res = {f'ms_{name}': 1e3*median(ts)/n_calls for name,ts in times.items()}
    return res | {name: median(p/t for p,t in zip(times['plain'], ts)) for name,ts in times.items() if name!='plain'}

def epochs(to, layers, bs, rounds) -> dict:
    "Compare epochs of training"
    learns = learners(to, layers, bs)
    times = in_rounds({name: partial(learn.fit, 1) for name,learn in learns.items()}, rounds, clock_of('cpu'))
    return compared(times, len(learns['plain'].dls.train))

def members(to, layers, bs, rounds) -> dict:
    "Compare epochs of eight plain networks with those of a masked ensemble"
    learns = dict(plain=learners(to, layers, bs)['plain'], exact=masked(to, layers, bs))
    times = in_rounds({name: partial(learn.fit, 1) for name,learn in learns.items()}, rounds, clock_of('cpu'))
    res = compared(times, len(learns['plain'].dls.train))
    return res | dict(ms_plain=8*res['ms_plain'], exact=8*res['exact'])

def single_rows(to, layers, rounds, n=20) -> dict:
    "Compare predictions of one row"
    learns = learners(to, layers, 64)
    rows = [row for _,row in made_up(n, seed=1).drop(columns='y').iterrows()]
    def job(learn):
        with learn.no_bar(): return torch.stack([learn.predict(row)[2] for row in rows])
    learns['exact'].model.load_state_dict(learns['plain'].model.state_dict())
    assert torch.equal(job(learns['plain']), job(learns['exact']))
    return compared(in_rounds({name: partial(job, learns[name]) for name in ('plain','exact')}, rounds, clock_of('cpu')), n)

def predictions(to, layers, rows, rounds) -> dict:
    "Compare `get_preds` of as many rows, made of a loader of fastai with 64 rows in a batch"
    learns = learners(to, layers, 64)
    df = made_up(rows, seed=1)
    jobs = {name: partial(learns[name].get_preds, dl=learns[name].dls.test_dl(df)) for name in ('plain','exact')}
    same = [f()[0] for f in jobs.values()]
    assert same[0].shape==same[1].shape==(rows,1)
    return compared(in_rounds(jobs, rounds, clock_of('cpu')), 1)

def cases(sizes, data, rounds):
    "Yield a row for each case"
    for layers,bs in sizes['shapes']:
        yield dict(case='epoch', layers=str(list(layers)).replace(' ',''), bs=bs,
                   **epochs(made_up_pandas(min(sizes['rows'], sizes['batches']*bs), 64), layers, bs, rounds))
    to,which = auction_pandas(data)
    for layers in [(200,100),(500,250)] if sizes is full else [(16,8)]:
        yield dict(case=f'epoch, {which}', layers=str(list(layers)).replace(' ',''), bs=128, **epochs(to, layers, 128, rounds))
    small = made_up_pandas(min(sizes['rows'], sizes['batches']*64), 64)
    yield dict(case='members, eight', layers='[200,100]', bs=64, **members(small, (200,100), 64, rounds))
    yield dict(case='predict of a row', layers='[200,100]', bs=64, **single_rows(small, (200,100), rounds))
    yield dict(case=f"get_preds of {sizes['rows']:,} rows", layers='[200,100]', bs=64,
               **predictions(made_up_pandas(2000, 64), (200,100), sizes['rows'], rounds))

def with_aims(df):
    "Add the least ratios that are aimed at"
    def aim(r, name):
        kind = 'sales' if 'sales' in r.case else r.case.replace(',', '').split()[0]
        return aims.get((kind, r.layers, r.bs), {}).get(name, float('nan'))
    for name in ('exact','example'): df[f'aim_{name}'] = [aim(r, name) for r in df.itertuples()]
    return df

@call_parse
def main(
    quick:bool=False, # Tiny sizes, to see that everything runs
    rounds:int=5, # Epochs of each Learner
    data:str=str(real_sales), # Auction sales; synthetic ones where this file is missing
    out:str=str(results) # Directory for the table
):
    "Measure, print and save"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sizes,rounds = (tiny,1) if quick else (full,rounds)
    rows,about = [],machine('cpu')
    for row in cases(sizes, data, rounds):
        print(' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k,v in row.items()), file=sys.stderr, flush=True)
        rows.append(row)
    df = with_aims(pd.DataFrame(rows))
    about.append(f'{rounds} rounds, one thread, load at the end {os.getloadavg()[0]:.1f}')
    save(df, Path(out)/'training.csv', about)
    print('\n'.join(about))
    print("\nCPU time of plain fastai / of ours. exact: the same network with accelerate(); example: with DropConnect p=.1 as well. ms: of a batch, or of a call")
    print(df.to_string(index=False, float_format='{:.3g}'.format))
    missed = sum((df[n] < df[f'aim_{n}']).sum() for n in ('exact','example'))
    print(f"\n{missed} of {df.filter(like='aim_').notna().sum().sum()} aims missed")
