"What `ZeroRestarts` and `SnapshotEnsemble` promise: exact zeros that may grow back, snapshots that last, and predictions that are their average"
import contextlib, os, subprocess, sys, textwrap
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple
import numpy as np, pandas as pd, pickle, pytest, torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.callback.rnn import ModelResetter
from fastai.tabular.all import (Adam, BCEWithLogitsLossFlat, Callback, CancelEpochException, CancelFitException, CancelTrainException, CSVLogger, CrossEntropyLossFlat,
                                DataLoaders, F1Score, Learner, LabelSmoothingCrossEntropyFlat, Metric, ProgressCallback, R2Score, get_model, SaveModelCallback, SGD, accuracy,
                                load_learner, mae, noop, params, ranger, set_seed)
from fastcore.foundation import L
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import TensorDataset
from conftest import make_dls, make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.zero_restarts import cosine_cycles
from fastai_dropconnect.checks import check_lr
from fastai_dropconnect.ensemble.averaging import mean_prediction, outputs_mean, prediction_mean, sigmoid_mean, softmax_mean
from fastai_dropconnect.nn_utils import model_tensors, load_state_

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


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

class Zeros(Callback):
    "Counts of zeros at the beginning of each epoch, and of the weights' first step"
    order = ZeroRestarts.order+1
    def before_fit(self): self.counts,self.masks = [],[]
    def before_train(self):
        ps = dict(get_model(self.learn.model).named_parameters())
        self.counts.append({n:(p==0).sum().item() for n,p in ps.items() if p.dim()>1})
        self.masks.append({n:(p==0) for n,p in ps.items() if p.dim()>1})

class StopAt(Callback):
    "Raise `error` in the first batch of `epoch`"
    def __init__(self, epoch, error=KeyboardInterrupt): self.at,self.error = epoch,error
    def after_batch(self):
        if self.learn.training and self.learn.epoch==self.at: raise self.error

# Zeros

def test_exact_counts_at_each_restart_but_the_first_and_all_grow_back():
    learn = make_learn(zeros := Zeros())
    learn.fit_zero_restarts(3, 2, sparsity=.25)
    want = {'0.weight': 12, '3.weight': 24, '5.weight': 0}
    assert zeros.counts == [dict.fromkeys(want, 0)]*2 + [want, dict.fromkeys(want, 0)]*2
    assert all((w!=0).all() for w in hidden(learn))
    assert all((w!=0).all() for s in members(learn) for w in s.values() if w.dim()>1)


def test_embeddings_get_a_share_of_their_own_and_the_output_none():
    learn = tabular()
    learn.add_cb(zeros := Zeros())
    learn.fit_zero_restarts(2, 1, sparsity=.3, embed_sparsity=.5)
    size = {n:p.numel() for n,p in learn.model.named_parameters()}
    assert any('embeds' in n for n in zeros.counts[1])
    for n,c in zeros.counts[1].items(): assert c == round(size[n]*(.5 if 'embeds' in n else .3 if not n.startswith('layers.2') else 0)), n


def test_a_model_of_embeddings_alone():
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=r.integers(0, 20, 300), item=r.integers(0, 15, 300), rating=r.integers(1, 6, 300).astype('float32')))
    set_seed(0)
    learn = quiet(collab_learner(CollabDataLoaders.from_df(df, bs=32), n_factors=8, y_range=(0,6)))
    learn.add_cb(zeros := Zeros())
    learn.fit_zero_restarts(2, 1, embed_sparsity=.25)
    assert [zeros.counts[1][f'{k}_weight.weight'] for k in 'ui'] == [round(.25*p.weight.numel()) for p in (learn.model.u_weight, learn.model.i_weight)]
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0))


def test_draws_come_from_the_seed_and_differ_from_cycle_to_cycle():
    def draw(seed, cb_seed):
        learn = make_learn(zeros := Zeros(), seed=seed)
        learn.fit_zero_restarts(3, 1, seed=cb_seed)
        return [m['3.weight'] for m in zeros.masks[1:]]
    eq = lambda xs,ys: all(torch.equal(x, y) for x,y in zip(xs, ys))
    a = draw(0, 7)
    assert not torch.equal(*a)
    assert eq(a, draw(1, 7)) and not eq(a, draw(0, 8)) and not eq(a[:1], draw(0, 8)[1:])
    assert eq(draw(3, None), draw(3, None)) and not eq(draw(3, None), draw(4, None))


def test_a_frozen_part_is_left_alone():
    learn = make_learn(zeros := Zeros(), splitter=lambda m: [params(m[:2]), params(m[2:])])
    learn.freeze()
    before = learn.model[0].weight.detach().clone()
    learn.fit_zero_restarts(2, 1)
    assert zeros.counts[1] == {'0.weight': 0, '3.weight': 29, '5.weight': 0} and torch.equal(learn.model[0].weight, before)
    learn.unfreeze()
    learn.fit_zero_restarts(2, 1, lr_max=slice(1e-3, 1e-2))
    assert zeros.counts[1]['0.weight'] == 14


def test_other_layers_and_values():
    learn = make_learn(zeros := Zeros())
    learn.fit_zero_restarts(2, 1, sparsity={'3': .5, '5': .25})
    assert zeros.counts[1] == {'0.weight': 0, '3.weight': 48, '5.weight': 2}
    learn.fit_zero_restarts(2, 1, sparsity=.5, layers=['0'])
    assert zeros.counts[1] == {'0.weight': 24, '3.weight': 0, '5.weight': 0}


def test_without_zeros_nothing_is_drawn():
    a = make_learn()
    a.fit_zero_restarts(3, 1, sparsity=0, embed_sparsity=0, seed=1)
    assert len(ensemble(a).record)==3
    b = make_learn()
    b.create_opt()
    b.opt.set_hyper('lr', 1e-2)
    b.fit(3, cbs=ParamScheduler({'lr': cosine_cycles(1e-2, 3)}))
    assert same(state(a), state(b))


@pytest.mark.parametrize('opt', [Adam, SGD, ranger], ids=['Adam','SGD','ranger'])
def test_the_optimizer_remembers_all_but_the_slow_copies(opt):
    class State(Callback):
        order = ZeroRestarts.order+1
        def before_train(self):
            if self.epoch==1: self.state = deepcopy(self.learn.opt.state_dict())
    class End(Callback):
        def after_train(self):
            if self.epoch==0: self.state = deepcopy(self.learn.opt.state_dict())
    learn = make_learn(s := State(), e := End(), opt_func=opt, seed=0)
    learn.fit_zero_restarts(2, 1, lr_max=1e-2)
    for a,b in zip(s.state['state'], e.state['state']): assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    if opt is ranger: assert [(w==0).sum().item() for w in s.state['slow_weights'][0] if w.dim()>1] == [14, 29, 0]


def test_bars_and_logging_make_no_difference():
    learn = make_learn(metrics=mae)
    with learn.no_mbar(),learn.no_logging(),learn.no_bar(): learn.fit_zero_restarts(2, 1)
    assert list(ensemble(learn).record)==[0,1] and ensemble(learn).use=='average'


def test_the_learning_rate_falls_to_zero_in_each_cycle():
    for n in (1, 3, 7):
        learn = make_learn()
        learn.fit_zero_restarts(n, 2, lr_max=.1)
        lrs = np.array(learn.recorder.hps['lr']).reshape(n, -1)
        assert lrs.shape[1]==12 and np.allclose(lrs[:,0], .1) and (np.diff(lrs)<0).all() and (lrs[:,-1]<.1*.02).all()

# The average

CASES = dict(regression=(None, F.mse_loss, 1, noop), softmax=(classes, CrossEntropyLossFlat(), 3, partial(torch.softmax, dim=1)),
             smoothed=(classes, LabelSmoothingCrossEntropyFlat(), 3, partial(torch.softmax, dim=1)),
             sigmoid=(lambda x: (x[:,:3]>0).float(), BCEWithLogitsLossFlat(), 3, torch.sigmoid))

@pytest.mark.parametrize('target,loss,n_out,act', CASES.values(), ids=CASES)
def test_predictions_are_the_mean_of_the_members_own(target, loss, n_out, act):
    learn = make_learn(dls=data(target=target), model=make_model(n_out), loss_func=loss)
    learn.fit_zero_restarts(3, 1)
    own = []
    for s in members(learn):
        net = make_model(n_out)
        net.load_state_dict(s)
        own.append(act(net.eval()(learn.dls.valid_ds.tensors[0])).detach())
    assert all((a-b).abs().max()>1e-3 for a,b in zip(own, own[1:]))          # members differ
    got,targs = learn.get_preds()
    torch.testing.assert_close(got, torch.stack(own).mean(0))
    each,_ = ensemble(learn).member_preds()
    torch.testing.assert_close(each, torch.stack(own))
    mean,_,spread = ensemble(learn).preds_and_spread()
    torch.testing.assert_close(mean, got)
    torch.testing.assert_close(spread, torch.stack(own).std(0, correction=0))
    for c,o in zip(ensemble(learn).record, own):
        with ensemble(learn).using(c): torch.testing.assert_close(preds(learn), o)
    with ensemble(learn).using('last'): torch.testing.assert_close(preds(learn), own[-1])      # trained to the end: the last snapshot
    assert ensemble(learn).use == 'average'


def test_validate_gives_loss_and_metrics_of_the_average():
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit_zero_restarts(3, 1)
    p,t = learn.get_preds()
    loss,acc = learn.validate()
    assert loss == pytest.approx(F.nll_loss(p.log(), t).item(), abs=1e-5) and acc == pytest.approx((p.argmax(1)==t).float().mean().item())
    per_row = learn.get_preds(with_loss=True)[2]
    torch.testing.assert_close(per_row, F.nll_loss(p.log(), t, reduction='none'), rtol=1e-4, atol=1e-5)
    dec = learn.get_preds(with_decoded=True)[2]
    assert torch.equal(dec, p.argmax(1))


class Two(nn.Module):
    def __init__(self): super().__init__(); self.body = make_model(2)
    def forward(self, x): return self.body(x).split(1, 1)

def two_outputs(): return make_learn(model=Two(), loss_func=lambda p,y: F.mse_loss(p[0], y)+F.mse_loss(p[1], -y))

def test_several_outputs_and_unusual_losses():
    learn = two_outputs()
    learn.fit_zero_restarts(2, 1)
    each = []
    for c in (0,1):
        with ensemble(learn).using(c): each.append(preds(learn))
    for i in (0,1): torch.testing.assert_close(preds(learn)[i], (each[0][i]+each[1][i])/2)


class Pair(NamedTuple):
    out: torch.Tensor
    other: object

FORMS = dict(list=lambda a,b: [a,b], tuple=lambda a,b: (a,b), named=Pair, none=lambda a,b: (a,None), ints=lambda a,b: (a,torch.arange(len(a))), dict=lambda a,b: dict(out=a, other=b))

@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_outputs_of_any_form(form):
    first = lambda p: p['out'] if isinstance(p, dict) else p[0]
    class Form(nn.Module):
        def __init__(self): super().__init__(); self.body = make_model(2)
        def forward(self, x): return form(*self.body(x).split(1, 1))
    learn = make_learn(model=Form(), loss_func=lambda p,y: F.mse_loss(first(p), y))
    learn.fit_zero_restarts(2, 1)
    outs = []
    for s in members(learn):
        net = Form()
        net.load_state_dict(s)
        outs.append(net.eval()(learn.dls.valid_ds.tensors[0]))
    mean = mean_prediction(outs, learn.loss_func)
    assert type(mean) is type(outs[0])
    torch.testing.assert_close(first(mean), (first(outs[0])+first(outs[1]))/2)
    assert learn.validate()[0] == pytest.approx(F.mse_loss(first(mean), learn.dls.valid_ds.tensors[1]).item(), rel=1e-4)


def test_members_of_a_model_with_several_outputs():
    learn = two_outputs()
    learn.fit_zero_restarts(3, 1)
    each,_ = ensemble(learn).member_preds()
    mean,_,spread = ensemble(learn).preds_and_spread()
    for e,m,s,p in zip(each, mean, spread, preds(learn)):
        assert e.shape==(3,96,1)
        torch.testing.assert_close(m, p)
        torch.testing.assert_close(s, e.std(0, correction=0))


class First(Callback):
    "As fastai's `RNNCallback`"
    def after_pred(self): self.learn.pred = self.pred[0]

def test_other_callbacks_change_each_prediction_before_the_mean():
    class More(nn.Module):
        def __init__(self): super().__init__(); self.body = make_model(3)
        def forward(self, x): return self.body(x),x
    learn = make_learn(First(), dls=data(target=classes), model=More(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit_zero_restarts(3, 1)
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0))
    p,t = learn.get_preds()
    loss,acc = learn.validate()
    assert loss == pytest.approx(F.nll_loss(p.log(), t).item(), abs=1e-5) and acc == pytest.approx((p.argmax(1)==t).float().mean().item())
    report = ensemble(learn).report()
    assert report.average_loss.iloc[-1] == pytest.approx(loss, rel=1e-5)
    with ensemble(learn).using('last'): assert learn.validate()[0] == pytest.approx(report.valid_loss.iloc[-1], rel=1e-5)


class Stateful(nn.Module):
    "Goes on from batch to batch where it was"
    def __init__(self, kept=list):
        super().__init__()
        self.kept,self.rnn,self.lin,self.out = kept,nn.GRU(4, 8, batch_first=True),nn.Linear(8, 8),nn.Linear(8, 1)
        self.reset()
    def reset(self): self.hidden = self.kept([None])
    def forward(self, x):
        out,h = self.rnn(x[None], self.hidden[0])
        if self.kept is list: self.hidden[0] = h.detach()       # in place
        else: self.hidden = (h.detach(),)
        return self.out(self.lin(out[0]).tanh())

@pytest.mark.parametrize('kept', [list, tuple])
def test_each_snapshot_has_its_own_hidden_state(kept):
    learn = make_learn(ModelResetter(), model=Stateful(kept), dls=data(shuffle=False))
    learn.fit_zero_restarts(3, 1, lr_max=.05)
    own = []
    for s in members(learn):
        net = Stateful(kept)
        net.load_state_dict(s)
        net.eval()
        with torch.no_grad(): own.append(torch.cat([net(x) for x,_ in learn.dls.valid]))
    torch.testing.assert_close(ensemble(learn).member_preds()[0], torch.stack(own))
    torch.testing.assert_close(preds(learn), torch.stack(own).mean(0))
    loss = [F.mse_loss(o, learn.dls.valid_ds.tensors[1]).item() for o in own]
    assert ensemble(learn).report().valid_loss.tolist() == pytest.approx(loss, rel=1e-4)


def test_the_network_keeps_its_own_hidden_state():
    class Forget(Callback):
        "The network that is validated is not the snapshot"
        order = ZeroRestarts.order+1
        def before_validate(self): self.learn.model.rnn.weight_hh_l0.data.zero_()
    learn = make_learn(ModelResetter(), Forget(), model=Stateful(), dls=data(shuffle=False))
    learn.fit_zero_restarts(2, 1, lr_max=.05)
    with ensemble(learn).using('last'): assert learn.validate()[0] == pytest.approx(ensemble(learn).report().valid_loss.iloc[-1], rel=1e-5)


@given(k=st.integers(1, 6), rows=st.integers(1, 4), n=st.integers(1, 4), scale=st.sampled_from([.1, 1., 40.]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mean_of_probabilities_for_any_logits(k, rows, n, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits = [scale*torch.randn(rows, n, generator=g, dtype=torch.float64) for _ in range(k)]
    for loss,act in ((CrossEntropyLossFlat(), partial(torch.softmax, dim=1)), (BCEWithLogitsLossFlat(), torch.sigmoid)):
        got = mean_prediction(logits, loss)
        assert got.isfinite().all()
        torch.testing.assert_close(act(got), torch.stack([act(l) for l in logits]).mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_full(dtype):
    halves = [torch.full((2,1), v, dtype=dtype) for v in (1., 1., 1.0078125)]
    torch.testing.assert_close(mean_prediction(halves, F.mse_loss), torch.full((2,1), 1+.0078125/3), rtol=1e-7, atol=0)


def test_log_probabilities_stay_log_probabilities():
    logs = [torch.randn(5,3).log_softmax(1) for _ in range(4)]
    torch.testing.assert_close(mean_prediction(logs, nn.NLLLoss()).exp().sum(1), torch.ones(5))


def test_own_loss_functions_are_understood_by_their_activation():
    class Loss:
        def __init__(self, act): self.activation = act
    assert prediction_mean(Loss(partial(torch.softmax, dim=-1)), (8,3)).func is softmax_mean
    assert prediction_mean(Loss(torch.sigmoid), (8,1)) is sigmoid_mean
    assert prediction_mean(Loss(torch.exp), (8,1)) is outputs_mean


def test_buffers_belong_to_a_snapshot():
    learn = make_learn()
    learn.fit_zero_restarts(3, 1)
    means = [s['2.running_mean'] for s in members(learn)]
    assert not torch.equal(means[0], means[1])
    net = make_model()
    net.load_state_dict(members(learn)[0])
    with ensemble(learn).using(0): torch.testing.assert_close(preds(learn), net.eval()(learn.dls.valid_ds.tensors[0]).detach())


@pytest.mark.parametrize('twice', [False, True])
def test_shared_parameters(twice):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,1)
            self.b.weight = self.a.weight
            if twice: self.again = self.a         # a module with two names, as the encoder of fastai's `AWD_LSTM`
        def forward(self, x): return self.out(self.b(self.a(x).tanh()))
    learn = make_learn(model=Tied())
    learn.fit_zero_restarts(2, 1)
    assert learn.model.b.weight is learn.model.a.weight is learn.opt.all_params()[0][0]
    for c,s in ensemble(learn).record.states.items():
        net = Tied()
        load_state_(net, s)
        with ensemble(learn).using(c): torch.testing.assert_close(preds(learn), net(learn.dls.valid_ds.tensors[0]).detach())
    with ensemble(learn).using(1): b = preds(learn)
    with ensemble(learn).using('last'): torch.testing.assert_close(preds(learn), b)


def test_the_weights_average_has_its_own_batch_norm():
    learn = make_learn()
    learn.fit_zero_restarts(3, 1, use='weights')
    e = ensemble(learn)
    assert e.use=='weights'
    torch.testing.assert_close(e.record.weights['3.weight'], torch.stack([s['3.weight'] for s in members(learn)]).mean(0))
    assert not torch.allclose(e.record.weights['2.running_mean'], torch.stack([s['2.running_mean'] for s in members(learn)]).mean(0))
    net = make_model()
    net.load_state_dict(e.record.weights)
    torch.testing.assert_close(preds(learn), net.eval()(learn.dls.valid_ds.tensors[0]).detach())
    assert same(model_tensors(learn.model), members(learn)[-1])              # the network itself is what it was
    e.use = 'average'
    torch.testing.assert_close(preds(learn), e.member_preds()[0].mean(0))

# The table

def test_the_table_shows_each_snapshot_and_the_average():
    learn = make_learn(metrics=mae)
    learn.fit_zero_restarts(3, 2)
    names = learn.recorder.metric_names
    assert list(names) == ['epoch','train_loss','valid_loss','mae','average_loss','average_mae','time']
    rows = pd.DataFrame(list(learn.recorder.values), columns=names[1:-1])
    assert rows.average_loss.isna().tolist() == [True]+[False]*5 and rows.average_loss[2]==rows.average_loss[1]!=rows.average_loss[3]
    assert abs(rows.valid_loss[2]-rows.average_loss[2])>1e-4                 # within a cycle it is the network that is validated
    report = ensemble(learn).report()
    assert report.index.tolist()==[0,1,2] and report.valid_loss.tolist()==rows.valid_loss[1::2].tolist()
    assert report.average_mae.iloc[0] == pytest.approx(report.mae.iloc[0])
    for c in range(3):
        with ensemble(learn).using(c): assert list(learn.validate()) == pytest.approx(report.loc[c, ['valid_loss','mae']].tolist(), rel=1e-4)
    assert list(learn.validate()) == pytest.approx(report.loc[2, ['average_loss','average_mae']].tolist(), rel=1e-4)
    assert len(learn.metrics)==1


class Absolute:
    "A metric's own object, which keeps what it has seen"
    def __init__(self): self.reset()
    def reset(self): self.total,self.n = 0.,0

class Keeps(Metric):
    name = 'keeps'
    def __init__(self, learn): self.kept,self.learn = Absolute(),learn
    def reset(self): self.kept.reset()
    def accumulate(self, learn):
        assert learn is self.learn          # a copy of the metric has no copy of the Learner
        self.kept.total += (learn.pred-learn.y).abs().sum().item()
        self.kept.n += len(learn.y)
    @property
    def value(self): return self.kept.total/self.kept.n if self.kept.n else None

def test_metrics_that_keep_objects():
    learn = make_learn(metrics=mae)
    learn.metrics = [*learn.metrics, Keeps(learn)]
    learn.fit_zero_restarts(3, 1)
    report = ensemble(learn).report()
    np.testing.assert_allclose(report.keeps, report.mae, rtol=1e-5)
    np.testing.assert_allclose(report.average_keeps, report.average_mae, rtol=1e-5)
    assert (report.keeps!=report.average_keeps).tolist()==[False,True,True]


def test_metrics_of_several_numbers(tmp_path):
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat(), metrics=F1Score(average=None), path=tmp_path)
    learn.fit_zero_restarts(3, 1, path='snaps')
    report = ensemble(learn).report()
    want = learn.validate()[1]
    assert len(want)==3 and report.average_f1_score[2]==pytest.approx(list(want)) and all(len(v)==3 for v in report.f1_score)
    learn.save('m')
    again = make_learn(SnapshotEnsemble(), dls=learn.dls, model=make_model(3), loss_func=CrossEntropyLossFlat(), path=tmp_path).load('m')
    assert ensemble(again).report().equals(report)


@pytest.mark.parametrize('event', ['before_epoch','before_train'])
@pytest.mark.parametrize('order', [-20, 0])
def test_an_epoch_that_is_skipped_changes_no_row(event, order):
    def skip(self):
        if self.learn.epoch==1: raise CancelEpochException
    Skip = type('Skip', (Callback,), {'order': order, event: skip})
    learn = make_learn(Skip(), metrics=mae)
    learn.fit_zero_restarts(3, 1)
    assert list(ensemble(learn).record)==[0,2] and list(ensemble(learn).report().index)==[0,2]
    assert ensemble(learn).report().notna().all(axis=None)


def test_an_epoch_that_is_broken_off_is_no_end_of_a_cycle():
    class Break(Callback):
        order = -20
        def before_train(self):
            if self.epoch==2: raise CancelTrainException
        def after_train(self):
            if self.epoch==1: raise CancelEpochException
    learn = make_learn(Break())
    learn.fit_zero_restarts(4, 1)
    assert list(ensemble(learn).record)==[0,3]


@pytest.mark.parametrize('event', ['after_train','after_validate','after_epoch'])
@pytest.mark.parametrize('ask', [lambda learn: learn.get_preds(), lambda learn: learn.validate()], ids=['get_preds','validate'])
def test_a_callback_asks_the_learner_within_a_fit(event, ask):
    def asks(self):
        if self.learn.lock.locked(): return
        self.uses.append(ensemble(self.learn).use)
        own = self.learn.dl
        self.answers.append(ask(self.learn)[0])
        self.learn.dl = own
    table = lambda learn: ensemble(learn).report().drop(columns='train_loss')      # fastai starts its average again
    Asks = type('Asks', (Callback,), {'uses': [], 'answers': [], event: asks})
    plain,learn = [make_learn(*cbs, dls=data(shuffle=False), metrics=mae) for cbs in ((), (Asks(),))]
    for l in (plain,learn): l.fit_zero_restarts(3, 1, seed=1)
    assert list(ensemble(learn).record)==[0,1,2] and ensemble(learn).use=='average' and len(learn.metrics)==1
    assert learn.asks.uses==['last','average','average'] if event=='after_train' else ['average']*3
    for a,b in zip(members(plain), members(learn)): assert same(a, b)
    assert torch.equal(preds(plain), preds(learn))
    each,targs = ensemble(learn).member_preds()
    for n,answer in enumerate(learn.asks.answers, event!='after_train'):      # that of the average so far
        if n: assert torch.allclose(answer, each[:n].mean(0)) if torch.is_tensor(answer) else answer==pytest.approx(F.mse_loss(each[:n].mean(0), targs).item(), rel=1e-4)
    if event=='after_epoch': assert learn.recorder.metric_names==plain.recorder.metric_names and table(learn).equals(table(plain))


def test_other_callbacks_see_the_columns(tmp_path):
    learn = make_learn(path=tmp_path)
    with contextlib.redirect_stdout(None):
        learn.fit_zero_restarts(3, 1, cbs=[CSVLogger(), SaveModelCallback(monitor='average_loss', fname='best')])
    assert 'average_loss' in pd.read_csv(tmp_path/'history.csv')
    best = ensemble(learn).report().average_loss.idxmin()
    assert list(ensemble(learn).record)==list(range(best+1)) and ensemble(learn).use=='average'


def test_the_weights_average_is_that_of_what_is_loaded_at_the_end(tmp_path):
    learn = make_learn(path=tmp_path)
    with contextlib.redirect_stdout(None): learn.fit_zero_restarts(3, 1, use='weights', cbs=SaveModelCallback(monitor='average_loss', fname='best'))
    assert ensemble(learn).use=='weights'
    torch.testing.assert_close(ensemble(learn).record.weights['3.weight'], torch.stack([s['3.weight'] for s in members(learn)]).mean(0))

# Interruption

@pytest.mark.parametrize('path', [None, 'snaps'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException])
def test_an_interrupted_fit_keeps_its_snapshots_and_goes_on_as_if_nothing_had_been(tmp_path, path, error):
    kw = dict(n_cycles=4, cycle_len=2, path=path, seed=None)
    whole = make_learn(dls=data(shuffle=False), path=tmp_path/'a')
    whole.fit_zero_restarts(**kw)
    part = make_learn(dls=data(shuffle=False), path=tmp_path/'b', metrics=mae)
    with contextlib.suppress(error): part.fit_zero_restarts(**kw, cbs=StopAt(5, error))
    assert list(ensemble(part).record)==[0,1] and ensemble(part).use=='average' and len(part.metrics)==1
    assert len(part.validate())==2
    torch.testing.assert_close(preds(part), ensemble(part).member_preds()[0].mean(0))
    if path:        # another process: only the files are left
        part = make_learn(dls=data(shuffle=False), path=tmp_path/'b', seed=9)
    part.fit_zero_restarts(**kw, resume=True)
    assert list(ensemble(part).record)==[0,1,2,3]
    for a,b in zip(members(whole), members(part)): assert same(a, b)
    assert torch.equal(preds(whole), preds(part))
    assert len(ensemble(part).report()) >= 3
    before = state(part)
    part.fit_zero_restarts(**kw, resume=True)       # nothing is left to do
    assert same(before, state(part)) and len(ensemble(part).record)==4


@pytest.mark.parametrize('use', ['average','weights','last'])
@pytest.mark.parametrize('between', ['another process','another fit','nothing'])
def test_resume_of_a_whole_fit_gives_its_predictions(tmp_path, use, between):
    kw = dict(n_cycles=3, cycle_len=1, path='snaps')
    dls = data(shuffle=False)
    learn = make_learn(path=tmp_path, dls=dls)
    learn.fit_zero_restarts(**kw, use=use)
    want = preds(learn)
    if between=='another process': learn = make_learn(path=tmp_path, dls=dls, seed=9)
    if between=='another fit': learn.fit(1, 1e-2)
    learn.fit_zero_restarts(**kw, use=use, resume=True)
    assert ensemble(learn).use==use
    torch.testing.assert_close(preds(learn), want)


@pytest.mark.parametrize('old,new', [('one','two'), (None,'two'), ('one',None)])
def test_resume_into_another_folder(tmp_path, old, new):
    make_learn(path=tmp_path).fit_zero_restarts(6, 1, path='two')       # files of another fit
    names = lambda p: sorted(f.name for f in (tmp_path/'models'/p).glob('cycle*'))
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1, path=old)
    learn.fit_zero_restarts(4, 1, path=new, resume=True)
    all4 = [f'cycle_00{c}.pth' for c in range(4)]
    if new: assert names(new)==all4
    if old: assert names(old)==all4[:2]             # left as it was
    assert all(isinstance(s, Path)==bool(new) for s in ensemble(learn).record.states.values())
    if new:
        again = make_learn(path=tmp_path, seed=3)
        again.fit_zero_restarts(4, 1, path=new, resume=True)
        assert torch.equal(preds(again), preds(learn))


def test_another_process_goes_on_in_the_new_folder(tmp_path):
    new = lambda seed=0: make_learn(dls=data(shuffle=False), path=tmp_path, seed=seed)
    whole = new()
    whole.fit_zero_restarts(4, 1)
    part = new()
    for kw in (dict(path='one'), dict(path='two', resume=True)):
        with contextlib.suppress(KeyboardInterrupt): part.fit_zero_restarts(4, 1, cbs=StopAt(2), **kw)
    part = new(9)
    part.fit_zero_restarts(4, 1, path='two', resume=True)
    for a,b in zip(members(whole), members(part), strict=True): assert same(a, b)


def test_other_files_and_other_models_in_the_folder(tmp_path):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1, path='snaps')
    (tmp_path/'models/snaps/cycle_best.pth').write_text('mine')
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(3, 1, path='snaps', resume=True)
    assert list(ensemble(learn).record)==[0,1,2] and (tmp_path/'models/snaps/cycle_best.pth').exists()
    other = make_learn(model=nn.Sequential(nn.Linear(4,5), nn.Linear(5,1)), path=tmp_path)
    before = state(other)
    with pytest.raises(ValueError, match='weights of the model.*snaps'): other.fit_zero_restarts(3, 1, path='snaps', resume=True)
    assert same(before, state(other)) and not len(ensemble(other).record) and other.validate()


def test_files_are_found_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make_learn(path='.')
    learn.fit_zero_restarts(2, 1, path='snaps')
    want = preds(learn)
    monkeypatch.chdir(tmp_path.parent)
    assert torch.equal(preds(learn), want)


def test_resume_without_snapshots_is_a_fit():
    learn = make_learn()
    learn.fit_zero_restarts(2, 1, resume=True)
    assert list(ensemble(learn).record)==[0,1]


def test_start_epoch_keeps_the_cycles_before():
    learn = make_learn()
    learn.fit_zero_restarts(3, 2)
    first = members(learn)[0]
    learn.fit_zero_restarts(3, 2, start_epoch=2)
    assert list(ensemble(learn).record)==[0,1,2] and same(members(learn)[0], first)
    learn.fit_zero_restarts(3, 2, start_epoch=2, cbs=StopAt(3, CancelFitException))
    assert list(ensemble(learn).record)==[0] and list(ensemble(learn).report().index)==[0]


def test_files(tmp_path):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(4, 1, path='snaps', n_last=2)
    names = lambda: sorted(f.name for f in (tmp_path/'models/snaps').glob('cycle*'))
    assert names() == ['cycle_002.pth','cycle_003.pth'] and len(ensemble(learn).record)==2
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0))
    learn.fit_zero_restarts(1, 1, path='other')
    assert names() == ['cycle_002.pth','cycle_003.pth']         # another folder's are left alone
    learn.fit_zero_restarts(2, 1, path='snaps')
    assert names() == ['cycle_000.pth','cycle_001.pth']         # a new fit does not mix with an old one


def test_n_last_in_memory():
    learn = make_learn()
    learn.fit_zero_restarts(4, 1, n_last=3)
    assert list(ensemble(learn).record)==[1,2,3] and len(ensemble(learn).report())==4

# Copies

@pytest.mark.parametrize('path', [None, 'snaps'])
@pytest.mark.parametrize('use', ['average', 'weights', 'last'])
def test_export_pickle_and_deepcopy_give_the_same_numbers(tmp_path, use, path):
    learn = tabular(path=tmp_path)
    learn.fit_zero_restarts(3, 1, use=use, path=path)
    row,want = make_table().iloc[3],preds(learn)
    learn.export('l.pkl')
    one = learn.predict(row)[2]
    if path:
        for f in (tmp_path/'models/snaps').iterdir(): f.unlink()
    else:
        for twin in (pickle.loads(pickle.dumps(learn)), deepcopy(learn)): assert torch.equal(preds(twin), want)
    again = load_learner(tmp_path/'l.pkl')
    assert torch.equal(again.predict(row)[2], one)
    torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(make_table()))[0][-120:], want)
    if use=='average': torch.testing.assert_close(one, ensemble(again).member_preds(dl=again.dls.test_dl(make_table().iloc[3:4]))[0].mean(0)[0])


@pytest.mark.parametrize('path', [None, 'snaps'])
def test_save_and_load(tmp_path, path):
    learn = make_learn(path=tmp_path, metrics=mae)
    learn.fit_zero_restarts(3, 1, path=path)
    learn.save('m')
    again = make_learn(SnapshotEnsemble(), path=tmp_path, seed=3)
    again.load('m')
    assert torch.equal(preds(again), preds(learn)) and ensemble(again).report().equals(ensemble(learn).report())
    plain = make_learn(path=tmp_path, seed=4).load('m')              # a plain Learner finds the network
    with ensemble(learn).using('last'): assert torch.equal(preds(plain), preds(learn))
    assert list(plain.model.state_dict()) == list(learn.model.state_dict())
    plain.save('plain')
    learn.load('plain')                                              # and weights without snapshots are a single network
    assert not len(ensemble(learn).record) and torch.equal(preds(learn), preds(plain))


@pytest.mark.parametrize('model', [lambda: nn.Linear(4, 1), lambda: make_model(2)], ids=['names','shapes'])
def test_weights_that_do_not_fit_leave_the_snapshots(tmp_path, model):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1)
    want = preds(learn)
    make_learn(model=model(), path=tmp_path).save('other')
    with pytest.raises(RuntimeError): learn.load('other')
    assert list(ensemble(learn).record)==[0,1] and torch.equal(preds(learn), want)


@pytest.mark.parametrize('events', [('before_validate','after_validate'), ('before_epoch','after_epoch')])
def test_a_callback_may_load_weights_within_the_fit(events):
    def swap(self): self.learn.model.load_state_dict({k:v.clone() for k,v in self.learn.model.state_dict().items()})
    learn = make_learn(type('Swap', (Callback,), dict.fromkeys(events, swap))())
    learn.fit_zero_restarts(3, 1)
    assert list(ensemble(learn).record)==[0,1,2] and ensemble(learn).use=='average'
    learn.model.load_state_dict(make_model().state_dict())          # afterwards they are those of another network
    assert not len(ensemble(learn).record)


def test_the_best_network_may_be_older_than_the_snapshots(tmp_path):
    learn = make_learn(path=tmp_path)
    first = SaveModelCallback(comp=np.greater)      # the worst, which is the first
    with contextlib.redirect_stdout(None): learn.fit_zero_restarts(1, 2, cbs=first)
    assert not len(ensemble(learn).record) and ensemble(learn).use=='last'
    assert torch.equal(preds(learn), preds(make_learn(path=tmp_path, seed=4).load('model')))


def test_copies_train_on_their_own():
    learn = make_learn()
    learn.fit_zero_restarts(2, 1)
    before = preds(learn)
    deepcopy(learn).fit_zero_restarts(2, 1)
    assert torch.equal(preds(learn), before)

# Other fits

def test_a_later_fit_trains_and_shows_the_network():
    learn = make_learn()
    learn.fit_zero_restarts(3, 1)
    avg = preds(learn)
    learn.fit(1, 1e-2)
    shown = learn.recorder.values[-1][1]
    assert ensemble(learn).use=='last' and not torch.equal(preds(learn), avg)
    assert learn.validate()[0] == pytest.approx(shown, rel=1e-5)
    ensemble(learn).use = 'average'
    assert torch.equal(preds(learn), avg)
    learn.fit_zero_restarts(2, 1)
    assert list(ensemble(learn).record)==[0,1] and ensemble(learn).use=='average'


def test_removed_it_is_a_plain_learner_again():
    learn = make_learn()
    learn.fit_zero_restarts(2, 1)
    with ensemble(learn).using('last'): last = preds(learn)
    learn.remove_cb(SnapshotEnsemble)
    assert torch.equal(preds(learn), last)
    assert not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks and not learn.model._load_state_dict_post_hooks and not learn.model.state_dict()._metadata[''].keys()-{'version'}
    assert not [cb for cb in learn.cbs if isinstance(cb, (ZeroRestarts,SnapshotEnsemble))]


@pytest.mark.parametrize('path', [None, 'snaps'])
def test_lr_find_leaves_no_trace(tmp_path, path):
    learn = make_learn(ZeroRestarts(1), path=tmp_path)
    before = state(learn)
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert same(before, state(learn)) and not learn._grab_cbs(SnapshotEnsemble)
    learn.remove_cb(ZeroRestarts)
    learn.fit_zero_restarts(3, 1, path=path)
    before,avg = state(learn),preds(learn)
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert same(before, state(learn)) and torch.equal(preds(learn), avg) and ensemble(learn).use=='average'
    assert ensemble(learn).record.progress and (path is None or all(isinstance(s, Path) for s in ensemble(learn).record.states.values()))


def test_the_callback_in_a_learner_serves_every_fit_and_no_validation():
    with pytest.raises(TypeError, match='cycle_len=None'): ZeroRestarts(None)
    every = make_learn(ZeroRestarts(1), metrics=mae)
    every.validate()
    assert not every._grab_cbs(SnapshotEnsemble)
    learn = make_learn(ZeroRestarts(2), metrics=mae)
    learn.fit(4, 1e-2)
    assert list(ensemble(learn).record)==[0,1]
    avg = preds(learn)
    assert len(learn.validate())==2 and torch.equal(preds(learn), avg) and list(ensemble(learn).record)==[0,1]
    learn.fit(5, 1e-2)
    assert list(ensemble(learn).record)==[0,1]          # the fifth epoch ends no cycle


def test_after_fine_tune_and_with_other_callbacks():
    learn = make_learn(DropConnect(.2), FrozenZeroInit(.5), splitter=lambda m: [params(m[:2]), params(m[2:])])
    learn.fine_tune(1, 1e-2)
    learn.fit_zero_restarts(2, 1)
    assert [(w==0).sum().item() for w in hidden(learn)] == [24, 48]          # what is held stays zero
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0))


def test_our_tabular_learner():
    learn = tabular(config=tabular_dropconnect_config(weight_p=.2))
    learn.fit_zero_restarts(2, 1, cbs=RecalibrateBN(every_epoch=True))
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0))
    with contextlib.redirect_stdout(None): learn.show_results()


def test_classes_of_a_table():
    df = make_table().assign(y=lambda d: (d.b>0).map({True:'yes', False:'no'}))
    set_seed(0)
    from fastai.tabular.all import CategoryBlock, Categorify, FillMissing, Normalize, TabularDataLoaders
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code','flag'], cont_names=['a','b'],
                                     y_names='y', y_block=CategoryBlock(), valid_idx=range(480,600), bs=32)
    learn = quiet(tabular_learner(dls, layers=[20,10], metrics=accuracy))
    learn.fit_zero_restarts(3, 1)
    p = preds(learn)
    torch.testing.assert_close(p.sum(1), torch.ones(120))
    torch.testing.assert_close(p, ensemble(learn).member_preds()[0].mean(0))
    row,cls,probs = learn.predict(df.iloc[500])
    torch.testing.assert_close(probs, p[20])


class Bf16(MixedPrecision):
    "MixedPrecision on the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False),L()

def test_mixed_precision():
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat())
    learn.add_cb(Bf16())
    learn.fit_zero_restarts(2, 1)
    assert preds(learn).dtype==torch.float32
    torch.testing.assert_close(preds(learn), ensemble(learn).member_preds()[0].mean(0), rtol=1e-2, atol=1e-3)



def test_mixed_precision_with_a_metric_of_numpy():
    learn = make_learn(Bf16(), metrics=R2Score())
    learn.fit_zero_restarts(2, 1)
    assert learn.validate()[1] == pytest.approx(ensemble(learn).report().average_r2_score[1], rel=1e-3)


def test_an_optimizer_that_trains_a_copy_of_the_weights():
    learn = make_learn().to_non_native_fp16()
    with pytest.raises(ValueError, match='`sparsity` and `embed_sparsity` must be 0 with `to_non_native_fp16`.*0.weight'): learn.fit_zero_restarts(2, 1)


def test_losses_derived_from_torchs():
    class Weighted(nn.CrossEntropyLoss): pass
    class Logits(nn.BCEWithLogitsLoss): pass
    assert prediction_mean(Weighted(), (8,3)).func is softmax_mean and prediction_mean(Logits(), (8,1)) is sigmoid_mean

# Errors

@pytest.mark.parametrize('kw,error,says', [
    (dict(cycle_len=0), ValueError, 'cycle_len=0'), (dict(cycle_len=1.5), TypeError, 'cycle_len=1.5'), (dict(sparsity=1.), ValueError, 'sparsity=1.0'),
    (dict(embed_sparsity='a'), TypeError, "embed_sparsity='a'"), (dict(n_last=0), ValueError, 'n_last=0'), (dict(seed=.5), TypeError, 'seed=0.5'),
    (dict(use='mean'), ValueError, "use='mean'"), (dict(layers=3), TypeError, 'layers=3'), (dict(path=3), TypeError, 'path=3'), (dict(path=True), TypeError, 'path=True'),
    (dict(sparsity={}), ValueError, 'sparsity={}')])
def test_errors_come_from_the_constructor(kw, error, says):
    with pytest.raises(error, match=says): ZeroRestarts(**kw)


@pytest.mark.parametrize('kw,error', [(dict(lr_max=v), e) for v,e in (('x',TypeError), (None,TypeError), (True,TypeError), (float('nan'),ValueError), (float('inf'),ValueError), (-1.,ValueError))]
                         + [(dict(start_epoch=v), e) for v,e in (('1',TypeError), (None,TypeError), (.5,TypeError), (-1,ValueError))], ids=str)
def test_errors_name_the_argument(kw, error):
    learn = make_learn()
    (name,value), = kw.items()
    with pytest.raises(error, match=f'`{name}` must be .*{name}={value}'.replace('=x', "='x'").replace('=1', "='1'")): learn.fit_zero_restarts(2, 1, **kw)
    assert learn.opt is None


@pytest.mark.parametrize('lr', [slice(1e-3, 1e-2), slice(1e-2), [1e-3, 1e-2], np.array([1e-3, 1e-2]), np.float32(1e-2), 0])
def test_learning_rates_of_any_kind(lr): assert check_lr(lr, 'lr') is lr


def test_more_errors():
    learn = make_learn(SnapshotEnsemble())
    for use in ('average','weights',0):
        with pytest.raises(ValueError, match='`use`'): ensemble(learn).use = use
    with pytest.raises(ValueError, match='needs snapshots'): ensemble(learn).average_weights()
    with pytest.raises(ValueError, match='n_cycles=0'): learn.fit_zero_restarts(0)
    with pytest.raises(ValueError, match='must be names of modules'): learn.fit_zero_restarts(2, 1, layers=['x'])
    with pytest.raises(ValueError, match='no hidden nn.Linear and no nn.Embedding'): make_learn(model=nn.Linear(4, 1)).fit_zero_restarts(2, 1)
    make_learn(model=nn.Linear(4, 1)).fit_zero_restarts(2, 1, sparsity=0, embed_sparsity=0)
    for f in (ensemble(learn).member_preds, ensemble(learn).preds_and_spread):
        with pytest.raises(ValueError, match='needs snapshots'): f()
    learn.fit_zero_restarts(2, 1)
    for use in (7, torch.tensor(1), True, 1.):
        with pytest.raises(ValueError, match=r"\(0, 1\).*use="): ensemble(learn).use = use
    ensemble(learn).use = np.int64(1)


script = '''
    import sys, warnings
    sys.path.insert(0, {here!r})
    warnings.simplefilter('ignore')
    from fastai.distributed import *
    from test_callback_zero_restarts import *
    def broadcast(self, t, rank):      # fastai's own wants CUDA
        t = torch.LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    from accelerate import Accelerator
    Accelerator(cpu=True)
    rank = torch.distributed.get_rank()
    learn = make_learn(seed=rank, path=Path('.'))
    for path in (None, 'snaps'):
        zeros = Zeros()
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_zero_restarts(2, 1, path=path, cbs=zeros)
        both = [None]*2
        states = [{{n:t for n,t in s.items() if path or 'running' not in n}} for s in members(learn)]      # batch norm has seen other rows
        torch.distributed.all_gather_object(both, (zeros.masks[1]['3.weight'], states))
        assert both[0][0].sum()==29 and torch.equal(both[0][0], both[1][0])
        for a,b in zip(both[0][1], both[1][1]): assert same(a, b), (path, rank)
    torch.distributed.destroy_process_group()
    open('fine%d' % rank, 'w').close()
'''

@pytest.mark.skipif(os.environ.get('TEST_DISTRIBUTED')!='1', reason='two processes that meet on a port of this machine: set TEST_DISTRIBUTED=1')
def test_two_processes_draw_the_same_zeros(tmp_path):
    pytest.importorskip('accelerate', reason='fastai trains in several processes through accelerate')
    (file := tmp_path/'train.py').write_text(textwrap.dedent(script).format(here=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(file)],
                         capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode==0 and (tmp_path/'fine0').exists() and (tmp_path/'fine1').exists(), run.stdout+run.stderr
