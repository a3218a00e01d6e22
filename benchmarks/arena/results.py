"One line per fit in a CSV file, and lines taken over from another one"
import platform
from pathlib import Path
import numpy as np, pandas as pd
from sklearn.metrics import log_loss, roc_auc_score
from ..accuracy.results import append_result, read_results
from .tables import Table

COLUMNS = ['table','rows','task','method','seed','error','acc','auc','cpu_s','cpu','note']
KEY = ['table','rows','method','seed']


def scores(
    t:Table,
    preds:np.ndarray # Numbers, or probabilities in the order of `t.classes`
) -> dict: # RMSE or log loss; of classes also accuracy, and of two classes AUC
    "Score predictions of the test rows"
    y = t.y('test')
    if t.task=='reg':
        preds = np.asarray(preds, dtype=float)
        if preds.shape!=y.shape: raise ValueError(f'predictions must have the shape {y.shape}, got {preds.shape}')
        return dict(error=float(np.sqrt(np.mean((y.astype(float)-preds)**2))), acc=np.nan, auc=np.nan)
    codes = np.array([t.classes.index(v) for v in y])
    p = np.clip(preds, 1e-7, 1)
    p = p/p.sum(1, keepdims=True)
    auc = roc_auc_score(codes, p[:,1]) if len(t.classes)==2 else np.nan
    return dict(error=float(log_loss(codes, p, labels=range(len(t.classes)))), acc=float((p.argmax(1)==codes).mean()), auc=float(auc))


def cpu_name() -> str:
    "Return the name of this CPU"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.processor() or 'unknown')


def read(path) -> pd.DataFrame:
    "Read the results, the last line of each fit"
    return read_results(path, COLUMNS).drop_duplicates(KEY, keep='last')


def append(path, result:dict):
    "Write a result at once"
    append_result(path, dict(acc=np.nan, auc=np.nan, note='') | result, COLUMNS)


def done(results:pd.DataFrame) -> set: # Of (table, rows, method, seed)
    "Return the fits that need not be made; those that failed are made again"
    return set(results.dropna(subset=['error'])[KEY].itertuples(index=False, name=None))


def take_over(
    path, # CSV file of this benchmark
    baselines:str, # Another one, or one with fewer columns
    wanted:list, # Of (Table, method, seed)
) -> int: # How many
    "Copy the wanted fits that are missing from results with the same splits"
    more = pd.read_csv(baselines)
    missing = {'table','method','seed','error','cpu_s'}-set(more)
    if missing: raise ValueError(f'`baselines` must have the columns {", ".join(sorted(missing))}, but {baselines} has not')
    known,more = done(read(path)),more.dropna(subset=['error']).set_index(['table','method','seed'])
    n = 0
    for t,method,seed in wanted:
        if (t.name,t.rows,method,seed) in known or (t.name,method,seed) not in more.index: continue
        row = more.loc[[(t.name,method,seed)]].iloc[-1].to_dict()
        if row.get('rows', t.rows)!=t.rows: continue
        row = dict(cpu='unknown') | row | dict(table=t.name, rows=t.rows, task=t.task, method=method, seed=seed, note=f'from {Path(baselines).name}')
        append(path, row)
        n += 1
    return n
