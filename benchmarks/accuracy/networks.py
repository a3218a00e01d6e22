"fastai's tabular model, what the package adds to it, and TabM, all trained by a fastai Learner"
import io, tempfile
from contextlib import redirect_stdout
from functools import partial
import numpy as np, pandas as pd, torch
from fastai.callback.core import CancelValidException
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.tabular.all import (Callback, Categorify, CategoryBlock, Learner, Normalize, OptimWrapper, RegressionBlock, TabularPandas,
                                get_emb_sz, set_seed)
from rtdl_num_embeddings import PiecewiseLinearEmbeddings
from torch import nn
from fastai_dropconnect.all import *
from .spaces import Fitted, Limits
from .tables import Table

BATCH = 256


class SkipValidation(Callback):
    "Epochs without validation: after all that other callbacks do there"
    order = 1000
    def before_validate(self): raise CancelValidException()


class Scaler:
    "Targets of a regression as the network sees them: mean 0, standard deviation 1; those of classes stay"
    def __init__(self, table, rows):
        y = rows[table.target]
        self.mean,self.sd = (0., 1.) if table.classes else (float(y.mean()), float(y.std()) or 1.)
        self.y_range = (float(y.min())-self.mean)/self.sd-.2,(float(y.max())-self.mean)/self.sd+.2      # a little more than there is
    def apply(self, table, rows):
        return rows if table.classes else rows.assign(**{table.target: ((rows[table.target]-self.mean)/self.sd).astype('float32')})


def network_dls(
    table:Table,
    rows:pd.DataFrame, # Training rows
    quantile:bool, # Continuous columns by their ranks?
    valid:pd.DataFrame=None # Validation rows, if there are some
):
    "`DataLoaders`, encoded with what the training rows know"
    df = rows if valid is None else pd.concat([rows, valid], ignore_index=True)
    splits = list(range(len(rows))),list(range(len(rows), len(df)))
    procs = [Categorify, FillMissingAnywhere, QuantileNormalize if quantile else Normalize]
    block = CategoryBlock([0,1]) if table.classes else RegressionBlock()
    to = TabularPandas(df[[*table.cats, *table.conts, table.target]], procs, list(table.cats), list(table.conts), table.target, block, splits, reduce_memory=False)
    return sales_dls(to, BATCH, device='cpu')


def learner_predict(learn, table:Table, scaler:Scaler, rows:pd.DataFrame) -> np.ndarray:
    "Numbers, or probabilities of 1, for rows whose target is not used"
    dl = learn.dls.test_dl(rows[[*table.cats, *table.conts]].copy(), bs=1024)
    with learn.no_bar(): preds = learn.get_preds(dl=dl)[0].double().numpy()
    return preds[:,1] if table.classes else preds[:,0]*scaler.sd+scaler.mean


def tensor_bytes(model:nn.Module) -> int: return sum(t.nbytes for t in model.state_dict().values())


def one_cycle(learn, p, limits, seed):
    learn.fit_one_cycle(min(p['epochs'], limits.epochs), p['lr'], wd=p['wd'])

def zero_restarts(learn, p, limits, seed):
    cycle_len = min(p['cycle_len'], limits.epochs)
    learn.fit_zero_restarts(min(p['n_cycles'], limits.epochs//cycle_len), cycle_len, p['lr'], p['sparsity'], p['embed_sparsity'], seed=seed, wd=p['wd'])


def fit_network(
    table:Table,
    rows:pd.DataFrame, # Training rows
    p:dict, # Hyperparameters
    seed:int,
    limits:Limits,
    valid:pd.DataFrame=None, # Not used: nothing is stopped early
    arguments=lambda p: {}, # Arguments of `tabular_learner` from `p`
    train=one_cycle # How to train
) -> Fitted:
    "Train a tabular Learner"
    set_seed(seed)
    scaler = Scaler(table, rows)
    dls = network_dls(table, scaler.apply(table, rows), p['quantile'])
    args = arguments(p) | ({} if table.classes else dict(y_range=scaler.y_range))
    if p.get('num_embed_dim'): args['config'] = args.get('config', {}) | dict(num_embeddings='ple', num_embed_dim=p['num_embed_dim'], bins=p['bins'])
    if (config := args.get('config')) and is_dropconnect_config(config): args['config'] = tabular_dropconnect_config(**{'weight_p': 0.} | config)
    learn = tabular_learner(dls, layers=[int(n) for n in p['layers'].split(',')], **args)
    learn.add_cb(SkipValidation())
    with learn.no_bar(), learn.no_logging(): train(learn, p, limits, seed)
    learn.remove_cb(SkipValidation)
    return Fitted(partial(learner_predict, learn, table, scaler), tensor_bytes(learn.model)*kept_networks(learn))


class TabMNet(nn.Module):
    "The package tabm's TabM as fastai calls it; the mean of the members in eval"
    def __init__(self, model, average:str): super().__init__(); self.model,self.average = model,average
    def forward(self, x_cat, x_cont=None):
        args = dict(x_cat=x_cat) if x_cat.shape[1] else {}
        if x_cont is not None and x_cont.shape[1]: args['x_num'] = x_cont
        x = self.model(**args)
        return x if self.training else average_members(x, self.average)


def tabm_model(dls, table, p):
    "TabM with its own defaults where nothing is searched"
    from tabm import TabM       # optional
    args = {}
    if p.get('num_embed_dim') and dls.cont_names:
        bins = quantile_bins(dls.train_ds.conts.to_numpy('float32'), p['bins'])
        args['num_embeddings'] = PiecewiseLinearEmbeddings(bins, p['num_embed_dim'], activation=False, version='B')
    cards = [n for n,_ in get_emb_sz(dls.train_ds, {})]
    return TabM.make(n_num_features=len(dls.cont_names), cat_cardinalities=cards, d_out=2 if table.classes else 1,
                     n_blocks=p['n_blocks'], d_block=p['d_block'], dropout=p['dropout'], **args)


PATIENCE,MAX_EPOCHS = 16,200

def fit_tabm(
    table:Table,
    rows:pd.DataFrame, # Training rows
    p:dict, # Hyperparameters
    seed:int,
    limits:Limits,
    valid:pd.DataFrame=None # If given, stop early on them and find the number of epochs
) -> Fitted:
    "Train TabM as its authors do: AdamW, a constant learning rate, early stopping"
    set_seed(seed)
    scaler = Scaler(table, rows)
    dls = network_dls(table, scaler.apply(table, rows), p['quantile'], None if valid is None else scaler.apply(table, valid))
    loss = dls.train_ds.loss_func
    with tempfile.TemporaryDirectory() as tmp:
        learn = Learner(dls, TabMNet(tabm_model(dls, table, p), average_for(loss)), EnsembleLoss(loss), path=tmp,
                        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
        stop = [SkipValidation()] if valid is None else [EarlyStoppingCallback(patience=PATIENCE), SaveModelCallback()]
        epochs = p['epochs'] if 'epochs' in p else MAX_EPOCHS
        with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()): learn.fit(min(epochs, limits.epochs), p['lr'], wd=p['wd'], cbs=stop)
    found = {} if valid is None else dict(epochs=int(np.argmin([v[1] for v in learn.recorder.values]))+1)
    return Fitted(partial(learner_predict, learn, table, scaler), tensor_bytes(learn.model), found)
