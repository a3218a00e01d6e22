"Boosted trees, forests and other authors' networks, with their defaults; boosting and networks stop by the validation rows"
import sys, types
from importlib import import_module
import numpy as np, pandas as pd
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from .tables import Table

PATIENCE = 60      # Boosting stops after this many trees without a better validation loss


def coded(
    t:Table,
    split:str,
    categories:bool=True # pandas' categories; otherwise their codes, -1 for unseen and missing ones
) -> pd.DataFrame:
    "Return the columns with the categories of the training rows"
    x,train = t.x(split),t.part('train')
    for c in t.cats:
        levels = pd.Index(sorted(train[c].dropna().unique()), dtype=object)
        codes = levels.get_indexer(x[c])
        x[c] = pd.Categorical.from_codes(codes, levels) if categories else codes
    return x


def codes_of(t:Table, split:str) -> np.ndarray: # Numbers, or positions in `t.classes`
    "Return the targets as numbers"
    y = t.y(split)
    return y.astype(float) if t.task=='reg' else np.searchsorted(t.classes, y.astype(str))


def outputs(
    model, # Fitted
    t:Table,
    x # Encoded test rows
) -> np.ndarray: # Numbers, or probabilities in the order of `t.classes`
    "Predict, with classes in the order of the table"
    if t.task=='reg': return np.asarray(model.predict(x), dtype=float).reshape(-1)
    known = list(model.classes_)
    wanted = t.classes if known[0] in t.classes else range(len(t.classes))
    return model.predict_proba(x)[:,[known.index(c) for c in wanted]]


def lightgbm(t:Table, seed:int) -> np.ndarray:
    import lightgbm as lgb
    make = lgb.LGBMRegressor if t.task=='reg' else lgb.LGBMClassifier
    model = make(n_estimators=3000, learning_rate=.04, num_threads=1, random_state=seed, verbose=-1,
                 feature_fraction=.9, bagging_fraction=.9, bagging_freq=1)
    model.fit(coded(t, 'train'), codes_of(t, 'train'), eval_X=coded(t, 'valid'), eval_y=codes_of(t, 'valid'),
              callbacks=[lgb.early_stopping(PATIENCE, verbose=False)])
    return outputs(model, t, coded(t, 'test'))


def xgboost(t:Table, seed:int) -> np.ndarray:
    import xgboost as xgb
    make = xgb.XGBRegressor if t.task=='reg' else xgb.XGBClassifier
    model = make(n_estimators=3000, learning_rate=.05, tree_method='hist', enable_categorical=True, n_jobs=1, random_state=seed,
                 early_stopping_rounds=PATIENCE, verbosity=0, subsample=.9, colsample_bytree=.9)
    model.fit(coded(t, 'train'), codes_of(t, 'train'), eval_set=[(coded(t, 'valid'),codes_of(t, 'valid'))], verbose=False)
    return outputs(model, t, coded(t, 'test'))


def _named_gaps(t, split):
    "Return the columns with missing categories as a category of their own"
    x = t.x(split)
    return x.assign(**{c: x[c].astype(object).where(x[c].notna(), 'NA').astype(str) for c in t.cats})

def catboost(t:Table, seed:int) -> np.ndarray:
    import catboost as cb
    make = cb.CatBoostRegressor if t.task=='reg' else cb.CatBoostClassifier
    model = make(iterations=2000, thread_count=1, random_seed=seed, verbose=False, early_stopping_rounds=PATIENCE, cat_features=t.cats,
                 allow_writing_files=False)
    model.fit(_named_gaps(t, 'train'), t.y('train'), eval_set=(_named_gaps(t, 'valid'),t.y('valid')))
    return outputs(model, t, _named_gaps(t, 'test'))


def random_forest(t:Table, seed:int) -> np.ndarray:
    x = lambda split: coded(t, split, categories=False).fillna(-999)
    if t.task=='reg': model = RandomForestRegressor(300, min_samples_leaf=2, max_features=.5, n_jobs=1, random_state=seed)
    else: model = RandomForestClassifier(300, n_jobs=1, random_state=seed)
    return outputs(model.fit(x('train'), codes_of(t, 'train')), t, x('test'))


class _Stub(types.ModuleType):
    "A module that has every name"
    __path__ = ()
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        return type(name, (), {})

def import_package(name:str):
    "Import an optional package"
    # What pytabkit imports asks for torchvision and uses none of it; a build that does not fit torch would stop it
    if name=='pytabkit' and 'torchvision' not in sys.modules:
        stubs = ['torchvision',*(f'torchvision.{part}' for part in ('models','ops','transforms','transforms.functional'))]
        sys.modules.update({n: _Stub(n) for n in stubs})
    return import_module(name)


def _filled(t, splits):
    "Return columns without gaps: a category of their own, and medians of the training rows"
    x = pd.concat([_named_gaps(t, s) for s in splits], ignore_index=True)
    medians = t.x('train')[t.conts].median()
    return x.astype(dict.fromkeys(t.cats, 'category')).fillna(medians)

def _pytabkit(t, seed, name):
    make = getattr(import_package('pytabkit'), f'{name}_{"Regressor" if t.task=="reg" else "Classifier"}')
    model = make(device='cpu', random_state=seed, n_cv=1, n_refit=0, verbosity=0, n_threads=1,
                 val_metric_name='rmse' if t.task=='reg' else 'cross_entropy')      # its default for classes is the share of errors
    n,y = len(t.y('train')),np.concatenate([t.y('train'), t.y('valid')])
    y = y.astype(float if t.task=='reg' else str)
    model.fit(_filled(t, ['train','valid']), y, val_idxs=np.arange(n, len(y)))
    return outputs(model, t, _filled(t, ['test']))

def realmlp(t:Table, seed:int) -> np.ndarray: return _pytabkit(t, seed, 'RealMLP_TD')

def tabm(t:Table, seed:int) -> np.ndarray: return _pytabkit(t, seed, 'TabM_D')
