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

@call_parse
def main(
    rounds:int=30, # Fits of each kind, in turns
    n_batches:int=100 # Batches in each fit
):
    "Print median times and their ratio for three sizes of models"
    torch.set_num_threads(1)
    print(f'{"layers":>14} {"batch":>5} {"held weights":>12} {"plain us":>9} {"with us":>9} {"ratio":>6}')
    for layers,n_cont,bs in [([200,100], 50, 64), ([500,250], 100, 64), ([1000,500], 100, 256)]:
        learns = [make_learn(layers, n_cont, bs, n_batches, cbs) for cbs in ([], [FrozenZeroInit(0.5)])]
        for l in learns: 
            l.remove_cb(ProgressCallback)
            l.logger = noop
            l.add_cbs([StepTimer(), StepEnd()])
            l.fit(1)
        ratios,times = [],[]
        for i in range(rounds):
            both = [0,0]
            for j in ((0,1), (1,0))[i%2]:
                learns[j].step_timer.times.clear()
                learns[j].fit(1)
                both[j] = median(learns[j].step_timer.times)
            times.append(both)
            ratios.append(both[1]/both[0])
        plain,held = (1e6*median(t[j] for t in times) for j in (0,1))
        n = sum(p.numel() for p,_ in learns[1].frozen_zero_init.weights().values())
        print(f'{str(layers):>14} {bs:5} {n:12} {plain:9.0f} {held:9.0f} {median(ratios):6.3f}')
