"Make the fits that are missing, and report"
import time
from dataclasses import dataclass
from pathlib import Path
from .methods import METHODS
from .ranking import complete, errors_of
from .report import board, board_text, plot_board, report_text
from .results import append, cpu_name, done, read, scores, take_over
from .tables import Options, load_table


@dataclass(frozen=True)
class Job:
    "A run of the benchmark"
    tables:list                         # Some of `TABLES`
    methods:list                        # Some of `METHODS`
    seeds:int                           # Fits of each, with seeds 0, 1, ...
    out:Path                            # Folder of the results
    options:Options = Options()
    baselines:str = None                # CSV file with fits that need not be made
    say:object = lambda text: None      # Called with the progress

    @property
    def csv(self): return Path(self.out)/'arena.csv'


def tables_of(job:Job) -> tuple: # Tables, and {name: why not} of those that are not there
    "Load the tables"
    tables,skipped = [],{}
    for name in job.tables:
        try: tables.append(load_table(name, job.options))
        except ValueError as e: skipped[name] = str(e)
    return tables,skipped


def methods_of(job:Job, wanted:list) -> tuple: # Names, and {name: why not} of those that cannot run
    "Find the methods that can run; those with nothing to do need not"
    busy = [m for m in job.methods if any(method==m for _,method,_ in wanted)]
    skipped = {m: why for m in busy if (why:=METHODS[m].missing)}
    return [m for m in busy if m not in skipped],skipped


def fit_one(table, method:str, seed:int) -> dict: # A result
    "Fit, predict and score; what goes wrong is part of the result"
    if METHODS[method].prepare: METHODS[method].prepare()
    about = dict(table=table.name, rows=table.rows, task=table.task, method=method, seed=seed, cpu=cpu_name())
    start = time.process_time()
    try: preds = METHODS[method].fit(table, seed)
    except Exception as e: return about | dict(error=float('nan'), cpu_s=round(time.process_time()-start, 2), note=_first_line(e))
    cpu_s = round(time.process_time()-start, 2)
    return about | scores(table, preds) | dict(cpu_s=cpu_s)

def _first_line(e): return f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:200]


def missing_fits(job:Job, tables:list) -> list: # Of (table, method, seed): all methods of a seed before the next one
    "Return the fits that are not in the results"
    known = done(read(job.csv))
    every = [(t,m,s) for s in range(job.seeds) for m in job.methods for t in tables]
    return [(t,m,s) for t,m,s in every if (t.name,t.rows,m,s) not in known]


def results_of(job:Job, tables:list):
    "Return the results of the tables and methods of this job"
    found = read(job.csv)
    rows = {t.name: t.rows for t in tables}
    return found[found.method.isin(job.methods) & (found.rows==found.table.map(rows)) & (found.seed<job.seeds)]


def report(job:Job, results, skipped:dict) -> str: # Markdown
    "Write the tables and the figure, and return the text"
    if not len(complete(errors_of(results)).columns): return '\n'.join(['nothing to compare', *(f'{k}: {v}' for k,v in skipped.items())])
    ranked = board(results)
    text = report_text(ranked, results, skipped)
    (job.out/'arena.md').write_text(text+'\n')
    (job.out/'arena_short.md').write_text(board_text(ranked)+'\n')
    if ranked.usual.notna().any(): plot_board(ranked).savefig(job.out/'arena.png')
    return text


def run(job:Job) -> str: # The report, markdown
    "Run what is missing, and report"
    tables,skipped = tables_of(job)
    job.out.mkdir(parents=True, exist_ok=True)
    if job.baselines: job.say(f'{take_over(job.csv, job.baselines, missing_fits(job, tables))} fits taken from {job.baselines}\n')
    todo = missing_fits(job, tables)
    methods,unable = methods_of(job, todo)
    for k,v in (skipped := skipped | unable).items(): job.say(f'left out: {k}: {v}\n')
    for table,method,seed in todo:
        if method not in methods: continue
        result = fit_one(table, method, seed)
        append(job.csv, result)
        job.say(f'{table.name}, {method}, seed {seed}: {result["error"]:.4f}, {result["cpu_s"]:.1f} CPU s {result.get("note", "")}\n')
    return report(job, results_of(job, tables), skipped)
