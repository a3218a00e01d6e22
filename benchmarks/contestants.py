"""What `benchmarks/layers.py` measures, one contestant in each process

    python benchmarks/contestants.py step '{"name": "Flipout", "n": 64, "n_in": 200, "n_out": 100, "p": 0.5}'
    python benchmarks/contestants.py kernels '{"n": 64, "n_in": 200, "n_out": 100, "p": 0.1, "other": "../older/fastai_dropconnect"}'
    python benchmarks/contestants.py epoch '{"name": "gaussian"}'

prints one line of JSON. Every contestant takes turns with the plain layer or Learner in the same process. A ratio is the median over
pairs of turns, so other work on the machine slows down both halves of a pair, or only a few pairs.
"""
import importlib, importlib.util, json, os, sys, time, warnings
from functools import partial
from pathlib import Path
from statistics import median
import torch, torch.nn.functional as F
from torch import nn
from fastai_dropconnect.functional import choose_backend, linear_dropconnect
from fastai_dropconnect.layers.dropconnect import DropConnectLinear

packages = Path(__file__).parent.parent/'build'/'bench_packages'

class Example(DropConnectLinear):
    "DropConnect in mode 'example' with the kernel of one backend"
    def __init__(self, n_in, n_out, p, backend):
        super().__init__(n_in, n_out, p=p)
        self.backend = backend
    def forward(self, x): return linear_dropconnect(x, self.weight, self.bias, self.p, backend=self.backend)

class Dense(nn.Linear):
    "DropConnect with a mask tensor of shape `(n, n_out, n_in)`"
    def __init__(self, n_in, n_out, p):
        super().__init__(n_in, n_out)
        self.p = p
    def forward(self, x):
        mask = torch.rand(len(x), *self.weight.shape, device=x.device) >= self.p
        return torch.einsum('ni,noi->no', x, self.weight*mask)/(1-self.p) + self.bias

def signs(*shape, device): return torch.empty(*shape, device=device).bernoulli_(.5).mul_(2).sub_(1)

class Flipout(nn.Linear):
    """Flipout (Wen et al. 2018, eq. 4): one perturbation of the weights, with random signs of the inputs and outputs for each row

    The perturbation `±w*sqrt(p/(1-p))` has the variance of DropConnect, and equals it at `p=0.5`. Rows are not independent."""
    def __init__(self, n_in, n_out, p):
        super().__init__(n_in, n_out)
        self.std = (p/(1-p))**.5
    def forward(self, x):
        n_out,n_in = self.weight.shape
        change = self.weight*signs(n_out, n_in, device=x.device).mul_(self.std)
        return F.linear(x, self.weight, self.bias) + F.linear(x*signs(len(x), n_in, device=x.device), change)*signs(len(x), n_out, device=x.device)

def fastai_weight_dropout(n_in, n_out, p):
    from fastai.text.models.awdlstm import WeightDropout
    return WeightDropout(nn.Linear(n_in, n_out), p, 'weight')

def pypi_dropconnect(n_in, n_out, p):
    sys.path.append(str(packages))
    from dropconnect.nn import Dropconnect
    return Dropconnect(n_in, n_out, p=p)

reference = 'nn.Linear'
contestants = {
    reference: lambda n_in,n_out,p: nn.Linear(n_in, n_out),
    'example, numba': partial(Example, backend='numba'),
    'example, triton': partial(Example, backend='triton'),
    'example, torch': partial(Example, backend='torch'),
    'gaussian': partial(DropConnectLinear, mode='gaussian'),
    'batch': partial(DropConnectLinear, mode='batch'),
    'fastai WeightDropout': fastai_weight_dropout,
    'Flipout': Flipout,
    'dense einsum': Dense,
    'PyPI dropconnect': pypi_dropconnect}

def turn(
    f, # Called without arguments
    calls:int, # Number of calls
    clock # Returns several times, such as CPU time and wall time
) -> list: # Median of each time of a call
    "Measure `f` in one turn"
    times = []
    for _ in range(calls):
        start = clock()
        f()
        times.append([b-a for a,b in zip(start, clock())])
    return [median(t) for t in zip(*times)]

def in_turns(
    f, # Called without arguments
    ref, # What to compare with
    clock, # Returns seconds of CPU time and of wall time
    seconds:float, # Start no new pair after this time
    turn_sz:float=.01 # Seconds of a turn; a single call may take longer
) -> list: # For each pair of turns, the times of `f` and the times of `ref`
    "Measure `f` and `ref` in turns; each goes first in every second pair"
    calls = [max(1, min(100, round(turn_sz/max(turn(o, 1, clock)[1], 1e-9)))) for o in (f,ref)]
    pairs,stop = [],clock()[1]+seconds
    while not pairs or clock()[1]<stop:
        pair = [None,None]
        for i in ((0,1), (1,0))[len(pairs)%2]: pair[i] = turn((f,ref)[i], calls[i], clock)
        pairs.append(pair)
    return pairs

def summary(
    pairs:list # From `in_turns`
) -> dict:
    "Compute the median ratios of CPU time and wall time, the ratio of the fastest turns, and the time of a call"
    cpu,wall = ([(f[hand],ref[hand]) for f,ref in pairs] for hand in (0,1))
    ratio = lambda times: median(f/ref for f,ref in times)
    best = lambda times: min(f for f,_ in times)/min(ref for _,ref in times)
    return dict(ratio=ratio(cpu), ratio_wall=ratio(wall), ratio_best=best(cpu), ms=1e3*median(f for f,_ in cpu), ms_plain=1e3*median(ref for _,ref in cpu), pairs=len(pairs))

def clock_of(device):
    "Return a clock of CPU time and wall time; for a GPU it waits for the work and returns wall time twice"
    if device=='cpu': return lambda: (time.thread_time(), time.perf_counter())
    def clock():
        torch.cuda.synchronize()
        return (time.perf_counter(),)*2
    return clock

def _status_mb(key):
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key+':'))
    return int(line.split()[1])/1024

def peak_mb(f, device):
    "Measure the extra MB of memory while `f` runs; `None` where the system does not report it"
    if device!='cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated()-before)/2**20
    try: Path('/proc/self/clear_refs').write_text('5')     # resets the peak, VmHWM, to what is in use now
    except OSError: return f()
    before = _status_mb('VmRSS')
    f()
    return max(0., _status_mb('VmHWM')-before)

def training_step(layer, n, n_in, n_out, device):
    "Return a function that runs forward and backward on a batch of `n`, with the gradient of the input"
    x,g = torch.randn(n, n_in, device=device, requires_grad=True),torch.randn(n, n_out, device=device)
    layer.to(device)
    def f():
        for t in (x,*layer.parameters()): t.grad = None
        layer(x).backward(g)
    return f

def step(name:str, n:int, n_in:int, n_out:int, p:float, device:str='cpu', seconds:float=3.) -> dict:
    "Measure forward and backward of a layer"
    def make(name, *shape): return training_step(contestants[name](*shape[1:], p=p), *shape, device)
    make(name, 8, 16, 8)()      # imports and compiles
    f = make(name, n, n_in, n_out)
    mb = peak_mb(f, device)
    return dict(peak_mb=mb, **summary(in_turns(f, make(reference, n, n_in, n_out), clock_of(device), seconds)))

def package_at(folder):
    "Import the package in a folder under another name, beside the installed one"
    import numba
    spec = importlib.util.spec_from_file_location('other_dropconnect', Path(folder)/'__init__.py', submodule_search_locations=[str(folder)])
    sys.modules['other_dropconnect'] = res = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(res)
    before,numba.config.CACHE_DIR = numba.config.CACHE_DIR,str(packages.parent/'other_kernels')    # cached code knows modules by name
    try: importlib.import_module('other_dropconnect.kernels.numba')
    finally: numba.config.CACHE_DIR = before
    return res

def kernel_step(package, n, n_in, n_out, p):
    "Return a function that calls the numba kernels of a package, forward and both gradients"
    kernels,masks = (importlib.import_module(f'{package}.{o}') for o in ('kernels.numba','masks'))
    x,w,g = torch.randn(n, n_in),torch.randn(n_out, n_in),torch.randn(n, n_out)
    threshold = masks.drop_threshold(p)
    def f():
        seed = masks.draw_seed()
        kernels.forward(x, w, seed, threshold)
        kernels.grads(g, x, w, seed, threshold)
    return f

def kernels(n:int, n_in:int, n_out:int, p:float, other:str, device:str='cpu', seconds:float=3.) -> dict:
    "Measure the numba kernels against those of the package in the folder `other`"
    package_at(other)
    f,ref = (kernel_step(o, n, n_in, n_out, p) for o in ('fastai_dropconnect','other_dropconnect'))
    f(), ref()      # compiles
    return summary(in_turns(f, ref, clock_of(device), seconds))

def epoch(name:str, rows:int=100_000, bs:int=1024, layers:tuple=(500,250), p:float=.3, device:str='cpu', seconds:float=60.) -> dict:
    "Measure an epoch of a `tabular_learner` on 20 columns of random numbers, validation included"
    import numpy as np, pandas as pd
    from fastai.tabular.all import Normalize, TabularDataLoaders, noop
    from fastai_dropconnect.tabular.learner import tabular_learner
    from fastai_dropconnect.tabular.model import tabular_dropconnect_config
    mode,*backend = name.split(', ')
    if backend: os.environ['FASTAI_DROPCONNECT_BACKEND'] = choose_backend(device, *backend)
    names = [f'x{i}' for i in range(20)]
    df = pd.DataFrame(np.random.default_rng(0).normal(size=(rows+bs, 20)).astype(np.float32), columns=names).assign(y=lambda d: d.x0*d.x1)
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names, y_names='y', valid_idx=range(bs), bs=bs, num_workers=0, device=device)
    def make(config):
        learn = tabular_learner(dls, layers=list(layers), config=config)
        learn.logger = noop
        def f():
            with learn.no_bar(): learn.fit(1)
        return f
    f,plain = make(None if mode==reference else tabular_dropconnect_config(weight_p=p, mode=mode)),make(None)
    return summary(in_turns(f, plain, clock_of(device), seconds))

if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try: res = dict(step=step, kernels=kernels, epoch=epoch)[sys.argv[1]](**json.loads(sys.argv[2]))
    except ImportError as e: res = dict(note=f'cannot be imported: {e}')
    except (RuntimeError,MemoryError) as e: res = dict(note=str(e).splitlines()[0] if str(e) else 'out of memory')
    print(json.dumps(res))
