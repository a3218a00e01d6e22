"`recalibrate_bn` and `RecalibrateBN` change the statistics of batch norm and nothing else, whatever happens"
import contextlib, io
import pytest, torch
import torch.nn.functional as F
from fastai.tabular.all import Callback, CancelFitException, DataLoaders, L, Learner, ProgressCallback, SaveModelCallback, noop, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import batchnorm


def make_learn(*cbs, p=.5, n=64, bs=16, seed=0, **kw):
    set_seed(seed)
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    ds = TensorDataset(x, x.prod(1, keepdim=True)+x[:,:1])
    model = nn.Sequential(DropConnectLinear(4, 12, p=p, mode='batch'), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12,1), nn.BatchNorm1d(1))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=True, device='cpu', num_workers=0), model, F.mse_loss, cbs=L(cbs), **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def stats(learn): return {n:t.clone() for n,t in learn.model.named_buffers()}
def params(learn): return {n:t.detach().clone() for n,t in learn.model.named_parameters()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def as_after_recalibration(learn): return same(stats(learn), stats(recalibrate_bn(learn)))


def test_statistics_are_those_of_the_network_without_noise():
    learn = make_learn()
    learn.fit(1, 1e-2)
    before = params(learn)
    recalibrate_bn(learn)
    x = learn.dls.train_ds.tensors[0]
    hidden = F.linear(x, learn.model[0].weight, learn.model[0].bias)
    torch.testing.assert_close(learn.model[1].running_mean, hidden.mean(0))
    assert same(params(learn), before) and learn.model[1].num_batches_tracked==4


def test_batches_count_by_their_rows_and_single_rows_not_at_all():
    learn = make_learn()
    x = torch.randn(41, 4)
    recalibrate_bn(learn, [(x[:25], x[:25,:1]), (x[25:40], x[25:40,:1]), (x[40:], x[40:,:1])])
    hidden = F.linear(x, learn.model[0].weight, learn.model[0].bias)
    torch.testing.assert_close(learn.model[1].running_mean, hidden[:40].mean(0))
    torch.testing.assert_close(learn.model[1].running_var, (25*hidden[:25].var(0)+15*hidden[25:40].var(0))/40)


def test_without_batch_norm_or_statistics_nothing_happens():
    learn = make_learn()
    learn.model = nn.Sequential(nn.Linear(4,1), nn.BatchNorm1d(1, track_running_stats=False))
    assert recalibrate_bn(learn, dl=[]) is learn


@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_error_in_the_middle_leaves_everything_as_it_was(error):
    learn = make_learn()
    learn.fit(1, 1e-2)
    learn.model.train()
    learn.model[3].eval()
    x = torch.randn(16, 4)
    def batches():
        yield x,x[:,:1]
        raise error
    before = stats(learn),params(learn),[m.training for m in learn.model],torch.get_rng_state()
    with pytest.raises(type(error)): recalibrate_bn(learn, batches())
    assert same(stats(learn), before[0]) and same(params(learn), before[1])
    assert [m.training for m in learn.model]==before[2] and learn.model[1].momentum==.1
    assert torch.equal(torch.get_rng_state(), before[3])


def test_no_rows_are_an_error_that_changes_nothing():
    learn = make_learn()
    learn.fit(1)
    before = stats(learn)
    for dl in ([], [(torch.randn(1,4), torch.randn(1,1))]):
        with pytest.raises(ValueError, match='`dl` must have a batch of two rows or more'): recalibrate_bn(learn, dl)
    assert same(stats(learn), before)


@pytest.mark.parametrize('every_epoch,n', [(False,1), (True,3)])
def test_before_the_last_validation_or_before_each(every_epoch, n):
    class Fresh(Callback):
        order = RecalibrateBN.order+1
        def __init__(self): self.fresh = []
        def before_validate(self): self.fresh.append(self.learn.model[1].num_batches_tracked.item()==4)
    learn = make_learn(RecalibrateBN(every_epoch), seen := Fresh())
    learn.fit(3, 1e-2)
    assert sum(seen.fresh[:3])>=n and seen.fresh[2] and as_after_recalibration(learn)
    learn.fit(1, 1e-2)
    assert as_after_recalibration(learn)


def test_the_callback_does_not_change_the_training():
    a,b = make_learn(RecalibrateBN(every_epoch=True)),make_learn()
    for l in (a,b):
        set_seed(3)
        l.fit(3, 1e-2)
    assert same(params(a), params(b))


def test_best_weights_and_a_cancelled_fit(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.learn.train_iter==6: raise CancelFitException
    with contextlib.redirect_stdout(io.StringIO()):
        learn = make_learn(RecalibrateBN(), path=tmp_path)
        learn.fit(3, .3, cbs=SaveModelCallback(fname='best'))
        assert as_after_recalibration(learn)
        learn.fit(3, 1e-2, cbs=Stop())
        assert as_after_recalibration(learn)


def test_validation_predictions_and_lr_find_change_nothing():
    learn = make_learn(RecalibrateBN())
    learn.fit(1, 1e-2)
    torch.manual_seed(0)
    learn.model[1].running_mean.add_(1)
    before = stats(learn)
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=5, suggest_funcs=None)
    assert same(stats(learn), before)


def test_a_validation_in_the_middle_of_a_fit():
    "The callback recalibrates at the end of the fit, not at the end of the validation"
    class Peek(Callback):
        order = 90
        def after_batch(self):
            if not self.training or self.learn.iter!=3: return
            own = self.learn.iter,self.learn.n_iter,self.learn.dl
            before = stats(self.learn)
            self.learn.validate()
            assert same(stats(self.learn), before)
            self.learn.model.train()
            self.learn.training = True
            self.learn.iter,self.learn.n_iter,self.learn.dl = own
    learn = make_learn(RecalibrateBN(), Peek())
    learn.fit(1, 1e-2)
    assert as_after_recalibration(learn)

@pytest.mark.parametrize('every_epoch,want', [(False, [2]), (True, [0,1,2])])
def test_statistics_are_recalibrated_before_the_validations_that_were_asked_for(every_epoch, want, monkeypatch):
    learn,epochs = make_learn(RecalibrateBN(every_epoch)),[]
    monkeypatch.setattr(batchnorm, 'recalibrate_bn', lambda learn: epochs.append(learn.epoch))
    learn.fit(3, 1e-2)
    assert epochs==[*want, 2]       # once more after the fit

def test_statistics_stay_where_no_step_was_taken(monkeypatch):
    learn,epochs = make_learn(RecalibrateBN(True)),[]
    monkeypatch.setattr(batchnorm, 'recalibrate_bn', lambda learn: epochs.append(learn.epoch))
    learn.dls.train.n = 0       # no batches
    learn.fit(2, 1e-2)
    assert epochs==[]
