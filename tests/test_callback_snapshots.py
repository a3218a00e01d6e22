"A Learner predicts with its snapshots: predictions, copies, other fits"
import contextlib, pickle
from copy import deepcopy
from functools import partial
from typing import NamedTuple
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.rnn import ModelResetter
from fastai.tabular.all import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat,
                                SaveModelCallback, accuracy, load_learner, mae, noop)
from fastcore.foundation import L
from torch import nn
from conftest import make_table
from ensemble_learners import *
from fastai_dropconnect.all import *
from fastai_dropconnect.ensemble.averaging import average_for
from fastai_dropconnect.nn_utils import load_state_, model_tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


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
    each,_ = learn.get_member_preds()
    torch.testing.assert_close(each, torch.stack(own, 1))
    mean,_,spread = learn.get_preds_and_spread()
    assert torch.equal(mean, got)
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
    mean = average(outs, learn.loss_func)
    assert type(mean) is type(outs[0])
    torch.testing.assert_close(first(mean), (first(outs[0])+first(outs[1]))/2)
    assert learn.validate()[0] == pytest.approx(F.mse_loss(first(mean), learn.dls.valid_ds.tensors[1]).item(), rel=1e-4)


class First(Callback):
    "As fastai's `RNNCallback`"
    def after_pred(self): self.learn.pred = self.pred[0]


def test_other_callbacks_change_each_prediction_before_the_mean():
    class More(nn.Module):
        def __init__(self): super().__init__(); self.body = make_model(3)
        def forward(self, x): return self.body(x),x
    learn = make_learn(First(), dls=data(target=classes), model=More(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit_zero_restarts(3, 1)
    torch.testing.assert_close(preds(learn), learn.get_member_preds()[0].mean(1))
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
    torch.testing.assert_close(learn.get_member_preds()[0], torch.stack(own, 1))
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
    torch.testing.assert_close(preds(learn), learn.get_member_preds()[0].mean(1))


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
    each,targs = learn.get_member_preds()
    for n,answer in enumerate(learn.asks.answers, event!='after_train'):      # that of the average so far
        if n: assert torch.allclose(answer, each[:,:n].mean(1)) if torch.is_tensor(answer) else answer==pytest.approx(F.mse_loss(each[:,:n].mean(1), targs).item(), rel=1e-4)
    if event=='after_epoch': assert learn.recorder.metric_names==plain.recorder.metric_names and table(learn).equals(table(plain))


def test_the_weights_average_is_that_of_what_is_loaded_at_the_end(tmp_path):
    learn = make_learn(path=tmp_path)
    with contextlib.redirect_stdout(None): learn.fit_zero_restarts(3, 1, use='weights', cbs=SaveModelCallback(monitor='average_loss', fname='best'))
    assert ensemble(learn).use=='weights'
    torch.testing.assert_close(ensemble(learn).record.weights['3.weight'], torch.stack([s['3.weight'] for s in members(learn)]).mean(0))


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
    if use=='average': torch.testing.assert_close(one, again.get_member_preds(dl=again.dls.test_dl(make_table().iloc[3:4]))[0].mean(1)[0])


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
    torch.testing.assert_close(p, learn.get_member_preds()[0].mean(1))
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
    torch.testing.assert_close(preds(learn), learn.get_member_preds()[0].mean(1), rtol=1e-2, atol=1e-3)


def test_more_errors():
    learn = make_learn(SnapshotEnsemble())
    for use in ('average','weights',0):
        with pytest.raises(ValueError, match='`use`'): ensemble(learn).use = use
    with pytest.raises(ValueError, match='needs snapshots'): ensemble(learn).average_weights()
    with pytest.raises(ValueError, match='n_cycles=0'): learn.fit_zero_restarts(0)
    with pytest.raises(ValueError, match='must be names of modules'): learn.fit_zero_restarts(2, 1, layers=['x'])
    with pytest.raises(ValueError, match='no hidden nn.Linear and no nn.Embedding'): make_learn(model=nn.Linear(4, 1)).fit_zero_restarts(2, 1)
    make_learn(model=nn.Linear(4, 1)).fit_zero_restarts(2, 1, sparsity=0, embed_sparsity=0)
    for f in (learn.get_member_preds, learn.get_preds_and_spread):
        with pytest.raises(TypeError, match='needs an ensemble.*fit_zero_restarts'): f()
    learn.fit_zero_restarts(2, 1)
    for use in (7, torch.tensor(1), True, 1.):
        with pytest.raises(ValueError, match="'weights', 0, 1, got use="): ensemble(learn).use = use
    ensemble(learn).use = np.int64(1)


# What a validation shows

def test_the_average_of_the_loss_is_found_once_per_validation(monkeypatch):
    from fastai_dropconnect.callback import snapshots
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat())
    calls = []
    monkeypatch.setattr(snapshots, 'average_for', lambda *args: (calls.append(args), average_for(*args))[1])
    learn.fit_zero_restarts(3, 2)
    assert len(calls)==2                # at the ends of the second and third cycle: a single snapshot needs no average
    learn.validate()
    learn.get_preds()
    assert len(learn.dls.valid)==6 and len(calls)==4
    learn.loss_func = BCEWithLogitsLossFlat()
    assert len(calls)==4 and calls[-1][1]==(3,)


def test_another_loss_is_averaged_in_its_way():
    learn = make_learn(dls=data(target=lambda x: (x[:,:1]>0).float()), loss_func=nn.BCEWithLogitsLoss())
    learn.fit_zero_restarts(2, 1, lr_max=.05)
    each,_ = learn.get_member_preds()
    torch.testing.assert_close(preds(learn).sigmoid(), each.sigmoid().mean(1))
    learn.loss_func = nn.MSELoss()
    torch.testing.assert_close(preds(learn), each.mean(1))


@pytest.mark.parametrize('fit', ['zero restarts','plain'])
def test_what_validations_show_in_a_fit_and_after_it(fit):
    class Look(Callback):
        order = 70
        def before_fit(self):
            if not self.learn.lock.locked(): self.seen = []
        def after_validate(self):
            if self.learn.lock.locked(): return
            own,shows = self.learn.dl,ensemble(self.learn).shows.name
            self.learn.validate()
            self.learn.dl = own
            self.seen.append((shows, ensemble(self.learn).shows.name))
    learn = make_learn(SnapshotEnsemble(), look := Look(), dls=data(shuffle=False))
    if fit=='plain': learn.fit(2)
    else: learn.fit_zero_restarts(2, 2)
    plain,end = ['NETWORK']*2,['NETWORK_AND_AVERAGE']*2
    assert [list(s) for s in look.seen] == ([plain]*2 if fit=='plain' else [plain,end]*2)
    assert ensemble(learn).shows.name=='PREDICTION'


def test_a_validation_within_a_fit_does_not_end_the_guard_of_the_snapshots():
    class Swap(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.lock.locked(): return
            self.learn.validate()
            self.learn.model.load_state_dict({k:v.clone() for k,v in self.learn.model.state_dict().items() if k})
            self.learn.model.load_state_dict(dict(state(self.learn)))
    learn = make_learn(Swap())
    learn.fit_zero_restarts(3, 1)
    assert list(ensemble(learn).record)==[0,1,2] and ensemble(learn).use=='average'


@pytest.mark.parametrize('where', ['before_batch','before_validate','after_loss','after_epoch'])
def test_after_an_interruption_the_learner_is_as_before(where):
    def stop(self):
        if self.learn.epoch==3 and not (where=='after_loss' and self.learn.training): raise KeyboardInterrupt
    learn = make_learn(type('Stop', (Callback,), {where: stop, 'order': 70})(), metrics=mae)
    before = list(learn.metrics)
    with contextlib.suppress(KeyboardInterrupt): learn.fit_zero_restarts(3, 2)
    assert [m is b for m,b in zip(learn.metrics, before, strict=True)]==[True]
    learn.remove_cb(learn.stop)
    assert len(learn.recorder.metric_names)-2==len(learn.recorder.values[-1])
    assert ensemble(learn).shows.name=='PREDICTION' and not ensemble(learn).record.keep_on_plain_load
    kept = list(ensemble(learn).record)
    torch.testing.assert_close(preds(learn), learn.get_member_preds()[0].mean(1))
    assert len(learn.validate())==2 and learn.recorder.metric_names[-2]=='mae' and len(kept)==(1 if where=='before_batch' else 2)
    learn.model.load_state_dict(make_model().state_dict())
    assert not len(ensemble(learn).record)


def test_a_broken_fit_with_a_temporary_ensemble_leaves_the_metrics_as_before():
    learn = make_learn(ZeroRestarts(1), metrics=mae)
    before = list(learn.metrics)
    with contextlib.suppress(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[SnapshotEnsemble(), StopAt(0)])
    assert list(learn.metrics)==before and not hasattr(learn, 'snapshot_ensemble')
