"Scores before and after each calibration"
import numpy as np, pandas as pd, torch
from scipy.stats import norm
from fastai_dropconnect.ensemble.blend import best_temperature
from fastai_dropconnect.uncertainty.conformal import conformal_quantile, fit_spread
from fastai_dropconnect.uncertainty.metrics import (brier_score, crps_quantiles, expected_calibration_error,
                                                    interval_coverage, winkler_score)
from .methods import LEVELS, Prediction

LEVEL,WINDOW = .9,500
Z = norm.ppf((1+LEVEL)/2)


def _q(scores, level=LEVEL): return float(conformal_quantile(torch.as_tensor(scores), level))

def _completed(valid:Prediction, test:Prediction, y:np.ndarray): # Quantiles and a scale for methods that have none
    if valid.quantiles is not None: return [(p.quantiles,p.sd) for p in (valid,test)]
    noise = np.square(y-valid.mean).mean()
    if valid.spread is not None: noise = max(noise-np.square(valid.spread).mean(), .05*noise)
    sds = [np.sqrt(noise + (0. if p.spread is None else np.square(p.spread))) for p in (valid,test)]
    sds = [np.broadcast_to(sd, p.mean.shape) for p,sd in zip((valid,test), sds)]
    raw = [p.mean[:,None]+sd[:,None]*norm.ppf(LEVELS) for p,sd in zip((valid,test), sds)]
    if valid.spread is None: return list(zip(raw, sds))
    a,k = fit_spread(torch.as_tensor(y-valid.mean), torch.as_tensor(valid.spread))
    return [(q,np.sqrt(a+k*np.square(p.spread))) for q,p in zip(raw, (valid,test))]

def rolling_quantiles(
    valid_scores:np.ndarray, # Of the calibration rows, the latest last
    scores:np.ndarray, # Of the test rows
    days:pd.Series, # Of the test rows
    window:int=WINDOW, # Rows to look back
    level:float=LEVEL # Share of rows that should stay below
) -> np.ndarray: # (n_rows,)
    "Return the correction of each test row, from the outcomes of the days before"
    known,res = list(valid_scores),np.empty(len(scores))
    days = days.to_numpy()
    for day in np.unique(days):
        today = np.flatnonzero(days==day)
        res[today] = _q(np.array(known[-window:]), level)
        known += list(scores[today])
    return res

def intervals(
    valid:Prediction, test:Prediction, y:np.ndarray, y_test:np.ndarray, # Targets of the calibration and the test rows
    days:tuple=(None,None) # Of the calibration and the test rows
) -> dict: # From the name of a calibration to lower and upper ends
    "Return the test intervals, as predicted and corrected"
    (qv,sv),(qt,st) = _completed(valid, test, y)
    res = dict(raw=(qt[:,0],qt[:,-1]))
    c = _q(np.abs(y-valid.mean))
    res['split'] = test.mean-c,test.mean+c
    local = np.abs(y-valid.mean)/sv
    res['local'] = test.mean-_q(local)*st,test.mean+_q(local)*st
    c = _q(np.maximum(qv[:,0]-y, y-qv[:,-1]))
    res['cqr'] = qt[:,0]-c,qt[:,-1]+c
    if days[0] is not None:
        order = np.argsort(days[0].to_numpy(), kind='stable')
        c = rolling_quantiles(local[order], np.abs(y_test-test.mean)/st, days[1])
        res[f'last {WINDOW}'] = test.mean-c*st,test.mean+c*st
        below,above = [rolling_quantiles(s[order], new, days[1], level=(1+LEVEL)/2)
                       for s,new in ((qv[:,0]-y,qt[:,0]-y_test), (y-qv[:,-1],y_test-qt[:,-1]))]
        res[f'last {WINDOW}, ends apart'] = qt[:,0]-below,qt[:,-1]+above
    return res

def _worst_quarter(inside, days): # Of those with at least 300 rows
    if days is None: return np.nan
    each = pd.Series(inside).groupby(pd.to_datetime(days).dt.to_period('Q').to_numpy())
    means = each.mean()[each.size()>=300]
    return means.min() if len(means) else np.nan

def score_numbers(valid, test, y, y_test, days=(None,None)) -> list: # A dictionary for each calibration
    t = lambda x: torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float64)
    quantiles = _completed(valid, test, y)[1][0]
    common = dict(rmse=np.sqrt(np.square(test.mean-y_test).mean()), crps=crps_quantiles(t(quantiles), t(y_test), t(LEVELS)).mean().item())
    res = []
    for name,(low,high) in intervals(valid, test, y, y_test, days).items():
        inside = interval_coverage(t(low), t(high), t(y_test)).numpy()
        res.append(common | dict(calibration=name, coverage=inside.mean(), worst_quarter=_worst_quarter(inside, days[1]),
                                 width=(high-low).mean(), winkler=winkler_score(t(low), t(high), t(y_test), LEVEL).mean().item()))
    return res

def ece_by_chance(
    probs:torch.Tensor, # (n_rows, n_classes)
    n_draws:int=200,
    seed:int=0
) -> np.ndarray: # (n_draws,)
    "Return the calibration errors that a perfectly calibrated model would show: targets are drawn from `probs`"
    gen = torch.Generator().manual_seed(seed)
    draw = lambda: torch.multinomial(probs, 1, generator=gen)[:,0]
    return np.array([float(expected_calibration_error(probs, draw())) for _ in range(n_draws)])

def score_classes(valid, test, y, y_test) -> list: # A dictionary for each calibration
    logits = torch.as_tensor(test.logits)
    temperature = best_temperature(torch.as_tensor(valid.logits), torch.as_tensor(y))
    res,targs = [],torch.as_tensor(y_test)
    for name,t in (('raw',1.),('temperature',temperature)):
        probs = (logits/t).softmax(1)
        loss = torch.nn.functional.cross_entropy(logits/t, targs).item()
        res.append(dict(calibration=name, log_loss=loss, brier=brier_score(probs, targs).mean().item(),
                        ece=float(expected_calibration_error(probs, targs)), temperature=float(t)))
    return res
