import os, subprocess, sys, textwrap, torch
from pathlib import Path
from types import SimpleNamespace
os.environ.setdefault('MPLBACKEND', 'Agg')
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')    # kernels for CUDA, run by Triton's interpreter
torch.set_num_threads(1)     # small models: two threads on a busy machine wait for each other
import numpy as np, pandas as pd, pytest
from fastai.tabular.all import Callback, Categorify, FillMissing, Normalize, TabularDataLoaders, set_seed


def make_table(n=600, seed=0):
    "A table of mixed types with gaps, and a target that depends on it"
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(color=r.choice(['red','green','blue'], n), code=r.integers(0, 6, n), flag=r.random(n)>.5,
                           a=r.normal(size=n), b=r.normal(size=n)))
    df['y'] = (df.a*df.b + (df.color=='red') + .1*df.code + r.normal(0, .1, n)).astype('float32')
    df.loc[df.index%7==3, 'a'] = np.nan
    df.loc[df.index%11==3, 'color'] = None
    return df


def make_dls(df=None, target='y', bs=32):
    df = make_table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code','flag'], cont_names=['a','b'],
                                      y_names=target, valid_idx=list(range(len(df)*4//5, len(df))), bs=bs)


@pytest.fixture
def dls(): 
    set_seed(0)
    return make_dls()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield


_two_processes = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter('ignore')
from fastai.distributed import *
from fastai.tabular.all import *
from accelerate import Accelerator
def broadcast(self, t, rank):      # fastai's own wants CUDA
    t = LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast
Accelerator(cpu=True)
rank = torch.distributed.get_rank()
def gather(o):
    both = [None]*2
    torch.distributed.all_gather_object(both, o)
    return both
{script}
torch.distributed.destroy_process_group()
open(f'fine{{rank}}', 'w').close()
os._exit(0) # all is done and said. Where the interpreter takes torch down by itself, one run in thirty ends with SIGABRT after Python's last line
"""

@pytest.fixture
def two_processes(tmp_path):
    "A function that runs a script in two processes (gloo, on the CPU): it has `rank`, and `gather(o)` for the `o` of both; an error in one of them fails the test"
    pytest.importorskip('accelerate', reason='fastai trains in several processes through accelerate')
    def run(script):
        (tmp_path/'train.py').write_text(_two_processes.format(tests=str(Path(__file__).parent), script=textwrap.dedent(script)))
        r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py'],
                           capture_output=True, text=True, timeout=180, cwd=tmp_path)
        assert r.returncode==0 and (tmp_path/'fine0').exists() and (tmp_path/'fine1').exists(), r.stdout+r.stderr
    return run


def pytest_collection_modifyitems(items):
    "What has no kernel need not be run for every kernel, nor models of several layers by Triton's interpreter: a pass takes it a second"
    def needless(item):
        backend = getattr(item, 'callspec', None) and item.callspec.params.get('_backend')
        if backend=='triton' and item.callspec.id.endswith(('-members-example','-periodic-members','-ple')): return True
        return backend in ('torch','triton') and any(word in item.name for word in ('batch','gaussian','embedding'))
    items[:] = [i for i in items if not needless(i)]


class Scaled(Callback):
    "Scale the loss and its gradients as mixed precision does"
    order = 10
    def before_fit(self): self.learn.scaler = SimpleNamespace(get_scale=lambda: 1024.)
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad /= 1024
    def after_fit(self): del self.learn.scaler


class InterruptAt(Callback):
    "Interrupt the fit that is the `nth` to get as far as a step"
    order = 95
    def __init__(self, step, nth=1): self.step,self.nth,self.n_fits = step,nth,0
    def after_batch(self):
        if not self.training or self.train_iter!=self.step: return
        self.n_fits += 1
        if self.n_fits==self.nth: raise KeyboardInterrupt
