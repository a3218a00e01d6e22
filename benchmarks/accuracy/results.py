"Results in a CSV file: each is written at once, so that an interrupted run can continue"
import json, os
from pathlib import Path
import pandas as pd

SETUP = ['dataset','source','rows','split_seed','trials','max_epochs','max_trees']   # only results with the same setup are comparable
COLUMNS = [*SETUP, 'family','space','seed','metric','valid','test','seconds','megabytes','params']


def read_results(
    path, # CSV file; may be missing
    columns=COLUMNS # Of the results
) -> pd.DataFrame:
    "Read all results, and delete half a line at the end, left by a process that was killed while writing"
    path = Path(path)
    if not path.exists(): return pd.DataFrame(columns=list(columns))
    text = path.read_bytes()
    if text and not text.endswith(b'\n'):
        with open(path, 'r+b') as f: f.truncate(text.rfind(b'\n')+1)
    return pd.read_csv(path) if text.count(b'\n') else pd.DataFrame(columns=list(columns))


def append_result(
    path, # CSV file, made if need be
    result:dict, # A value for each of `columns`; `params` may be a dictionary
    columns=COLUMNS # Of the results
):
    "Append one line in a single write, because several processes may write to the same file"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {k: json.dumps(v) for k,v in result.items() if k=='params'}
    line = pd.DataFrame([result | text])[list(columns)].to_csv(index=False, header=not path.exists() or not path.stat().st_size, float_format='%.6g')
    fd = os.open(path, os.O_WRONLY|os.O_CREAT|os.O_APPEND, 0o644)
    try: os.write(fd, line.encode()); os.fsync(fd)
    finally: os.close(fd)


def matching(
    results:pd.DataFrame, # From `read_results`
    **wanted # Values of columns
) -> pd.DataFrame:
    "Return the results with these values"
    for c,v in wanted.items(): results = results[results[c]==v]
    return results
