"""Time of a training step with `FrozenZeroInit`, as a ratio to the same step without it

    OMP_NUM_THREADS=1 python benchmarks/frozen_zero.py
"""
import time, warnings
from statistics import median
from fastai.tabular.all import *
from fastcore.script import call_parse
from fastai_dropconnect.callback.frozen_zero import FrozenZeroInit
from fastai_dropconnect.sparsity.core import HeldWeights
from fastai_dropconnect.tabular.learner import tabular_learner

warnings.filterwarnings('ignore')

def make_learn(layers, n_cont, bs, n_batches, cbs):
    x = np.random.default_rng(0).normal(size=(bs*(n_batches+1), n_cont)).astype(np.float32)
    names = [f'x{i}' for i in range(n_cont)]
    df = pd.DataFrame(x, columns=names).assign(y=x[:,0])
    dls = TabularDataLoaders.from_df(df, cont_names=names, y_names='y', valid_idx=range(bs), bs=bs, device='cpu')
    learn = tabular_learner(dls, layers=layers, cbs=cbs)
    learn.dls = DataLoaders(list(dls.train), [])       # batches are made in advance, so that only training is timed
    return learn

class StepTimer(Callback):
    "Note when each batch starts"
    order = -100
    def __init__(self): self.times = []
    def before_batch(self): self.start = time.thread_time()
    def before_validate(self): raise CancelValidException()

class StepEnd(Callback):
    "Record the seconds since the batch started"
    order = 100
    def after_batch(self): self.learn.step_timer.times.append(time.thread_time()-self.learn.step_timer.start)

class EveryOther(Callback):
    "Hold the weights in every other batch"
    order = -101
    def before_batch(self):
        cb = self.learn.frozen_zero_init
        if self.learn.iter==0: self.held = cb._held
        cb._held = self.held if self.learn.iter%2 else HeldWeights({})
    def after_train(self): self.learn.frozen_zero_init._held = self.held

def quartiles(ratios): return '{:.3f} ({:.3f}-{:.3f})'.format(median(ratios), *np.quantile(ratios, (.25,.75)))

def fit_times(learn): # Seconds of each step
    learn.step_timer.times.clear()
    learn.fit(1)
    return learn.step_timer.times

@call_parse
def main(
    rounds:int=30, # Fits of each kind, in turns
    n_batches:int=100 # Batches in each fit
):
    "Print times of a step, and ratios with their quartiles: another plain fit, held weights, and steps with and without masks in one fit"
    torch.set_num_threads(1)
    print(f'{"layers":>14} {"batch":>5} {"held weights":>12} {"plain us":>9} {"plain again":>20} {"callback":>20} {"masks alone":>20}')
    for layers,n_cont,bs in [([200,100], 50, 64), ([500,250], 100, 64), ([1000,500], 100, 256)]:
        learns = [make_learn(layers, n_cont, bs, n_batches, cbs) for cbs in ([], [], [FrozenZeroInit(0.5)], [FrozenZeroInit(0.5),EveryOther()])]
        for l in learns:
            l.remove_cb(ProgressCallback)
            l.logger = noop
            l.add_cbs([StepTimer(), StepEnd()])
            l.fit(1)
        plain,again,held,masks = [],[],[],[]
        for i in range(rounds):
            each = {j: list(fit_times(learns[j])) for j in np.roll(range(4), i)}
            plain.append(1e6*median(each[0]))
            again.append(median(each[1])/median(each[0]))
            held.append(median(each[2])/median(each[0]))
            masks.append(median(each[3][1::2])/median(each[3][::2]))
        n = sum(p.numel() for p,_ in learns[2].frozen_zero_init.weights().values())
        print(f'{str(layers):>14} {bs:5} {n:12} {median(plain):9.0f}', *[f'{quartiles(r):>20}' for r in (again,held,masks)], flush=True)
