"Boosted trees that predict distributions"
import time
import numpy as np, pandas as pd
from .methods import LEVELS, Prediction

TREES,PATIENCE = 3000,100
PACKAGES = {'CatBoost gaussian': 'catboost', 'CatBoost quantile': 'catboost', 'LightGBM quantile': 'lightgbm'}


def _categories(data): # Frames whose categories are text for CatBoost
    def text(s): return s.astype(object).where(s.notna(), 'missing').astype(str)
    return [p[data.columns].assign(**{c: text(p[c]) for c in data.cats}) for p in data.parts]

def _catboost(data, seed, trees, **settings):
    from catboost import CatBoostRegressor, Pool
    x = [Pool(f, p[data.target], cat_features=data.cats) for f,p in zip(_categories(data), data.parts)]
    start = time.process_time()
    model = CatBoostRegressor(iterations=trees, random_seed=seed, thread_count=1, verbose=0, allow_writing_files=False,
                              early_stopping_rounds=PATIENCE, **settings).fit(x[0], eval_set=x[1])
    return [model.predict(p, thread_count=1) for p in x[1:]],time.process_time()-start

def catboost_gaussian(data, seed, trees):
    from scipy.stats import norm
    outs,seconds = _catboost(data, seed, trees, loss_function='RMSEWithUncertainty', learning_rate=.05)
    preds = []
    for out in outs:
        mean,sd = out[:,0],np.sqrt(out[:,1])
        preds.append(Prediction(mean, sd=sd, quantiles=mean[:,None]+sd[:,None]*norm.ppf(LEVELS)))
    return *preds,seconds,0.

def _of_quantiles(q):
    q = np.sort(q, 1)
    return Prediction(q.mean(1), sd=(q[:,-1]-q[:,0])/3.29, quantiles=q)

def catboost_quantile(data, seed, trees):
    levels = ','.join(f'{u:.2f}' for u in LEVELS)
    outs,seconds = _catboost(data, seed, trees, loss_function=f'MultiQuantile:alpha={levels}', learning_rate=.1)
    return *map(_of_quantiles, outs),seconds,0.

def lightgbm_quantile(data, seed, trees):
    import lightgbm as lgb
    frames = _categories(data)
    kinds = {c: pd.CategoricalDtype(sorted(frames[0][c].unique())) for c in data.cats}
    x,y = [f.astype(kinds) for f in frames],[p[data.target] for p in data.parts]
    start,outs = time.process_time(),[[], []]
    for level in LEVELS:
        model = lgb.LGBMRegressor(objective='quantile', alpha=level, n_estimators=trees, learning_rate=.1, min_child_samples=10,
                                  n_jobs=1, random_state=seed, verbose=-1)
        model.fit(x[0], y[0], eval_set=[(x[1],y[1])], callbacks=[lgb.early_stopping(PATIENCE, verbose=False)])
        for res,rows in zip(outs, x[1:]): res.append(model.predict(rows))
    return *[_of_quantiles(np.stack(q, 1)) for q in outs],time.process_time()-start,0.

FITS = {'CatBoost gaussian': catboost_gaussian, 'CatBoost quantile': catboost_quantile, 'LightGBM quantile': lightgbm_quantile}
