"""Train one network in one process or in several, on the CPU or on GPUs:

python examples/distributed.py
torchrun --nproc_per_node 2 examples/distributed.py
accelerate launch --multi_gpu --num_processes 2 examples/distributed.py
"""
import argparse
import numpy as np, pandas as pd
from fastai.tabular.all import Categorify, Normalize, RandomSplitter, TabularPandas, rmse, set_seed
from fastai_dropconnect.all import (
    FrozenZeroInit, fast_dataloaders, init_ranks, tabular_dropconnect_config, tabular_learner)


def make_table(n:int) -> pd.DataFrame:
    "Make up the takings of shops"
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(shop=r.choice(['north','south','east'], n), visitors=r.poisson(200, n)))
    df['takings'] = (df.visitors/100*(1+(df.shop=='south')) + r.normal(0, .2, n)).astype('float32')
    return df


def train(n_rows:int=5003, epochs:int=3, bs:int=32) -> dict:
    "Train in all processes; each of them returns the same"
    rank,world_size = init_ranks()      # before the DataLoaders, for the GPU of this process
    set_seed(0)
    df = make_table(n_rows)
    to = TabularPandas(df, procs=[Categorify,Normalize], cat_names=['shop'], cont_names=['visitors'],
                       y_names='takings', splits=RandomSplitter(seed=0)(df))
    config = tabular_dropconnect_config(weight_p=.05)
    learn = tabular_learner(fast_dataloaders(to, bs=bs), layers=[50,20], config=config, metrics=rmse,
                            cbs=FrozenZeroInit(.3))
    with learn.distributed(), learn.no_bar():
        learn.fit_one_cycle(epochs, 1e-2)
        preds,targs = learn.get_preds()
    return dict(rank=rank, world_size=world_size, rmse=(preds-targs).square().mean().sqrt().item(), rows=len(preds))


if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=3)
    result = train(epochs=parser.parse_args().epochs)
    if result['rank']==0: print(result)
