"""Time to answer one row on the CPU, and to start: a Learner, a `Predictor`, ONNX Runtime, a program of `torch.export`

    OMP_NUM_THREADS=1 python benchmarks/serving.py --data TrainAndValid.csv
"""
import json, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path
from statistics import median
from fastcore.script import call_parse

warnings.filterwarnings('ignore')

MODELS = dict(plain={}, members=dict(members=8), ple_members=dict(members=8, num_embeddings='ple'))

START = '''
import sys, time
start = time.perf_counter()
{imports}
print(time.perf_counter()-start)'''
STARTS = {
    'Learner': 'from fastai_dropconnect.serialize.learner import load_model\nload_model({path!r})',
    'Predictor': 'from fastai_dropconnect.serialize.predictor import load_predictor\nload_predictor({path!r})',
    'ONNX Runtime': 'import onnxruntime\nonnxruntime.InferenceSession({path!r}+"/m.onnx")',
    'torch.export': 'import torch\ntorch.export.load({path!r}+"/m.pt2").module()'}

def milliseconds(f, rows, seconds):
    "Median and 99th percentile of the CPU time of `f` for one row"
    for row in rows[:20]: f(row)
    times,end = [],time.perf_counter()+seconds
    while time.perf_counter()<end or len(times)<20:
        start = time.thread_time()
        f(rows[len(times)%len(rows)])
        times.append(1e3*(time.thread_time()-start))
    return median(times),sorted(times)[int(.99*len(times))]

def start_time(imports, path):
    "Median seconds that a new process takes to be ready"
    script = START.format(imports=imports.format(path=str(path)))
    env = os.environ | dict(PYTHONWARNINGS='ignore')
    runs = [subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True, env=env) for _ in range(3)]
    return median(float(r.stdout.split()[-1]) for r in runs)

def servers(learn, path, frame):
    "Functions of one row by name, each with what it takes"
    import onnxruntime, torch
    from fastai_dropconnect.all import RowEncoder, export_onnx, export_program, load_predictor, save_model
    save_model(learn, path)
    predictor = load_predictor(path)
    export_onnx(learn, path/'m.onnx')
    export_program(learn, path/'m.pt2')
    names = json.loads((path/'m.json').read_text())
    encode = RowEncoder(names['categories'], names['numbers'])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path/'m.onnx', options)
    program = torch.export.load(path/'m.pt2').module()
    def by_onnx(row): return session.run(None, dict(zip(('cats','conts'), encode([row]))))[0][0]
    def by_program(row):
        with torch.no_grad(): return program(*map(torch.from_numpy, encode([row])))[0].numpy()
    rows = frame.to_dict('records')
    return rows,{'Learner': lambda row: learn.predict(frame.iloc[rows.index(row)])[2].numpy(), 'Predictor': predictor.predict,
                 'ONNX Runtime': by_onnx, 'torch.export': by_program}

@call_parse
def main(
    data:str=None, # Kaggle's TrainAndValid.csv; by default synthetic auctions
    seconds:float=3., # For each model and server
    quick:bool=False # Only see that it runs
):
    "Print milliseconds for one row, the largest difference from the Learner, and seconds to start"
    import torch
    from fastai_dropconnect.all import (bulldozers_dls, price_features, read_bulldozers, synthetic_bulldozers, tabular_dropconnect_config,
                                        tabular_learner)
    torch.set_num_threads(1)
    sales = read_bulldozers(data) if data else synthetic_bulldozers(600 if quick else 4000)
    frame = price_features(sales).drop(columns='logSalePrice').iloc[:50].reset_index(drop=True)
    print(f'{"model":>12} {"server":>13} {"ms":>8} {"99 %":>8} {"difference":>11} {"start s":>8}')
    for name,settings in list(MODELS.items())[:1 if quick else None]:
        learn = tabular_learner(bulldozers_dls(sales, bs=128), y_range=(8,12.5), config=tabular_dropconnect_config(**settings))
        with learn.no_bar(),learn.no_logging():
            learn.fit_zero_restarts(2, 1)
            path = Path(tempfile.mkdtemp())
            rows,by_name = servers(learn, path, frame)
            want = [by_name['Learner'](row) for row in rows[:20]]
            for server,f in by_name.items():
                ms,slow = milliseconds(f, rows, .1 if quick else seconds)
                diff = max(abs(f(row)-w).max() for row,w in zip(rows, want))
                start = start_time(STARTS[server], path)
                print(f'{name:>12} {server:>13} {ms:8.3f} {slow:8.3f} {diff:11.1e} {start:8.2f}', flush=True)
