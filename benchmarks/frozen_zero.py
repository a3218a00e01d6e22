"""Time of a training step with `FrozenZeroInit`, as a ratio to the same step without, and of what it and `GradualPruning` do in a step

    OMP_NUM_THREADS=1 python benchmarks/frozen_zero.py [--rounds 30] [--data TrainAndValid.csv]

Learners are accelerated, and take turns: in each round each trains one epoch, in changing order. A ratio is the median over the rounds of
the CPU time of an epoch divided by that of the plain Learner in the same round, with its quartiles; the second plain Learner shows what
chance does. `us` is the time that a step spends in the methods of the callback, the median of all steps, and its share of the plain step.
`GradualPruning` has pruned in the first steps of its fit and holds the weights in the others; its fit begins with other work, so it has no ratio.
"""
import sys, time, warnings
from pathlib import Path
from statistics import median
sys.path.insert(0, str(Path(__file__).parent))
import numpy as np, torch
from fastai.tabular.all import noop
from fastcore.script import call_parse
from fastai_dropconnect.all import FrozenZeroInit, GradualPruning, tabular_learner
from training import auction_pandas, made_up_pandas, real_sales

in_batch = 'before_batch','after_pred','after_backward','after_step'

def make_learn(to, layers, bs, *cbs):
    learn = tabular_learner(to.dataloaders(bs=bs, device='cpu'), layers=list(layers), fast=True, cbs=cbs)
    learn.logger = noop
    learn.remove_cb(learn.progress)
    learn.fit(1)
    return learn

def epoch(learn) -> float: # Seconds of a step
    start = time.process_time()
    learn.fit(1)
    return (time.process_time()-start)/len(learn.dls.train)

def in_callback(learn, cb, rounds) -> float: # Seconds of a step
    "Measure the methods of a callback, with the timer"
    cls,spent = type(cb),[0.]
    shipped = {e: vars(cls)[e] for e in in_batch if e in vars(cls)}
    def timed(f):
        def method(self):
            start = time.perf_counter()
            f(self)
            spent[-1] += time.perf_counter()-start
            if f is shipped['after_step']: spent.append(0.)
        return method
    for e,f in shipped.items(): setattr(cls, e, timed(f))
    try:
        for _ in range(rounds): learn.fit(1)
    finally:
        for e,f in shipped.items(): setattr(cls, e, f)
    return median(spent[:-1])

def quartiles(ratios): return '{:.3f} ({:.3f}-{:.3f})'.format(median(ratios), *np.quantile(ratios, (.25,.75)))

def compared(to, layers, bs, rounds) -> dict:
    "Compare epochs of four Learners"
    learns = dict(plain=make_learn(to, layers, bs), again=make_learn(to, layers, bs), frozen=make_learn(to, layers, bs, FrozenZeroInit(.5)),
                  pruned=make_learn(to, layers, bs, GradualPruning(4, begin=0., end=.001)))
    names = ['plain','again','frozen']
    times = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i%len(names):]+names[:i%len(names)]: times[name].append(epoch(learns[name]))
    cb,plain = learns['frozen'].frozen_zero_init,median(times['plain'])
    own = in_callback(learns['frozen'], cb, max(1, rounds//5))
    pruning = in_callback(learns['pruned'], learns['pruned'].gradual_pruning, max(1, rounds//5))
    return dict(held=sum(p.numel() for p,_ in cb.weights().values()), plain=1e6*plain, us=1e6*own, share=own/plain, pruning=1e6*pruning,
                **{n: quartiles([t/p for t,p in zip(times[n], times['plain'])]) for n in names[1:]})

@call_parse
def main(
    rounds:int=30, # Epochs of each Learner
    quick:bool=False, # Tiny sizes, to see that everything runs
    data:str=str(real_sales) # Auction sales; synthetic ones where this file is missing
):
    "Print times of a step and ratios with their quartiles"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    print(f'{"data":>16} {"layers":>10} {"batch":>5} {"weights":>8} {"plain us":>9} {"us":>6} {"share":>6} {"pruning us":>10} {"plain again":>20} {"frozen":>20}')
    def cases():
        for bs in (64,) if quick else (64,128,1024): yield 'made up',made_up_pandas(600 if quick else min(100*bs, 50_000), 64),bs
        to,which = auction_pandas(data)
        yield which,to,128
    for which,to,bs in cases():
        layers = [16,8] if quick else [200,100]
        r = compared(to, layers, bs, 2 if quick else rounds)
        print(f'{which:>16} {str(layers):>10} {bs:5} {r["held"]:8} {r["plain"]:9.0f} {r["us"]:6.1f} {r["share"]:6.2%} {r["pruning"]:10.1f}', *[f'{r[n]:>20}' for n in ('again','frozen')], flush=True)
