"""What noisy passes and moments cost, in passes of the plain model, and how near moments are to 400 samples

    python -m benchmarks.uncertainty.passes

on California housing with PLE vectors and layers [200, 100]. The ratios are of CPU time in one run, by turns.
"""
import statistics, time, warnings
import numpy as np, torch
from scipy.stats import spearmanr
from fastai_dropconnect.functional import MODES
from fastai_dropconnect.uncertainty.mc import mc_noise, mc_samples
from fastai_dropconnect.uncertainty.moments import output_moments
from ..accuracy.tables import Options
from .data import load
from .methods import P, Networks

CHUNK,ROWS = 2048,10_000


def seconds(f) -> float:
    start = time.process_time()
    f()
    return time.process_time()-start

def chunks(args): return zip(*[a.split(CHUNK) for a in args])

def costs(model, args, rounds=3) -> dict: # In passes of the plain model
    "Measure by turns, so that other work on the machine meets all of them"
    def plain():
        with torch.no_grad(): return [model(*c) for c in chunks(args)]
    def naive():
        with mc_noise(model, P, 'gaussian'): return [plain() for _ in range(10)]
    few = tuple(a[:1000] for a in args)
    work = {f'50 passes, {mode}': (lambda mode=mode: [mc_samples(model, c, 50, P, mode) for c in chunks(args)], 1) for mode in MODES}
    work |= {'50 passes of the whole model, gaussian': (naive, 5),
             'moments, diagonal': (lambda: [output_moments(model, c, P, diagonal=True) for c in chunks(args)], 1),
             'moments, covariance': (lambda: output_moments(model, few, P), ROWS/1000)}
    model.eval()
    plain()
    for f,_ in work.values(): f()
    once,times = [],{k: [] for k in work}
    for _ in range(rounds):
        for k,(f,factor) in work.items():
            once.append(seconds(plain))
            times[k].append(factor*seconds(f))
    return {k: statistics.median(t)/statistics.median(once) for k,t in times.items()}

def agreement(model, args) -> dict: # Rank correlation, ratio, median error
    "Compare standard deviations with those of 400 samples"
    few,res = tuple(a[:2000] for a in args),{}
    for mode in MODES:
        samples = mc_samples(model, few, 400, P, mode, seed=0)[...,0]
        sd = samples.std(1)
        for name,diagonal in (('covariance',False),('diagonal',True)):
            ours = output_moments(model, few, P, diagonal)[1][:,0].sqrt()
            res[f'{name}, {mode}'] = spearmanr(ours, sd)[0],(ours/sd).median().item(),((ours-sd).abs()/sd).median().item()
        few50 = samples[:,:50].std(1)
        res[f'50 samples, {mode}'] = spearmanr(few50, sd)[0],(few50/sd).median().item(),((few50-sd).abs()/sd).median().item()
    return res

def main():
    data = load('california', Options())
    learn = Networks(data, 0).fit().learn
    conts = torch.tensor(np.ascontiguousarray(learn.dls.train_ds.conts.to_numpy('float32')))[:ROWS]
    args = torch.zeros(len(conts), 0, dtype=torch.long),conts
    print('| standard deviation against 400 samples | rank correlation | ratio | median error |\n|---|---|---|---|')
    for name,(rho,ratio,error) in agreement(learn.model, args).items(): print(f'| {name} | {rho:.3f} | {ratio:.3f} | {error:.1%} |', flush=True)
    print('\n| work on 10,000 rows | passes of the plain model |\n|---|---|')
    for name,ratio in costs(learn.model, args).items(): print(f'| {name} | {ratio:.1f} |', flush=True)


if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    main()
