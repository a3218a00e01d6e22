import pytest, torch
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD
from torch.nn import functional as F
from conftest import Scaled
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.variational import VariationalDropConnect, kl_gradients
from ensemble_learners import make_learn
from test_callback_gates import Each, Seed


def fit(learn, n=6, **kw):
    torch.manual_seed(1)
    learn.fit(n, 1e-2, **kw)
    return learn

def hidden(learn): return [learn.model[i].weight for i in (0,3)]
def eager(**kw): return VariationalDropConnect(**dict(dict(sigma_lr=.5, warm=.1, kl=5), **kw))      # removes weights within a few steps


def test_noise_is_removed_held_and_the_model_stays_plain(tmp_path):
    learn = fit(make_learn(eager(), path=tmp_path))
    plain = make_learn()
    assert list(learn.model.state_dict())==list(plain.model.state_dict()) and not any(m._forward_hooks for m in learn.model.modules())
    zeros = [w.detach()==0 for w in hidden(learn)]
    share = sum(z.sum() for z in zeros)/sum(z.numel() for z in zeros)
    assert 0 < share < 1 and learn.variational_drop_connect.zero_share()==pytest.approx(share.item())
    assert (learn.model[5].weight!=0).all()
    def check(learn, name): assert not any(w.detach()[z].any() for w,z in zip(hidden(learn), zeros))
    fit(learn, 2, cbs=Each(check, 'after_step'))
    learn.save('m')
    other = make_learn(VariationalDropConnect(), path=tmp_path, seed=3).load('m')
    fit(other, 1, cbs=Each(check, 'after_step'))
    learn.remove_cb(learn.variational_drop_connect)
    fit(learn, 1)
    assert any(w.detach()[z].any() for w,z in zip(hidden(learn), zeros)) and not learn.model._state_dict_hooks


def test_the_loss_that_is_shown_is_the_loss_of_the_data():
    seen = []
    def look(learn, name):
        learn.model.eval()
        seen.append((learn.loss.item(), F.mse_loss(learn.pred, learn.yb[0]).item()))
        learn.model.train()
    fit(make_learn(eager()), 1, cbs=Each(look, 'after_loss'))
    assert all(a==pytest.approx(b) for a,b in seen)


def test_gradients_are_those_of_the_divergence_at_the_end_of_the_warm_up():
    learn,grads = make_learn(VariationalDropConnect(warm=0, kl=2)),{}
    def before(learn, name): grads['data'] = [w.grad.clone() for w in hidden(learn)]
    class Before(Each): order = VariationalDropConnect.order-1
    class After(Each): order = VariationalDropConnect.order+1
    def after(learn, name):
        if 'ok' in grads: return
        n = len(learn.dls.train_ds)
        for w,was in zip(hidden(learn), grads['data']):
            by_weight,_ = kl_gradients(w.detach(), torch.full_like(w, -10))
            assert torch.allclose(w.grad-was, by_weight*2*2*learn.loss.item()/n, rtol=1e-3, atol=1e-5)
        grads['ok'] = True
    fit(learn, 1, cbs=[Before(before, 'before_step'), After(after, 'before_step')])
    assert grads['ok']


def test_the_scale_of_mixed_precision_is_taken_into_account():
    a,b = [fit(make_learn(eager()), 3, cbs=cbs) for cbs in (None, Scaled())]
    assert all(torch.equal(v, w) for v,w in zip(hidden(a), hidden(b)))


def test_accumulation_adds_the_divergence_once(monkeypatch):
    from fastai_dropconnect.callback import variational
    calls = []
    monkeypatch.setattr(variational, 'kl_gradients', lambda *args: calls.append(1) or kl_gradients(*args))
    fit(make_learn(VariationalDropConnect()), 1, cbs=GradientAccumulation(32))
    assert len(calls)==3*2      # 96 rows in batches of 16, a step for 32 rows; two layers


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_broken_fit_leaves_no_hooks(error):
    def stop(learn, name): raise error('stop')
    learn = make_learn(eager())
    with pytest.raises(error): fit(learn, 1, cbs=Each(stop, 'after_backward'))
    assert not any(m._forward_hooks for m in learn.model.modules()) and not learn.variational_drop_connect.record.masks
    fit(learn)
    assert learn.variational_drop_connect.record.masks


def test_lr_find_changes_nothing_and_other_layers_are_refused(tmp_path):
    learn = make_learn(eager(), path=tmp_path)
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=6, suggest_funcs=None)
    assert not learn.variational_drop_connect.record.masks
    with pytest.raises(TypeError, match='must select nn.Linear or nn.Conv2d, got 2 of type BatchNorm1d'): fit(make_learn(VariationalDropConnect(layers=['2'])), 1)
    members = make_learn(VariationalDropConnect())
    members.model[3] = EnsembleLinear(6, 4, n_members=2)
    with pytest.raises(TypeError, match='got 3 of type EnsembleLinear'): fit(members, 1)
    ensemble = make_learn(VariationalDropConnect(), model=TabularDropConnectModel([], 4, 1, [6,5], members=2))
    with pytest.raises(TypeError, match='got layers.0.0 of type MaskedEnsembleLinear'): ensemble.variational_drop_connect.selected()
    for kw in (dict(kl=0), dict(sigma_lr=-1), dict(warm=1)):
        with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): VariationalDropConnect(**kw)


def test_snapshots_before_the_removal_are_refused(tmp_path):
    learn = make_learn(eager(), path=tmp_path)
    with pytest.raises(ValueError, match='remove variational_drop_connect'): learn.fit_zero_restarts(2, 1)
    assert not learn.variational_drop_connect.record.masks
    fit(learn)
    learn.fit_zero_restarts(2, 1)       # removed already
    zeros = [~m for m in map(learn.variational_drop_connect.record.__getitem__, learn.variational_drop_connect.record)]
    for c in learn.snapshot_ensemble.record:
        state = learn.snapshot_ensemble.record[c]
        assert not any(state[n][z].any() for n,z in zip(learn.variational_drop_connect.record, zeros))


def check_resumed(new): # `new` makes a Learner with the callback last, and a path
    "Check that a run that goes on from a file equals one that was not interrupted"
    def save(learn, name): learn.save(f'e{learn.epoch}', with_opt=False)
    whole = fit(new(), 4, cbs=[Seed(), Each(save, 'after_epoch')])
    resumed = new().load('e1')
    fit(resumed, 4, start_epoch=2, cbs=Seed())
    assert all(torch.equal(v, w) for v,w in zip(hidden(whole), hidden(resumed))) and not resumed.cbs[-1].record.progress
    anew = new().load('e3')             # the fit had not ended yet: what was learned is there, and no masks
    record = anew.cbs[-1].record
    assert record.progress and not record.masks
    anew.load('e0').remove_cb(anew.cbs[-1])
    assert not record.progress

def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path): check_resumed(lambda: make_learn(eager(), path=tmp_path, opt_func=SGD))
