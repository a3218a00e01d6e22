"Plain fastai, and the one call of this package"
import inspect
from functools import cache
import numpy as np, pandas as pd
from fastai.tabular.all import CategoryBlock, Categorify, FillMissing, Normalize, RegressionBlock, TabularPandas, set_seed, tabular_learner
from fastai_dropconnect import estimators
from .outsiders import outputs
from .tables import Table

BATCH,EPOCHS = 256,5


class _Scaler:
    "Scale the targets of a regression to mean 0 and standard deviation 1"
    def __init__(self, t):
        y = t.y('train').astype(float) if t.task=='reg' else np.array([0., 1.])
        self.mean,self.sd = (y.mean(),y.std(ddof=1)) if t.task=='reg' else (0., 1.)
        width = .05*(y.max()-y.min())
        self.y_range = (float(y.min()-width-self.mean)/self.sd, float(y.max()+width-self.mean)/self.sd) if t.task=='reg' else None


def _rows(t, split, medians):
    "Return rows with targets for fastai, which wants text for categories, and no gap where the training rows have none"
    df = t.part(split)
    for c in t.cats: df[c] = df[c].astype(object).where(df[c].notna(), '#na#').astype(str)
    return df.fillna(medians).drop(columns='split')

def _loaders(t, scaler, train, valid):
    df = pd.concat([train, valid], ignore_index=True)
    if t.task=='reg': df['target'] = ((df.target.astype(float)-scaler.mean)/scaler.sd).astype('float32')
    block = RegressionBlock(n_out=1) if t.task=='reg' else CategoryBlock(vocab=t.classes)
    splits = list(range(len(train))),list(range(len(train), len(df)))
    return TabularPandas(df, [Categorify, FillMissing, Normalize], t.cats, t.conts, 'target', block, splits).dataloaders(bs=BATCH)

def fastai(t:Table, seed:int) -> np.ndarray:
    "Train fastai's network as its documentation does, on scaled targets: 5 epochs of one cycle"
    set_seed(seed, True)
    whole = [c for c in t.conts if t.part('train')[c].notna().all()]
    medians = t.part('train')[whole].median()
    train,valid,test = [_rows(t, s, medians) for s in ('train','valid','test')]
    scaler = _Scaler(t)
    n_out = 1 if t.task=='reg' else len(t.classes)
    learn = tabular_learner(_loaders(t, scaler, train, valid), layers=[200,100], n_out=n_out, y_range=scaler.y_range)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(EPOCHS, 1e-2)
        preds = learn.get_preds(dl=learn.dls.test_dl(test.drop(columns='target')))[0].double().numpy()
    return preds[:,0]*scaler.sd+scaler.mean if t.task=='reg' else preds


@cache
def compile_kernels():
    "Compile what the first fit of a process would wait for"
    rng = np.random.default_rng(0)
    estimators.DropConnectRegressor(budget='quick', time_limit=1, random_state=0, verbose=0, device='cpu').fit(rng.normal(size=(90, 3)), rng.normal(size=90))


def takes(argument:str) -> bool:
    "Do the estimators have this argument?"
    return argument in inspect.signature(estimators.DropConnectRegressor).parameters

def fitted(t:Table, seed:int, **settings):
    "Fit the estimator, with the validation rows as `eval_set`"
    make = estimators.DropConnectRegressor if t.task=='reg' else estimators.DropConnectClassifier
    y = lambda split: t.y(split).astype(float) if t.task=='reg' else t.y(split).astype(str)
    model = make(random_state=seed, verbose=0, device='cpu', **settings)
    model.fit(t.x('train'), y('train'), eval_set=(t.x('valid'),y('valid')))
    return model

def one_call(t:Table, seed:int, **settings) -> np.ndarray:
    "Fit the estimator and predict the test rows"
    return outputs(fitted(t, seed, **settings), t, t.x('test'))
