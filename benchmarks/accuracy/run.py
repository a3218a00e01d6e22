"The benchmark: search, refit and report what is missing for data sets and families"
from dataclasses import asdict, dataclass
from pathlib import Path
import pandas as pd
from .families import FAMILIES
from .refit import refit
from .report import board_text, plot_board, short_text, summary
from .results import SETUP, append_result, matching, read_results
from .search import search
from .spaces import Limits
from .tables import Options, development_table, test_rows


@dataclass(frozen=True)
class Job:
    "A run of the benchmark"
    datasets:list       # Some of `DATASETS`
    families:list       # Some of `FAMILIES`
    trials:int          # Of each search; 0: no search, the defaults
    seeds:int           # Fits of the chosen hyperparameters, with seeds 0, 1, ...
    out:Path            # Folder of the results
    options:Options = Options()
    limits:Limits = Limits()
    say:object = lambda text: None      # Called with the progress

    @property
    def csv(self): return Path(self.out)/'accuracy.csv'


def setup_of(job:Job, table) -> dict:
    "Return what results must have in common to be comparable"
    values = table.name,table.source,len(table.train)+len(table.valid),job.options.split_seed,job.trials,job.limits.epochs,job.limits.trees
    return dict(zip(SETUP, values))


def run_family(job:Job, table, name:str):
    "Search, then make the fits that are missing"
    family = FAMILIES[name]
    setup = setup_of(job, table) | dict(family=name, space=family.fingerprint)
    say = lambda text: job.say(f'{table.name}, {name}: {text}\n')
    known = set(matching(read_results(job.csv), **setup).seed)
    todo = [s for s in range(job.seeds) if s not in known]
    if not todo: return
    study = ' '.join(f'{k}={v}' for k,v in setup.items() if k!='trials')
    params,valid = search(family, table, job.trials, 0, job.limits, study, job.out/'studies.journal', say)
    test = test_rows(table.name, job.options)
    for seed in todo:
        result = refit(family, table, test, params, seed, job.limits)
        append_result(job.csv, dict(**setup, seed=seed, metric=table.metric, valid=valid, params=params, **asdict(result)))
        say(f'seed {seed}, test {result.test:.4f}, {result.seconds:.1f} CPU s')


def results_of(job:Job, tables) -> pd.DataFrame:
    "Return all results with the setup of this job, also of families that were run earlier"
    every = read_results(job.csv)
    now = every.space==every.family.map({n: f.fingerprint for n,f in FAMILIES.items()})
    return pd.concat([matching(every[now], **setup_of(job, t)) for t in tables], ignore_index=True)


def full_datasets(job:Job) -> list:
    "Return the data sets that are complete and real"
    if job.options.rows is not None or job.limits!=Limits(): return []
    return [d for d in job.datasets if d!='bulldozers' or job.options.data is not None]


def report(job:Job, results:pd.DataFrame) -> str:
    "Write the tables and the figure, and return the table"
    board = summary(results)
    text = board_text(board, full_datasets(job))
    (job.out/'accuracy.md').write_text(text+'\n')
    (job.out/'accuracy_short.md').write_text(short_text(board, full_datasets(job))+'\n')
    plot_board(board, results).savefig(job.out/'accuracy.png')
    return text


def load(job:Job) -> list: # Tables without test rows
    "Load the tables of a job; raises `ValueError` for files that cannot be read"
    return [development_table(d, job.options) for d in job.datasets]


def run(
    job:Job,
    tables:list # From `load`
) -> str: # The table of results, markdown
    "Run what is missing, and report"
    for table in tables:
        for name in job.families: run_family(job, table, name)
    return report(job, results_of(job, tables))
