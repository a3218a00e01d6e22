"""CPU time of training LeNet-300-100 with `GradualPruning`, as a ratio to plain training: `python -m benchmarks.sparsity.steps`

Whole fits take turns. A fit has as many times of pruning however long it is, so a short fit is dearer than a long one.
"""
import time, warnings
from statistics import median
import torch
import torch.nn.functional as F
from fastai.basics import set_seed
from fastcore.script import call_parse
from .methods import METHODS
from .run import make_learner
from .tasks import Task, percent_wrong, relu_net


def seconds(method, target, epochs, n_batches) -> float:
    "Train once on made-up images, and return the CPU time"
    g = torch.Generator().manual_seed(0)
    x = torch.rand(128*n_batches, 784, generator=g)*(torch.rand(128*n_batches, 784, generator=g)<.2)
    y = torch.randint(10, (len(x),), generator=g)
    task = Task('lenet300', (x,y), (x,y), lambda: relu_net(784, 300, 100, 10), F.cross_entropy, percent_wrong, 'error %', epochs, 128, 3e-3)
    set_seed(0)
    learn = make_learner(task, METHODS[method], target, METHODS[method].of(task.name))
    with learn.no_bar():
        start = time.thread_time()
        learn.fit(epochs)
        return time.thread_time()-start


@call_parse
def main(
    methods:str='plain,pruned,shrinking,structured', # Names of methods; the first 'plain' is the reference, and again to show the noise
    target:float=68, # How many times fewer weights
    epochs:int=4,
    n_batches:int=200, # Of an epoch
    rounds:int=7 # Fits of each method, in turns
):
    "Print the median ratio of each method to the plain fit of the same round, and the range"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    names,ratios = methods.split(','),{}
    seconds('plain', target, 1, n_batches)      # what happens only once
    for i in range(rounds):
        order = ['reference',*names] if i%2==0 else [*names,'reference']
        times = {n: seconds('plain' if n=='reference' else n, target, epochs, n_batches) for n in order}
        for n in names: ratios.setdefault(n, []).append(times[n]/times['reference'])
    print(f'{epochs*n_batches} steps of 128 rows, {rounds} rounds; {1000*times["reference"]/(epochs*n_batches):.2f} ms a plain step')
    for n,r in ratios.items(): print(f'{n}: {median(r):.3f} times plain ({min(r):.3f} to {max(r):.3f})')
