"Predictions of the members of any ensemble, their spread, and the module that predicts"
import pickle
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from fastai.tabular.all import (BCEWithLogitsLossFlat, Callback, CategoryBlock, Categorify, CrossEntropyLossFlat, FillMissing, Normalize,
                                TabularDataLoaders, load_learner, mae, set_seed)
from torch import nn
from conftest import make_table
from ensemble_learners import *
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.members import weighted_members
from fastai_dropconnect.ensemble.averaging import AveragedModel, map_outputs
from fastai_dropconnect.ensemble.blend import BlendedModel

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


def test_members_of_a_model_with_several_outputs():
    learn = two_outputs()
    learn.fit_zero_restarts(3, 1)
    each,_ = learn.get_member_preds()
    mean,_,spread = learn.get_preds_and_spread()
    for e,m,s,p in zip(each, mean, spread, preds(learn)):
        assert e.shape==(96,3,1)
        torch.testing.assert_close(m, p)
        torch.testing.assert_close(s, e.std(1, correction=0))


def masked(n=3, seed=0, target='y', loss_func=None, **kw):
    return tabular(config=tabular_dropconnect_config(members=n), seed=seed, target=target, **({} if loss_func is None else dict(loss_func=loss_func)), **kw)

def test_members_of_a_masked_ensemble():
    learn = masked(metrics=mae)
    learn.fit(1, 1e-2)
    each,targs = learn.get_member_preds()
    assert len(learn.metrics)==1 and learn.recorder.metric_names[-2]=='mae'
    mean,same_targs,spread = learn.get_preds_and_spread()
    assert each.shape==(120,3,1) and torch.equal(targs, same_targs) and torch.equal(mean, preds(learn))
    torch.testing.assert_close(mean, each.mean(1))
    torch.testing.assert_close(spread, each.std(1, correction=0))


@pytest.mark.parametrize('use', ['average','last',1])
def test_members_of_snapshots_of_a_masked_ensemble(use):
    learn = masked()
    learn.fit_zero_restarts(2, 1)
    each,_ = learn.get_member_preds()
    torch.testing.assert_close(preds(learn), each.mean(1))
    own = []
    for c in (0,1):
        with ensemble(learn).using(c): own.append(learn.get_member_preds()[0])
    assert each.shape==(120,2*3,1) and torch.equal(each, torch.cat(own, 1))
    with ensemble(learn).using(use):
        mean,_,spread = learn.get_preds_and_spread()
        assert torch.equal(mean, preds(learn)) and spread.shape==(120,1)
        assert learn.get_member_preds()[0].shape[1]==(6 if use=='average' else 3)


def test_snapshots_of_a_masked_ensemble_average_probabilities_with_a_loss_of_torch():
    df = make_table().assign(y=lambda d: (d.b>0).map({True:'yes', False:'no'}))
    set_seed(0)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code','flag'], cont_names=['a','b'],
                                     y_names='y', y_block=CategoryBlock(), valid_idx=range(480,600), bs=32)
    class CE(nn.CrossEntropyLoss):
        def forward(self, pred, targ): return super().forward(pred, targ.long().flatten())
    learn = quiet(tabular_learner(dls, layers=[20,10], config=tabular_dropconnect_config(members=3), loss_func=CE()))
    learn.fit_zero_restarts(2, 1, lr_max=.05)
    each,_ = learn.get_member_preds()
    torch.testing.assert_close(preds(learn).softmax(-1), each.softmax(-1).mean(1))


def test_a_single_network_has_no_members():
    learn = make_learn()
    for f in (learn.get_member_preds, learn.get_preds_and_spread):
        with pytest.raises(TypeError, match='needs an ensemble.*fit_zero_restarts.*members=8.*Sequential'): f()
    learn.fit_zero_restarts(2, 1, use='last')
    with pytest.raises(TypeError, match="snapshot_ensemble.use='average'"): learn.get_member_preds()


def test_members_for_other_rows():
    learn = tabular()
    learn.fit_zero_restarts(2, 1)
    for kw in (dict(ds_idx=0), dict(dl=learn.dls.test_dl(make_table(30, seed=5).drop(columns='y')))):
        each,_ = learn.get_member_preds(**kw)
        mean,_,spread = learn.get_preds_and_spread(**kw)
        torch.testing.assert_close(each.mean(1), mean)
        assert torch.equal(mean, preds(learn, **kw)) and spread.shape==mean.shape


def test_members_of_outputs_in_a_dictionary():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.body = make_model(2)
        def forward(self, x): return dict(out=self.body(x)[:,:1], n=torch.arange(len(x)))
    learn = make_learn(model=Dict(), loss_func=lambda p,y: F.mse_loss(p['out'], y))
    learn.fit_zero_restarts(3, 1)
    batches = list(learn.dls.valid)         # fastai cannot put the rows of a dictionary in the order of a data loader
    each,_ = learn.get_member_preds(dl=batches)
    assert each['out'].shape==(96,3,1)
    torch.testing.assert_close(each['out'].mean(1), preds(learn, dl=batches)['out'])
    spread = learn.get_preds_and_spread(dl=batches)[2]
    assert spread['out'].shape==(96,1)


def in_two_runs(learn, **kw):
    "What `get_preds_and_spread` returns, from a run for the members and one for their average"
    each,_ = learn.get_member_preds(**kw)
    mean,targs = learn.get_preds(**kw)
    return mean,targs,map_outputs(lambda t: t.std(1, correction=0), each)

def flat(out): # Tensors of an output, in order
    if torch.is_tensor(out): return [out]
    return [t for o in (out.values() if isinstance(out, dict) else out) for t in flat(o)]

def snapshots(learn, n=3):
    learn.fit_zero_restarts(n, 1)
    return learn

class Dict(nn.Module):
    def __init__(self): super().__init__(); self.body = make_model(2)
    def forward(self, x): return dict(out=self.body(x)[:,:1], n=torch.arange(len(x)))

def of_classes(**kw): return make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat(), **kw)
def of_flags():
    target = lambda x: (x[:,:3]>0).float()
    return make_learn(dls=data(target=target), model=make_model(3), loss_func=BCEWithLogitsLossFlat())
def of_dictionaries(): return make_learn(model=Dict(), loss_func=lambda p,y: F.mse_loss(p['out'], y))
def fitted(learn):
    learn.fit(1, 1e-2)
    return learn

ENSEMBLES = dict(
    masked=lambda: fitted(masked(metrics=mae)), snapshots=lambda: snapshots(make_learn(metrics=mae)),
    both=lambda: snapshots(masked(), 2), accelerated=lambda: fitted(masked(n=4).accelerate()),
    classes=lambda: snapshots(of_classes()), flags=lambda: snapshots(of_flags()), several=lambda: snapshots(two_outputs()),
    recalibrated=lambda: snapshots(make_learn(RecalibrateBN())))

class Counts(Callback):
    def before_validate(self): self.n = getattr(self, 'n', 0)+1

@pytest.mark.parametrize('make', ENSEMBLES.values(), ids=ENSEMBLES)
def test_one_run_gives_the_bits_of_two(make):
    learn = make()
    valid = learn.dls.valid
    backwards = valid.new(get_idxs=lambda: list(range(valid.n))[::-1])
    for kw in ({}, dict(ds_idx=0), dict(dl=backwards), dict(dl=list(valid))):
        want = in_two_runs(learn, **kw)
        counts = Counts()
        with learn.added_cbs(counts): got = learn.get_preds_and_spread(**kw)
        assert counts.n==1
        for a,b in zip(flat(got), flat(want), strict=True): assert torch.equal(a, b)

def test_one_run_keeps_outputs_in_a_dictionary():
    learn = snapshots(of_dictionaries())
    batches = list(learn.dls.valid)
    got,want = learn.get_preds_and_spread(dl=batches),in_two_runs(learn, dl=batches)
    for a,b in zip(flat(got), flat(want), strict=True): assert torch.equal(a, b)


class Doubles(Callback):
    def after_loss(self): self.learn.pred = self.pred*2

@pytest.mark.parametrize('make', [lambda: fitted(masked()), lambda: snapshots(make_learn())], ids=['masked','snapshots'])
def test_callbacks_that_change_predictions_change_those_of_members(make):
    learn = make()
    plain = learn.get_preds_and_spread()
    with learn.added_cbs(Doubles()): got,want = learn.get_preds_and_spread(),in_two_runs(learn)
    for a,b in zip(got, want, strict=True): assert torch.equal(a, b)
    torch.testing.assert_close(got[2], 2*plain[2])


def test_spread_of_a_noise_model():
    learn = fitted(tabular(noise='quantile', config=tabular_dropconnect_config(members=3)))
    for a,b in zip(learn.get_preds_and_spread(), in_two_runs(learn), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('make', [lambda: fitted(masked().accelerate()), lambda: snapshots(tabular(), 2)], ids=['masked','snapshots'])
def test_spread_without_rows(make):
    learn = make()
    empty = learn.dls.test_dl(make_table(5).drop(columns='y')[:0])
    assert learn.get_preds_and_spread(dl=empty)==in_two_runs(learn, dl=empty)==(None,None,None)


def test_a_callback_asks_for_the_members_within_a_fit():
    class Ask(Callback):
        order = 70
        def after_epoch(self):
            if not self.learn.lock.locked(): self.shapes.append(self.learn.get_member_preds()[0].shape)
    plain,learn = make_learn(metrics=mae, dls=data(shuffle=False)),make_learn(ask := Ask(), metrics=mae, dls=data(shuffle=False))
    ask.shapes = []
    for l in (plain,learn): l.fit_zero_restarts(3, 1, seed=1)
    assert ask.shapes==[(96,n,1) for n in (1,2,3)]
    assert torch.equal(preds(plain), preds(learn)) and len(learn.metrics)==1
    assert list(ensemble(learn).report().columns)==list(ensemble(plain).report().columns)

# The module that predicts

KINDS = dict(regression=(None, F.mse_loss, 1, lambda x: x), softmax=(classes, CrossEntropyLossFlat(), 3, lambda x: x.softmax(1)),
             sigmoid=(lambda x: (x[:,:3]>0).float(), nn.BCEWithLogitsLoss(), 3, lambda x: x))

@pytest.mark.parametrize('target,loss,n_out,act', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('use', ['average','last','weights',1])
def test_the_module_predicts_as_the_learner_does(target, loss, n_out, act, use):
    learn = make_learn(dls=data(target=target), model=make_model(n_out), loss_func=loss)
    learn.fit_zero_restarts(3, 1)
    ensemble(learn).average_weights().use = use
    model,x = learn.averaged_model(),learn.dls.valid_ds.tensors[0]
    assert not model.training and not any(m.training for m in model.modules())
    torch.testing.assert_close(act(model(x)), preds(learn))
    assert type(model).__name__ == ('AveragedModel' if use=='average' else 'Sequential')


def test_the_module_of_a_masked_ensemble_and_of_its_snapshots():
    learn = masked()
    dl = learn.dls.valid
    call = lambda model: torch.cat([model(cats, conts) for cats,conts,_ in dl])
    learn.fit_zero_restarts(2, 1)
    torch.testing.assert_close(call(learn.averaged_model()), preds(learn))
    with ensemble(learn).using('last'): torch.testing.assert_close(call(learn.averaged_model()), preds(learn))
    learn.remove_cb(SnapshotEnsemble)
    torch.testing.assert_close(call(learn.averaged_model()), preds(learn))


def test_the_module_is_a_copy_and_small():
    learn = make_learn()
    learn.fit_zero_restarts(3, 1)
    model,before = learn.averaged_model(),preds(learn)
    own = learn.model[0].weight.detach().clone()
    for p in model.parameters(): assert p.grad is None and p.requires_grad
    x,y = learn.dls.valid_ds.tensors
    F.mse_loss(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters(): p.sub_(p.grad)
    assert torch.equal(preds(learn), before) and torch.equal(learn.model[0].weight, own)
    for m in model.modules(): assert not m._state_dict_hooks and not m._load_state_dict_pre_hooks
    assert len(pickle.dumps(make_model()))*4 > len(pickle.dumps(model))
    assert ensemble(learn).record.handles


def test_the_module_copies_pickles_loads_and_exports():
    learn = make_learn()
    learn.fit_zero_restarts(3, 1)
    model,x = learn.averaged_model(),learn.dls.valid_ds.tensors[0]
    want = model(x)
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model)), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(twin(x), want)
    other = make_learn(seed=5)
    other.fit_zero_restarts(3, 1)
    other = other.averaged_model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), want)


def test_the_module_of_an_exported_learner(tmp_path):
    learn = tabular(path=tmp_path)
    learn.fit_zero_restarts(3, 1)
    cats,conts,_ = learn.dls.valid.one_batch()
    want = learn.averaged_model()(cats, conts)
    learn.export('l.pkl')
    assert torch.equal(load_learner(tmp_path/'l.pkl').averaged_model()(cats, conts), want)


def test_frozen_weights_stay_frozen_in_the_module():
    learn = make_learn(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.freeze()
    learn.fit_zero_restarts(2, 1)
    assert [p.requires_grad for p in learn.averaged_model().models[1].parameters()]==[p.requires_grad for p in learn.model.parameters()]

def test_weights_of_members_inside_a_blend():
    torch.manual_seed(0)
    ensemble = masked()
    plain = tabular(seed=1).model.eval()
    model = BlendedModel([ensemble.model.eval(), AveragedModel([plain,plain])], [.9,.1])
    x = [t[:7] for t in ensemble.dls.one_batch()[:2]]
    outs,shares = weighted_members(model, *x)
    torch.testing.assert_close(shares, torch.tensor([.3,.3,.3,.05,.05]))
    assert outs.shape==(7,5,1)
    with torch.no_grad(): expected = model(*x)
    torch.testing.assert_close((outs*shares[:,None]).sum(1), expected)
