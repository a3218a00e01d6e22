"""Time of a training step with `FrozenZeroInit`, as a ratio to the same step without it

    OMP_NUM_THREADS=1 python benchmarks/frozen_zero.py
"""
import time, warnings
from statistics import median
from fastai.tabular.all import *
from fastcore.script import call_parse
from fastai_dropconnect.callback.frozen_zero import FrozenZeroInit
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

def quartiles(ratios): return '{:.3f} ({:.3f}-{:.3f})'.format(median(ratios), *np.quantile(ratios, (.25,.75)))

@call_parse
def main(
    rounds:int=30, # Fits of each kind, in turns
    n_batches:int=100 # Batches in each fit
):
    "Print median times of a step, and ratios to the plain fit of the same round with their quartiles; `again` is another plain fit"
    torch.set_num_threads(1)
    print(f'{"layers":>14} {"batch":>5} {"held weights":>12} {"plain us":>9} {"with us":>9} {"again":>20} {"with":>20}')
    for layers,n_cont,bs in [([200,100], 50, 64), ([500,250], 100, 64), ([1000,500], 100, 256)]:
        learns = [make_learn(layers, n_cont, bs, n_batches, cbs) for cbs in ([], [], [FrozenZeroInit(0.5)])]
        for l in learns:
            l.remove_cb(ProgressCallback)
            l.logger = noop
            l.add_cbs([StepTimer(), StepEnd()])
            l.fit(1)
        times = []
        for i in range(rounds):
            each = [0]*3
            for j in np.roll(range(3), i):
                learns[j].step_timer.times.clear()
                learns[j].fit(1)
                each[j] = median(learns[j].step_timer.times)
            times.append(each)
        plain,held = (1e6*median(t[j] for t in times) for j in (0,2))
        again,ratio = ([t[j]/t[0] for t in times] for j in (1,2))
        n = sum(p.numel() for p,_ in learns[2].frozen_zero_init.weights().values())
        print(f'{str(layers):>14} {bs:5} {n:12} {plain:9.0f} {held:9.0f} {quartiles(again):>20} {quartiles(ratio):>20}')
