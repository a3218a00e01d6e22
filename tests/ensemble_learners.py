"Small Learners and models for the tests of ensembles"
import torch
import torch.nn.functional as F
from fastai.tabular.all import Callback, DataLoaders, Learner, ProgressCallback, noop, set_seed
from fastcore.foundation import L
from torch import nn
from torch.utils.data import TensorDataset
from conftest import make_dls
from fastai_dropconnect.all import tabular_learner
from fastai_dropconnect.ensemble.averaging import average_for, average_members, stack_members


def data(n=96, bs=16, target=None, shuffle=True):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g)
    ds = TensorDataset(x, x.prod(1, keepdim=True)+x[:,:1] if target is None else target(x))
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=(shuffle,False), device='cpu', num_workers=0)

def make_model(n_out=1): return nn.Sequential(nn.Linear(4,12), nn.Tanh(), nn.BatchNorm1d(12), nn.Linear(12,8), nn.Tanh(), nn.Linear(8,n_out))
def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def make_learn(*cbs, seed=0, dls=None, model=None, loss_func=F.mse_loss, path=None, **kw):
    set_seed(seed)
    return quiet(Learner(dls or data(), model or make_model(), loss_func, cbs=L(cbs), path=path, **kw))

def tabular(target='y', df=None, seed=0, **kw):
    set_seed(seed)
    return quiet(tabular_learner(make_dls(df, target), layers=[20,10], **kw))

def classes(x): return (x[:,0]>0).long()+(x[:,1]>0)
def ensemble(learn): return learn.snapshot_ensemble
def hidden(learn): return [learn.model[i].weight for i in (0,3)]
def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)
def preds(learn, **kw): return learn.get_preds(**kw)[0]
def members(learn): return [ensemble(learn).record[c] for c in ensemble(learn).record]

class StopAt(Callback):
    "Raise `error` in the first batch of `epoch`"
    def __init__(self, epoch, error=KeyboardInterrupt): self.at,self.error = epoch,error
    def after_batch(self):
        if self.learn.training and self.learn.epoch==self.at: raise self.error


class Two(nn.Module):
    def __init__(self): super().__init__(); self.body = make_model(2)
    def forward(self, x): return self.body(x).split(1, 1)

def two_outputs(): return make_learn(model=Two(), loss_func=lambda p,y: F.mse_loss(p[0], y)+F.mse_loss(p[1], -y))


def average(outs, loss_func):
    "Average the outputs of members as the loss wants it"
    out_shape = outs[0].shape[1:] if torch.is_tensor(outs[0]) else None
    return average_members(stack_members(outs), *(average_for(loss_func, out_shape) if out_shape is not None else ('mean',-1)))
