"Networks: recipes of the package, trained with given hyperparameters"
from functools import partial
import numpy as np, pandas as pd
from fastai.callback.core import CancelValidException
from fastai.tabular.all import Callback, Categorify, CategoryBlock, Normalize, RegressionBlock, TabularPandas, set_seed
from torch import nn
from fastai_dropconnect.all import *
from fastai_dropconnect.compare import kept_networks
from .spaces import Fitted, Limits
from .tables import Table

BATCH = 256


class SkipValidation(Callback):
    "Skip the validation of each epoch, after other callbacks have done their part"
    order = 1000
    def before_validate(self): raise CancelValidException()


class Scaler:
    "Scale the targets of a regression to mean 0 and standard deviation 1; leave classes alone"
    def __init__(self, table, rows):
        y = rows[table.target]
        self.mean,self.sd = (0., 1.) if table.classes else (float(y.mean()), float(y.std()) or 1.)
        self.y_range = (float(y.min())-self.mean)/self.sd-.2,(float(y.max())-self.mean)/self.sd+.2      # a little wider than the targets
    def apply(self, table, rows):
        return rows if table.classes else rows.assign(**{table.target: ((rows[table.target]-self.mean)/self.sd).astype('float32')})


def network_dls(
    table:Table,
    rows:pd.DataFrame, # Training rows
    quantile:bool, # Use `QuantileNormalize` for the continuous columns?
    valid:pd.DataFrame=None # Validation rows, if there are any
):
    "Make `DataLoaders`, encoded with the training rows only"
    df = rows if valid is None else pd.concat([rows, valid], ignore_index=True)
    splits = list(range(len(rows))),list(range(len(rows), len(df)))
    procs = [Categorify, FillMissingAnywhere, QuantileNormalize if quantile else Normalize]
    block = CategoryBlock([0,1]) if table.classes else RegressionBlock()
    to = TabularPandas(df[[*table.cats, *table.conts, table.target]], procs, list(table.cats), list(table.conts), table.target, block, splits, reduce_memory=False)
    return tabular_dls(to, BATCH, device='cpu')


def learner_predict(learn, table:Table, scaler:Scaler, rows:pd.DataFrame) -> np.ndarray:
    "Predict numbers, or probabilities of class 1, without using the targets of `rows`"
    dl = learn.dls.test_dl(rows[[*table.cats, *table.conts]].copy(), bs=1024)
    with learn.no_bar(): preds = learn.get_preds(dl=dl)[0].double().numpy()
    return preds[:,1] if table.classes else preds[:,0]*scaler.sd+scaler.mean


def tensor_bytes(model:nn.Module) -> int: return sum(t.nbytes for t in model.state_dict().values())


def settings_of(
    p:dict, # Hyperparameters
    limits:Limits
) -> dict: # Settings that every family has
    "Return weight decay, the embedding of numbers if there is one, and cycles within the limits"
    settings = dict(wd=p['wd'])
    if p.get('num_embed_dim'): settings['num_embeddings'] = PLE(p['num_embed_dim'], p['bins'])
    if 'n_cycles' in p:
        cycle_len = min(p['cycle_len'], limits.epochs)
        settings |= dict(cycle_len=cycle_len, n_cycles=min(p['n_cycles'], limits.epochs//cycle_len))
    return settings


def no_settings(p): return {}

def fit_network(
    table:Table,
    rows:pd.DataFrame, # Training rows
    p:dict, # Hyperparameters
    seed:int,
    limits:Limits,
    valid:pd.DataFrame=None, # Not used: nothing is stopped early
    recipe='fastai', # Name of the recipe
    settings=no_settings # From the hyperparameters to settings of the recipe
) -> Fitted:
    "Train a recipe with hyperparameters"
    set_seed(seed)
    scaler = Scaler(table, rows)
    dls = network_dls(table, scaler.apply(table, rows), p['quantile'])
    made = RECIPES[recipe].replace(**settings_of(p, limits), **settings(p))
    if 'n_cycles' in p: made = made.replace(seed=seed)      # for the zeros
    y_range = {} if table.classes else dict(y_range=scaler.y_range)
    learn = made.learner(dls, layers=[int(n) for n in p['layers'].split(',')], **y_range)
    learn.add_cb(SkipValidation())
    epochs = min(p.get('epochs', 1), limits.epochs)      # zero restarts train for `n_cycles*cycle_len` epochs instead
    with learn.no_bar(), learn.no_logging(): made.train(learn, epochs, p['lr'])
    learn.remove_cb(SkipValidation)
    return Fitted(partial(learner_predict, learn, table, scaler), tensor_bytes(learn.model)*kept_networks(learn))
