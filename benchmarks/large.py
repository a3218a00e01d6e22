"""A table larger than memory allows: `make bench`, or

    OMP_NUM_THREADS=1 python benchmarks/large.py [--rows 20000000] [--bs 4096] [--quick] [--folder DIR] [--out DIR]

writes made-up rows with 20 categories, 20 continuous columns and a target to a Parquet file, encodes them, and trains one epoch of a
[200,100] network with DropConnect. Each phase is a process of its own. It prints and saves rows per second and the most
memory: `peak_mb` is all that was resident, pages of mapped files included, which the system may take back at any time; `anonymous_mb` is
what is left without them.
"""
import json, os, resource, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parent))
import pandas as pd
from fastcore.script import call_parse
from layers import machine, results, save

LEVELS = [2,3,4,5,6,8,10,12,15,20] + [2,3,5,8,10,15,20,30,50,100]   # text in the first ten columns, numbers in the others
CATS,CONTS = [f'c{i}' for i in range(20)],[f'x{i}' for i in range(20)]
ROW_GROUP = 2**18
BYTES_OF_ROW = 250      # Parquet file and encoded copy together, with room to spare

class Memory(threading.Thread):
    "Note the most memory of this process, looking every 20 ms"
    def __init__(self):
        super().__init__(daemon=True)
        self.most,self.done = dict(RssAnon=0, RssFile=0),threading.Event()

    def look(self):
        for line in Path('/proc/self/status').read_text().splitlines():
            key,_,value = line.partition(':')
            if key in self.most: self.most[key] = max(self.most[key], int(value.split()[0])/1024)

    def run(self):
        while not self.done.wait(.02): self.look()

def rows_of(n, seed):
    "Make up a row group"
    import numpy as np, pyarrow as pa
    r = np.random.default_rng([0, seed])
    codes = {c: r.integers(0, k, n, dtype=np.int32) for c,k in zip(CATS, LEVELS)}
    x = r.standard_normal((n, 20)).astype('float32')
    y = (x[:,0] + np.sin(2*x[:,1]) + codes['c19']/50 + (codes['c0']>0) + r.normal(0, .3, n)).astype('float32')
    x[r.random((n, 20))<.01*(np.arange(20)<3)] = np.nan        # gaps in the first three columns
    names = {c: pa.array([f'{c}_{i}' for i in range(k)]) for c,k in zip(CATS[:10], LEVELS)}
    cols = {c: names[c].take(pa.array(v)) if c in names else pa.array(v, mask=r.random(n)<.01) for c,v in codes.items()}
    return pa.table(cols | {c: pa.array(v, from_pandas=True) for c,v in zip(CONTS, x.T)} | dict(y=y))

def make(path, rows, bs, mode):
    "Write the Parquet file"
    import pyarrow.parquet as pq
    first = rows_of(1, 0).schema
    with pq.ParquetWriter(path, first) as f:
        for i,start in enumerate(range(0, rows, ROW_GROUP)):
            f.write_table(rows_of(min(ROW_GROUP, rows-start), i))

def settings():
    from fastai.tabular.all import Categorify, FillMissing, Normalize
    return dict(procs=[Categorify,FillMissing,Normalize], cat_names=CATS, cont_names=CONTS, y_names='y', valid=.01)

def encode(path, rows, bs, mode):
    "Fit the procs and write the encoded copy"
    from fastai_dropconnect.tabular import store
    fit_procs,took = store.fit_procs,[]
    def timed(*args, **kwargs):
        start = time.process_time()
        res = fit_procs(*args, **kwargs)
        took.append(time.process_time()-start)
        return res
    store.fit_procs = timed
    store.store_table(path, **settings())
    return dict(fit_cpu_seconds=took[0])

def train(path, rows, bs, mode):
    "Train one epoch"
    import torch
    from fastai.tabular.all import rmse
    from fastai_dropconnect.all import stored_dataloaders, tabular_dropconnect_config, tabular_learner
    torch.set_num_threads(1)
    dls = stored_dataloaders(path, bs=bs, device='cpu', **settings())
    config = tabular_dropconnect_config(weight_p=.1, mode=mode)
    learn = tabular_learner(dls, layers=[200,100], config=config, fast=True, metrics=rmse)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3)
    return dict(valid_rmse=float(learn.recorder.values[-1][-1]))

phases = dict(make=make, encode=encode, train=train)

def measured(name, path, rows, bs, mode) -> dict:
    "Run a phase in this process"
    memory = Memory()
    memory.start()
    import pyarrow.parquet, fastai.tabular.all, fastai_dropconnect.all # noqa: F401 - their time does not count, their memory does
    start,cpu = time.perf_counter(),time.process_time()
    res = phases[name](path, rows, bs, mode) or {}
    took = dict(seconds=time.perf_counter()-start, cpu_seconds=time.process_time()-cpu)
    memory.look()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return dict(phase=name, rows=rows, **took, rows_per_cpu_second=rows/took['cpu_seconds'], peak_mb=peak,
                anonymous_mb=memory.most['RssAnon'], files_mb=memory.most['RssFile'], **res)

def in_own_process(*args) -> dict:
    "Run a phase in another process"
    done = subprocess.run([sys.executable, __file__, '--phase', json.dumps(args)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

@call_parse
def main(
    rows:int=200_000, # Rows of the table; the claim is made with 20,000,000
    bs:int=4096, # Rows in a batch
    mode:str='example', # How DropConnect draws its masks: 'example', 'gaussian' or 'batch'
    quick:bool=False, # A tiny table, to see that everything runs
    folder:str=None, # For the files, which are deleted afterwards; by default where temporary files go
    out:str=str(results), # Directory for the result
    phase:str=None # Used by the program itself
):
    "Measure, print and save"
    if phase: return print(json.dumps(measured(*json.loads(phase))))
    if quick: rows,bs,out = 2000,256,Path(out)/'quick'
    tmp = Path(tempfile.mkdtemp(prefix='large-', dir=folder))
    try:
        free = shutil.disk_usage(tmp).free
        if free < rows*BYTES_OF_ROW: sys.exit(f'{tmp}: {rows:,} rows take {rows*BYTES_OF_ROW:,} bytes, but {free:,} are free')
        found = []
        for name in phases:
            found.append(in_own_process(name, str(tmp/'rows.parquet'), rows, bs, mode))
            print(' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k,v in found[-1].items()), file=sys.stderr, flush=True)
        sizes = {p: sum(f.stat().st_size for f in tmp.rglob(p))/2**20 for p in ('*.parquet','*.npy')}
    finally: shutil.rmtree(tmp)
    df = pd.DataFrame(found)
    about = [*machine('cpu'), f'one thread, batches of {bs}, DropConnect {mode!r}; Parquet file {sizes["*.parquet"]:.0f} MB, encoded copy {sizes["*.npy"]:.0f} MB']
    save(df, Path(out)/'large.csv', about)
    print('\n'.join(about))
    print(df.to_string(index=False, float_format='{:.4g}'.format))
