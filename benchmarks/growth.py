"""How time and memory of an epoch grow with the rows of a table in memory: `make bench`, or

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--sizes 10000,30000,100000,300000,1000000] [--fastai-to 100000] [--quick] [--out DIR]

trains plain networks ([200,100], batches of 512) on tables of 20 columns, with `fast_dataloaders` and with fastai's own loaders, each in a
process of its own. It writes `growth_rows.json`, and a figure with CPU seconds of the second epoch and the memory that table, loaders and
training add. On its logarithmic axes, linear growth is a line that rises by ten for ten times the rows.
"""
import json, os, resource, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
sys.path.insert(0, str(Path(__file__).parent))
from fastcore.script import call_parse
from layers import machine, results

def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def epoch(loader:str, rows:int, bs:int=512) -> dict:
    "Train two epochs in this process, and measure the second"
    import torch, warnings
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, noop, tabular_learner as fastai_learner
    from fastai_dropconnect.all import fast_dataloaders, tabular_learner
    from training import made_up
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    before = peak_mb()
    df = made_up(rows)
    names = [[c for c in df if c[0]==k] for k in 'cx']
    to = TabularPandas(df, [Categorify,FillMissing,Normalize], *names, 'y', splits=(list(range(rows-64)),list(range(rows-64, rows))))
    del df
    if loader=='fast': learn = tabular_learner(fast_dataloaders(to, bs=bs, device='cpu'), layers=[200,100], fast=True)
    else: learn = fastai_learner(to.dataloaders(bs=bs, device='cpu'), layers=[200,100])
    learn.logger = noop
    learn.remove_cb(learn.progress)
    learn.fit(1)
    start = time.process_time()
    learn.fit(1)
    return dict(loader=loader, rows=rows, bs=bs, cpu_seconds=time.process_time()-start, added_mb=peak_mb()-before, peak_mb=peak_mb())

def slope(found, loader, key) -> float:
    "Fit the power of the rows with which `key` grows, by least squares of the logarithms"
    import numpy as np
    points = [(f['rows'], f[key]) for f in found if f['loader']==loader]
    return float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0]) if len(points)>1 else float('nan')

def draw(found):
    "Plot seconds and memory against rows, on logarithmic axes"
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax,key,label in zip(axs, ('cpu_seconds','added_mb'), ('CPU seconds of an epoch','memory added, MB')):
        for loader,style in (('fast','o-'), ('fastai','s--')):
            points = [(f['rows'], f[key]) for f in found if f['loader']==loader]
            if points: ax.loglog(*zip(*points), style, label='fast_dataloaders' if loader=='fast' else "fastai's loaders")
        ax.set(xlabel='rows', ylabel=label)
        ax.grid(alpha=.3)
    axs[0].legend(frameon=False)
    fig.tight_layout()
    return fig

@call_parse
def main(
    sizes:str='10000,30000,100000', # Numbers of rows; 1,000,000 takes about 2 GB
    fastai_to:int=30_000, # fastai's loaders up to so many rows
    quick:bool=False, # Tiny tables, to see that everything runs
    out:str=str(results), # Directory for the results
    phase:str=None # Used by the program itself
):
    "Measure, print and save"
    if phase: return print(json.dumps(epoch(*json.loads(phase))))
    if quick: sizes,fastai_to,out = '1000,2000',1000,Path(out)/'quick'
    found = []
    for rows in map(int, sizes.split(',')):
        for loader in ['fast','fastai'] if rows<=fastai_to else ['fast']:
            command = [sys.executable, __file__, '--phase', json.dumps([loader, rows])]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]))
            print(' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k,v in found[-1].items()), flush=True)
    powers = {f'{loader} {key}': round(slope(found, loader, key), 3) for loader in ('fast','fastai') for key in ('cpu_seconds','added_mb')}
    print('grows with the rows to the power of:', powers)
    Path(out).mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(machine=machine('cpu'), rows=found, powers={k: None if v!=v else v for k,v in powers.items()}), indent=1)
    (Path(out)/'growth_rows.json').write_text(text+'\n')
    draw(found).savefig(Path(out)/'growth_rows.png', dpi=110)
