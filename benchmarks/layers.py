"""Time and memory of DropConnect layers compared with `nn.Linear`: `make bench`, or

    OMP_NUM_THREADS=1 python benchmarks/layers.py [--quick] [--device cuda] [--only 'example, numba'] [--against DIR] [--out DIR]

prints three tables, writes each as a CSV that names the machine and the kernel, and plots them. With `--against`, a fourth table compares
the kernels with those of another version of the package, such as `../older/fastai_dropconnect` of a git worktree, in one process by turns.
"""
import json, os, platform, resource, subprocess, sys
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse

here = Path(__file__).parent
results = here/'results'
reference = 'nn.Linear'
contestants = [reference, 'example, numba', 'example, triton', 'example, torch', 'gaussian', 'batch', 'fastai WeightDropout', 'Flipout', 'dense einsum', 'PyPI dropconnect']
ours = contestants[:6]
full = dict(shapes=[(64,16,16), (64,200,100), (256,200,100), (512,300,200), (1024,500,250), (1024,1000,500), (128,1024,1024)], ps=[.1,.5],    # (n, n_in, n_out)
            growth=[512,1024,2048,4096], epoch=dict(rows=100_000, bs=1024, layers=[500,250]))
tiny = dict(shapes=[(8,16,8)], ps=[.5], growth=[16], epoch=dict(rows=512, bs=64, layers=[16,8]))

def runs_on(name, device): return name != {'cpu': 'example, triton', 'cuda': 'example, numba'}[device]

def bound(
    name:str, # Name of the contestant
    device:str, # 'cpu' or 'cuda'
    n:int=None # Rows of the batch; `None` for an epoch
): # Largest allowed ratio to `nn.Linear`, or `None`
    "Return the promised bound for one CPU thread"
    if device!='cpu': return None
    if n is None: return 2. if name=='example, numba' else None
    return {'example, numba': 2.8, 'example, torch': 30., 'gaussian': 2.5, 'batch': 1.5 if n>=512 else None}.get(name)

def alone(job, limit, memory_gb, **kw):
    "Run a job of `contestants.py` in a separate process; returns its result, or a note why there is none"
    def cap():
        if memory_gb: resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb*2**30),)*2)
    try: res = subprocess.run([sys.executable, here/'contestants.py', job, json.dumps(kw)], capture_output=True, text=True, timeout=limit,
                              preexec_fn=cap, env=dict(os.environ, OMP_NUM_THREADS='1'))
    except subprocess.TimeoutExpired: return dict(note=f'takes more than {limit:.0f} s')
    if res.returncode: return dict(note=(res.stderr.strip().splitlines() or [f'ended with {res.returncode}'])[-1])
    return json.loads(res.stdout.splitlines()[-1])

def kernel_name(device):
    "Say which kernel of 'example' runs, and for which processor it is compiled"
    from fastai_dropconnect.functional import choose_backend
    name = choose_backend(device)
    if name!='numba': return f'kernel {name}'
    import llvmlite.binding as llvm, numba
    cpu = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    features = numba.config.CPU_FEATURES or ('' if numba.config.CPU_NAME else llvm.get_host_cpu_features().flatten())
    return f'kernel numba for {cpu}' + (' with AVX-512' if '+avx512bw' in features else '')

def machine(device):
    "Describe the machine, for the first lines of a CSV"
    info = Path('/proc/cpuinfo')
    cpu = next((o.split(': ')[1] for o in info.read_text().splitlines() if o.startswith('model name')), None) if info.exists() else None
    where = f'{cpu or platform.processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, load {os.getloadavg()[0]:.1f}'
    if device=='cuda':
        import torch
        where = f'{torch.cuda.get_device_name()}; {where}'
    def has(p):
        try: return f'{p} {version(p)}'
        except PackageNotFoundError: return f'no {p}'
    return [where, kernel_name(device), f'{date.today()}, Python {platform.python_version()}, ' + ', '.join(map(has, ['torch','numba','fastai','fastai_dropconnect']))]

def save(df, path, about):
    "Write a table with comments on top, for `pd.read_csv(path, comment='#')`"
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = df.round({c:4 for c in df.select_dtypes('float')})
    path.write_text(''.join(f'# {o}\n' for o in about) + rounded.to_csv(index=False))

def judge(df, device):
    "Add the bounds and whether they are kept; `None` without a bound or a result"
    bounds = [bound(r.name, device, getattr(r, 'n', None)) for r in df.itertuples(index=False)]
    kept = [None if b is None or pd.isna(ratio) else bool(ratio<=b) for b,ratio in zip(bounds, df.ratio)]
    return df.assign(bound=pd.Series(bounds, dtype=float), kept=pd.Series(kept, dtype=object))

def table(rows, columns):
    "Make a frame that has these columns even if no row has them"
    df = pd.DataFrame(rows)
    return df.assign(**{c: float('nan') if c!='note' else None for c in columns if c not in df})

def measured(run, job, row, **kw):
    "Return `row` with the results of a job"
    res = row | run(job, **row, **kw)
    print(' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k,v in res.items() if v is not None), file=sys.stderr, flush=True)
    return res

times = ['ratio','ratio_wall','ratio_best','ms','ms_plain','pairs','note']

def measure_layers(names, shapes, ps, run):
    "Measure every contestant, shape and `p`"
    jobs = [dict(name=name, n=n, n_in=n_in, n_out=n_out, p=p) for n,n_in,n_out in shapes for name in names for p in (ps[-1:] if name==reference else ps)]
    df = table([measured(run, 'step', job) for job in jobs], ['peak_mb', *times])
    plain = df[df.name==reference].set_index(['n','n_in','n_out']).peak_mb
    df.insert(5, 'extra_mb', [r.peak_mb - plain.get((r.n,r.n_in,r.n_out), float('nan')) for r in df.itertuples()])
    return df

def measure_growth(name, sizes, run):
    "Measure one contestant while the batch, the inputs or the outputs grow"
    jobs = [(axis, dict(n=sizes[0], n_in=sizes[0], n_out=sizes[0]) | {axis: sz}) for axis in ('n','n_in','n_out') for sz in sizes]
    df = table([dict(axis=axis) | measured(run, 'step', dict(name=name, p=.5, **shape)) for axis,shape in jobs], ['peak_mb', *times])
    numbers = df.n*df.n_in + df.n_out*df.n_in + df.n*df.n_out
    df = df.assign(ps_per_product=1e9*df.ms/(df.n*df.n_in*df.n_out), bytes_per_number=2**20*df.peak_mb/numbers)
    return df[['name','axis','n','n_in','n_out','ms','ps_per_product','ratio','peak_mb','bytes_per_number','note']]

def measure_kernels(shapes, ps, other, run):
    "Measure the numba kernels against those of another version"
    return table([measured(run, 'kernels', dict(n=n, n_in=n_in, n_out=n_out, p=p), other=str(other)) for n,n_in,n_out in shapes for p in ps], times)

def measure_epochs(names, run):
    "Measure an epoch of `tabular_learner` in each mode"
    return table([measured(run, 'epoch', dict(name=name)) for name in names], times)

def cell(r):
    "Return ratio and memory of one result as text; `!` marks a missed bound"
    if pd.isna(r.ratio): return '-'
    return f'{r.ratio:.{1 if r.ratio<100 else 0}f}x' + ('!' if r.kept==False else ' ') + ('' if pd.isna(r.extra_mb) else f'{r.extra_mb:+6.0f} MB')

def layers_table(df):
    "Pivot the results: a row for each contestant and `p`, a column for each shape"
    d = df.assign(cell=[cell(r) for r in df.itertuples()], shape=[f'({r.n},{r.n_in},{r.n_out})' for r in df.itertuples()])
    res = d.pivot(index=['name','p'], columns='shape', values='cell')
    return res.reindex(index=pd.MultiIndex.from_frame(d[['name','p']].drop_duplicates().sort_values('name', key=lambda s: s.map(contestants.index), kind='stable')),
                       columns=d['shape'].unique()).fillna('')

def report(layers, grown, epochs):
    "Print the three tables"
    print('\nForward and backward: CPU time as a ratio to nn.Linear\'s, and MB of memory beyond nn.Linear\'s. !: over the bound. (n, n_in, n_out):')
    print(layers_table(layers).to_string())
    print('\nBounds: example 2.8x with numba, 30x without; gaussian 2.5x; batch 1.5x from 512 rows on')
    print('\nGrowth: picoseconds for each of n*n_in*n_out products, bytes for each of n*n_in + n_out*n_in + n*n_out numbers')
    print(grown.drop(columns='note').to_string(index=False, float_format='{:.3g}'.format))
    print('\nOne epoch of tabular_learner(layers=[500,250]) on 100,000 rows of 20 columns, bs 1024; bound for example with numba: 2x')
    print(epochs[['name','ratio','ratio_wall','ms','ms_plain','pairs','kept']].to_string(index=False, float_format='{:.3g}'.format))
    notes = pd.concat([d[d.note.notna()] for d in (layers,grown,epochs)])[['name','note']].drop_duplicates()
    for r in notes.itertuples(): print(f'{r.name}: {r.note}')
    missed = sum((d.kept==False).sum() for d in (layers,epochs))
    print(f'\n{missed} of {sum(d.kept.notna().sum() for d in (layers,epochs))} bounds missed')

def draw(
    path=results, # Where the tables are
    stem:str='' # Prefix of their names
): # matplotlib figure
    "Plot ratios and memory of each contestant at `p=0.5`, and growth"
    import matplotlib.pyplot as plt
    layers,grown = (pd.read_csv(Path(path)/f'{stem}{o}.csv', comment='#') for o in ('layers','growth'))
    half = layers[(layers.p==layers.p.max()) & (layers.name!=reference)]
    fig,axs = plt.subplots(1, 3, figsize=(14,4), gridspec_kw=dict(width_ratios=(1.2,1.2,1)), layout='constrained')
    names = [o for o in contestants if o in half[half.ratio.notna()].name.values][::-1]
    for shape,d in half.groupby(['n','n_in','n_out']):
        d = d[d.ratio.notna()]
        ys = [names.index(o) for o in d.name]
        axs[0].plot(d.ratio, ys, 'o', alpha=.7, label=str(shape).replace(' ', ''))
        axs[1].plot(d.extra_mb.clip(lower=1), ys, 'o', alpha=.7)
    for b,_ in half[half.bound.notna()].groupby(['name','bound']):
        if b[0] in names: axs[0].plot(b[1], names.index(b[0]), 'k|', ms=14)
    axs[0].axvline(1, color='gray', lw=1)
    axs[0].set(xscale='log', yticks=range(len(names)), yticklabels=names, xlabel="time / nn.Linear's  (|: bound)")
    axs[1].set(xscale='log', yticks=range(len(names)), yticklabels=[], xlabel="MB beyond nn.Linear's (at least 1)")
    axs[1].legend(*axs[0].get_legend_handles_labels(), title='n, n_in, n_out', fontsize=8)
    for axis,d in grown.groupby('axis', sort=False): axs[2].plot(d.n*d.n_in*d.n_out/1e9, d.ms, 'o-', label=f'{axis} grows')
    axs[2].set(xscale='log', yscale='log', xlabel='n * n_in * n_out / 1e9', ylabel='ms', title=grown.name[0])
    axs[2].xaxis.set_minor_formatter('')
    axs[2].yaxis.set_minor_formatter('')
    axs[2].legend()
    return fig

@call_parse
def main(
    quick:bool=False, # Tiny shapes, to see that everything runs
    device:str='cpu', # 'cpu' or 'cuda'
    only:str='', # Contestants separated by semicolons; by default all
    seconds:float=2., # Time for each contestant and shape
    limit:float=300., # Stop a contestant after this many seconds
    memory_gb:float=12., # Stop a contestant that needs more memory; 0 for no limit
    against:str='', # Folder of another version of the package, whose kernels are measured too
    out:str=str(results) # Directory for the tables and the figure
):
    "Measure, print and save"
    names = [o for o in contestants if (o in only.split(';') if only else runs_on(o, device))]
    example = 'example, numba' if device=='cpu' else 'example, triton'
    about,stem = machine(device),'' if device=='cpu' else f'{device}_'
    run = lambda job,**kw: alone(job, limit, memory_gb, device=device, **kw)
    def saved(name, df):
        save(df, Path(out)/f'{stem}{name}.csv', about)
        return df
    sizes,seconds = (tiny,.1) if quick else (full,seconds)
    layers = saved('layers', judge(measure_layers(names, sizes['shapes'], sizes['ps'], partial(run, seconds=seconds)), device))
    grown = saved('growth', measure_growth(example, sizes['growth'], partial(run, seconds=seconds)))
    epochs = saved('epochs', judge(measure_epochs([o for o in ours if o in names], partial(run, seconds=20*seconds, **sizes['epoch'])), device))
    print('\n'.join(about))
    report(layers, grown, epochs)
    if against:
        kernels = saved('kernels', measure_kernels(sizes['shapes'], sizes['ps'], Path(against).resolve(), partial(run, seconds=seconds)))
        print(f'\nKernels alone, forward and both gradients: CPU time as a ratio to that of {against}; aim: .70')
        print(kernels[['n','n_in','n_out','p','ratio','ratio_best','pairs']].to_string(index=False, float_format='{:.3g}'.format))
    os.environ.setdefault('MPLBACKEND', 'Agg')
    draw(out, stem).savefig(Path(out)/f'{stem}layers.png', dpi=110)
