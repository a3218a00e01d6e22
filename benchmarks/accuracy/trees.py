"Gradient boosting and forests on encoded columns, missing values included"
import pickle
from functools import partial
import numpy as np, pandas as pd
from fastai.tabular.all import Categorify, TabularPandas
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from .spaces import Fitted, Limits
from .tables import Table

PATIENCE = 100     # Boosting stops after this many trees without a better validation score


class Encoder:
    "Encode categories as codes (0: unseen or missing), and keep numbers with their NaN"
    def __init__(self, table, rows, native:bool=False):
        self.table,self.native = table,native
        self.to = TabularPandas(self._columns(rows), [Categorify], list(table.cats), list(table.conts), do_setup=True, reduce_memory=False)
    def _columns(self, rows): return rows[[*self.table.cats, *self.table.conts]].copy()
    def __call__(self, rows):
        to = self.to.new(self._columns(rows))
        to.process()
        types = {c: pd.CategoricalDtype(range(len(self.to.classes[c]))) if self.native else int for c in self.table.cats}
        return to.xs.astype({c: 'float64' for c in self.table.conts} | types)


def predict(model, encode, table:Table, rows:pd.DataFrame) -> np.ndarray:
    "Predict numbers, or probabilities of class 1"
    x = encode(rows)
    return model.predict_proba(x)[:,1] if table.classes else np.asarray(model.predict(x), dtype=float)

def _fitted(model, encode, table, **found): return Fitted(partial(predict, model, encode, table), len(pickle.dumps(model)), found)

def _trees(p, limits): return min(p.get('trees', limits.trees), limits.trees)


def fit_lightgbm(table:Table, rows, p:dict, seed:int, limits:Limits, valid=None) -> Fitted:
    import lightgbm as lgb
    encode = Encoder(table, rows, p['native_categories'])
    make = lgb.LGBMClassifier if table.classes else lgb.LGBMRegressor
    model = make(n_estimators=_trees(p, limits), learning_rate=p['lr'], num_leaves=p['leaves'], min_child_samples=p['min_rows'], subsample=p['subsample'],
                 subsample_freq=1, colsample_bytree=p['columns'], reg_lambda=p['l2'], random_state=seed, n_jobs=1, verbose=-1,
                 metric=table.metric)
    stop = {} if valid is None else dict(eval_X=encode(valid), eval_y=valid[table.target], callbacks=[lgb.early_stopping(PATIENCE, verbose=False)])
    model.fit(encode(rows), rows[table.target], **stop)
    return _fitted(model, encode, table, **({} if valid is None else dict(trees=model.best_iteration_ or model.n_estimators)))


def fit_xgboost(table:Table, rows, p:dict, seed:int, limits:Limits, valid=None) -> Fitted:
    import xgboost as xgb
    encode = Encoder(table, rows, p['native_categories'])
    make = xgb.XGBClassifier if table.classes else xgb.XGBRegressor
    model = make(n_estimators=_trees(p, limits), learning_rate=p['lr'], max_depth=p['depth'], min_child_weight=p['min_weight'], subsample=p['subsample'],
                 colsample_bytree=p['columns'], reg_lambda=p['l2'], random_state=seed, n_jobs=1, tree_method='hist', enable_categorical=True,
                 eval_metric=table.metric, early_stopping_rounds=None if valid is None else PATIENCE)
    stop = {} if valid is None else dict(eval_set=[(encode(valid), valid[table.target])])
    model.fit(encode(rows), rows[table.target], verbose=False, **stop)
    return _fitted(model, encode, table, **({} if valid is None else dict(trees=model.best_iteration+1)))


def fit_catboost(table:Table, rows, p:dict, seed:int, limits:Limits, valid=None) -> Fitted:
    import catboost as cb
    encode = Encoder(table, rows)
    make = cb.CatBoostClassifier if table.classes else cb.CatBoostRegressor
    model = make(iterations=_trees(p, limits), learning_rate=p['lr'], depth=p['depth'], l2_leaf_reg=p['l2'], bagging_temperature=p['bagging'],
                 random_strength=p['noise'], bootstrap_type='Bayesian', eval_metric=table.metric.upper(), cat_features=list(table.cats), random_seed=seed, thread_count=1,
                 allow_writing_files=False, verbose=False)
    stop = {} if valid is None else dict(eval_set=(encode(valid), valid[table.target]), early_stopping_rounds=PATIENCE)
    model.fit(encode(rows), rows[table.target], **stop)
    return _fitted(model, encode, table, **({} if valid is None else dict(trees=model.tree_count_)))


def _fit_forest(regressor, classifier, table:Table, rows, p:dict, seed:int, limits:Limits, valid=None) -> Fitted:
    encode = Encoder(table, rows)
    make = classifier if table.classes else regressor
    model = make(min(p['trees'], limits.trees), min_samples_leaf=p['min_rows'], max_features=p['columns'], n_jobs=1, random_state=seed)
    return _fitted(model.fit(encode(rows), rows[table.target]), encode, table)

fit_random_forest = partial(_fit_forest, RandomForestRegressor, RandomForestClassifier)
fit_extra_trees = partial(_fit_forest, ExtraTreesRegressor, ExtraTreesClassifier)
