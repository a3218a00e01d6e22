"TabM (arXiv 2410.24210, the package tabm), trained by a fastai Learner as its authors train it"
import io, tempfile
from contextlib import redirect_stdout
from functools import partial
import numpy as np, pandas as pd, torch
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.tabular.all import Learner, OptimWrapper, get_emb_sz, set_seed
from rtdl_num_embeddings import PiecewiseLinearEmbeddings
from torch import nn
from torch.nn import functional as F
from fastai_dropconnect.ensemble.averaging import EnsembleLoss, average_for, average_members
from fastai_dropconnect.tabular.embeddings import quantile_bins
from .networks import Scaler, SkipValidation, learner_predict, network_dls, tensor_bytes
from .spaces import Fitted, Limits
from .tables import Table


def first_layer(
    layer, # `tabm.LinearBatchEnsemble` for numbers beside one-hot columns
    x_num, # Numbers, shape (batch, numbers)
    ones # Positions of the ones in the input, shape (batch, categorical columns)
): # Shape (batch, members, features)
    """Compute TabM's first layer without the zeros of its one-hot input (equation 5 of BatchEnsemble, arXiv 2002.06715)

    The result equals `layer` on the whole input. The thousands of columns of zeros, which take most of the time of a step on
    bulldozers, are neither made nor multiplied.
    """
    n = x_num.shape[1]
    x = torch.einsum('bck,bcd->bkd', F.embedding(ones, layer.r.T), F.embedding(ones, layer.weight.T))
    x = x+(x_num[:,None]*layer.r[:,:n]) @ layer.weight[:,:n].T
    return x*layer.s+layer.bias


class TabMNet(nn.Module):
    "TabM of the package tabm, called as fastai calls a model; returns the mean of the members in eval"
    def __init__(self, model, cards, average:str):
        super().__init__()
        self.model,self.average = model,average
        n_num = model.backbone.blocks[0][0].in_features-sum(cards)
        self.register_buffer('starts', n_num+torch.tensor([0, *cards[:-1]]).cumsum(0), persistent=False)

    def members(self, x_cat, x_cont):
        "Return what `model` does, shape (batch, members, outputs)"
        m = self.model
        if not x_cat.shape[1]: return m(x_cont)
        x_num = m.num_module(x_cont).flatten(1) if m.num_module is not None else x_cont
        (linear,*after),*blocks = m.backbone.blocks
        x = first_layer(linear, x_num, x_cat+self.starts)
        for layer in (*after, *blocks, m.output): x = layer(x)
        return x

    def forward(self, x_cat, x_cont):
        x = self.members(x_cat, x_cont)
        return x if self.training else average_members(x, self.average)


def tabm_net(dls, table, p):
    "Make TabM, with its own defaults for what is not searched"
    from tabm import TabM       # optional
    args = {}
    if p.get('num_embed_dim') and dls.cont_names:
        bins = quantile_bins(dls.train_ds.conts.to_numpy('float32'), p['bins'])
        args['num_embeddings'] = PiecewiseLinearEmbeddings(bins, p['num_embed_dim'], activation=False, version='B')
    cards = [n for n,_ in get_emb_sz(dls.train_ds, {})]
    model = TabM.make(n_num_features=len(dls.cont_names), cat_cardinalities=cards, d_out=2 if table.classes else 1,
                      n_blocks=p['n_blocks'], d_block=p['d_block'], dropout=p['dropout'], **args)
    return TabMNet(model, cards, average_for(dls.train_ds.loss_func)[0])


PATIENCE,MAX_EPOCHS = 8,64      # the authors' patience is 16; twice the epochs that other networks may have in one cycle

def fit_tabm(
    table:Table,
    rows:pd.DataFrame, # Training rows
    p:dict, # Hyperparameters
    seed:int,
    limits:Limits,
    valid:pd.DataFrame=None # If given, early stopping on these rows finds the number of epochs
) -> Fitted:
    "Train TabM as its authors do: AdamW, a constant learning rate, early stopping"
    set_seed(seed)
    scaler = Scaler(table, rows)
    dls = network_dls(table, scaler.apply(table, rows), p['quantile'], None if valid is None else scaler.apply(table, valid))
    loss = dls.train_ds.loss_func
    with tempfile.TemporaryDirectory() as tmp:
        learn = Learner(dls, tabm_net(dls, table, p), EnsembleLoss(loss), path=tmp,
                        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
        stop = [SkipValidation()] if valid is None else [EarlyStoppingCallback(patience=PATIENCE), SaveModelCallback()]
        epochs = p['epochs'] if 'epochs' in p else MAX_EPOCHS
        with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()): learn.fit(min(epochs, limits.epochs), p['lr'], wd=p['wd'], cbs=stop)
    found = {} if valid is None else dict(epochs=int(np.argmin([v[1] for v in learn.recorder.values]))+1)
    return Fitted(partial(learner_predict, learn, table, scaler), tensor_bytes(learn.model), found)
