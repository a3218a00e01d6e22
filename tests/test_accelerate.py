"`accelerate` changes the time of training, not what callbacks see or what the network becomes; `decelerate` undoes it"
import gc, pickle, warnings, weakref
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import CancelBatchException, CancelFitException, CancelStepException, Learner, Recorder, load_learner
from fastai.optimizer import Adam, OptimWrapper, SGD, ranger
from fastai.tabular.all import Callback, TabularDataLoaders, event, mae, params, rmse, set_seed
from fastai.tabular.core import TabDataLoader, TabWeightedDL
from fastai_dropconnect.all import *
from fastai_dropconnect.accelerate import LeanEvents, fast_loaders
from fastai_dropconnect.optimizer import FusedAdam
from fastai_dropconnect.tabular.loader import FastTabDL
from conftest import make_dls, make_table

CLOSE = dict(atol=1e-5, rtol=0)
fast = partial(Learner.accelerate, replacement=True, valid_bs=32)       # the draws and batches of fastai

def plain(learn): return learn

def learner(**kwargs):
    set_seed(0)
    return tabular_learner(make_dls(), layers=[20,10], **kwargs)

def quietly(f, learn, *args, **kwargs):
    with learn.no_bar(),learn.no_logging(): return f(*args, **kwargs)

def fit(learn, n=2, lr=1e-2, **kwargs):
    set_seed(1)
    quietly(learn.fit_one_cycle, learn, n, lr, **kwargs)
    return learn

def assert_same(a, b, **close):
    close = close or CLOSE
    for k,v in a.model.state_dict().items(): torch.testing.assert_close(v, b.model.state_dict()[k], **close)
    torch.testing.assert_close(torch.stack(list(a.recorder.losses)).as_subclass(torch.Tensor),
                               torch.stack(list(b.recorder.losses)).as_subclass(torch.Tensor), **close)
    np.testing.assert_allclose(np.array(a.recorder.values, float), np.array(b.recorder.values, float), atol=close['atol'])

def is_plain(learn): return not {*LeanEvents.replaced, '_opt_funcs'} & set(vars(learn))


def example_config(**kwargs): return tabular_dropconnect_config(weight_p=.2, **kwargs)

LEARNERS = dict(
    plain=dict(), metrics=dict(metrics=[rmse, mae]),
    example=dict(config=lambda: example_config()), gaussian=dict(config=lambda: example_config(mode='gaussian')),
    batch=dict(config=lambda: example_config(mode='batch')), members=dict(config=lambda: tabular_dropconnect_config(members=3)),
    callback=dict(cbs=lambda: DropConnect(.2)), frozen_zero=dict(cbs=lambda: FrozenZeroInit(.5, seed=3)),
    recalibrated=dict(cbs=lambda: RecalibrateBN()), clipped=dict(cbs=lambda: GradientClip(.1)),
    accumulated=dict(cbs=lambda: GradientAccumulation(64)), bf16=dict(cbs=lambda: MixedPrecision('bf16')),
    fp16=dict(cbs=lambda: MixedPrecision()))

def made(name): return learner(**{k: v() if callable(v) else v for k,v in LEARNERS[name].items()})

@pytest.mark.parametrize('name', LEARNERS)
def test_trains_the_same_network(name):
    a,b = fit(made(name)),fit(fast(made(name)))
    assert type(b.opt) is FusedAdam and type(b.dls.train) is FastTabDL and isinstance(b._call_one, LeanEvents)
    assert_same(a, b)


@pytest.mark.parametrize('opt_func', [SGD, partial(SGD, mom=.9), ranger])
def test_losses_are_the_same_bit_for_bit_with_the_same_optimizer(opt_func):
    a,b = fit(learner(opt_func=opt_func)),fit(fast(learner(opt_func=opt_func)))
    assert_same(a, b, atol=0, rtol=0)
    assert type(a.opt) is type(b.opt) and b.opt_func is opt_func


def test_zero_restarts_are_the_same():
    def restarts(change):
        learn = change(learner())
        set_seed(1)
        quietly(learn.fit_zero_restarts, learn, 2, 2, 1e-2, seed=1)
        return learn.get_preds()[0]
    torch.testing.assert_close(restarts(fast), restarts(plain), **CLOSE)


def test_a_seed_repeats_a_run_bit_for_bit():
    a,b = (fit(learner(config=example_config()).accelerate()) for _ in range(2))
    assert_same(a, b, atol=0, rtol=0)
    one = fit(learner().accelerate())
    state = deepcopy(one.model.state_dict())
    one.model.load_state_dict(learner().model.state_dict())
    one.opt = None
    fit(one)                                # the same loaders, in a second fit
    for k,v in one.model.state_dict().items(): assert torch.equal(v, state[k])


@pytest.mark.parametrize('order', [(fast,fit), (fit,fast), (fast,fit,Learner.decelerate), (fast,fit,fast), (fit,fast,Learner.decelerate),
                                   (fast,fit,deepcopy), (fast,fit,lambda l: pickle.loads(pickle.dumps(l)))])
def test_may_change_between_fits(order):
    a,b = learner(),learner()
    fit(fit(a))
    for f in order: b = f(b)
    fit(b)
    assert_same(a, b)
    assert b.opt.state_dict()['state'][0]['step'] == 2*len(b.dls.train)*2


def test_decelerate_gives_everything_back():
    learn = learner()
    dls = learn.dls
    assert learn.accelerate() is learn and learn.accelerate(valid_bs=64) is learn
    assert learn.dls.valid.bs == 64 and learn.dls.train is not dls.train
    assert learn.decelerate() is learn and learn.dls is dls and learn.opt_func is Adam and is_plain(learn)
    assert learn.decelerate() is learn


def test_what_was_changed_after_accelerate_stays():
    learn,other = learner().accelerate(),make_dls()
    learn.dls,learn.opt_func = other,SGD
    learn.decelerate()
    assert learn.dls is other and learn.opt_func is SGD and is_plain(learn)


def test_devices_follow():
    learn = learner().accelerate()
    learn.dls.to('meta')
    assert str(learn.decelerate().dls.device) == 'meta' and str(learn.dls.train.device) == 'meta'


def groups(model): return [params(model.embeds)+params(model.bn_cont), *map(params, model.layers)]

@pytest.mark.parametrize('change', [fast, lambda l: fast(l).decelerate()])
def test_frozen_groups_stay_frozen(change):
    def run(change):
        learn = learner(splitter=groups)
        learn.freeze_to(-1)
        fit(learn)
        before = [p.requires_grad for p in learn.model.parameters()]
        change(learn)
        assert [p.requires_grad for p in learn.model.parameters()] == before and not all(before)
        assert learn.opt.frozen_idx == 3
        fit(learn)
        learn.unfreeze()
        return fit(learn, lr=slice(1e-4, 1e-3))
    assert_same(run(plain), run(change))


def test_parameters_that_the_splitter_would_not_find_again():
    learn = fit(learner())
    learn.model.layers[0][0].weight.requires_grad_(False)           # `trainable_params` skips it now
    n = len(learn.opt.param_lists[0])
    assert len(learn.accelerate().opt.param_lists[0]) == n
    fit(learn)


def test_options_of_the_optimizer_stay():
    learn = fit(learner(opt_func=partial(Adam, sqr_mom=.9, decouple_wd=False), lr=slice(1e-4,1e-2)))
    fast(learn)
    assert not learn.opt.decouple_wd and learn.opt.hypers[0]['sqr_mom'] == .9 and learn.opt_func.keywords == dict(sqr_mom=.9, decouple_wd=False)
    learn.decelerate()
    assert learn.opt_func.func is Adam
    changed = fit(learner())
    changed.opt.cbs.append(lambda p, **kwargs: None)                # somebody's own function
    opt = changed.opt
    assert changed.accelerate().opt is opt
    own = learner(opt_func=FusedAdam).accelerate().decelerate()
    assert own.opt_func is FusedAdam
    wrapped = partial(OptimWrapper, opt=torch.optim.Adam)
    assert fit(learner(opt_func=wrapped).accelerate()).opt_func is wrapped


# loaders

def test_loaders_of_other_kinds_stay():
    class Mine(TabWeightedDL): pass
    dls = make_dls()
    dls.loaders = [dls.train.new(cls=Mine), dls.valid.new(after_iter=lambda *_: None), [1,2], dls.valid]
    dls.note = 'mine'
    res = fast_loaders(dls)
    assert [a is b for a,b in zip(res.loaders, dls.loaders)] == [True,True,True,False] and res.note == 'mine'
    assert type(res) is TabularDataLoaders and res.device == dls.device and res.path == dls.path


def test_settings_of_loaders():
    dls = make_dls()
    dls.loaders[0] = TabDataLoader(dls.train_ds, bs=32, shuffle=True, n=70, drop_last=False, device='cpu')
    res = fast_loaders(dls, valid_bs=50)
    assert [len(b[0]) for b in res.train] == [32,32,6] and [len(b[0]) for b in res.valid] == [50,50,20]
    dls.loaders[0] = TabWeightedDL(dls.train_ds, bs=32, shuffle=True, wgts=np.arange(480.))
    assert fast_loaders(dls).train.wgts[-1] == dls.train.wgts[-1]
    dls.loaders[0] = TabWeightedDL(dls.train_ds, bs=32, shuffle=True)
    assert fast_loaders(dls).train.wgts is None and fast_loaders(dls, replacement=True).train.wgts is not None


def test_epochs_see_each_row_once_by_default():
    seen = []
    class Rows(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.xb[1])
    learn = learner(cbs=Rows())
    fit(learn.accelerate(), 1)
    rows = torch.cat(seen)
    assert len(rows.unique(dim=0)) == len(rows) == 480


@pytest.mark.parametrize('kwargs', [dict(), dict(ds_idx=0), dict(with_input=True), dict(with_decoded=True), dict(with_loss=True), dict(reorder=False)])
def test_get_preds(kwargs):
    learn = fit(learner())
    want = quietly(learn.get_preds, learn, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='fastai makes the batches')
        got = quietly(learn.accelerate().get_preds, learn, **kwargs)
    def flat(o): return [t for x in o for t in (flat(x) if isinstance(x, (tuple,list)) else [x])]
    for a,b in zip(flat(got), flat(want), strict=True): torch.testing.assert_close(torch.Tensor(a), torch.Tensor(b), atol=1e-6, rtol=0)


def test_predict_show_and_validate(capsys):
    learn = fit(learner())
    df = make_table(10)
    want = learn.validate(),[learn.predict(r)[2] for _,r in df.iterrows()]
    learn.accelerate()
    assert list(learn.validate()) == pytest.approx(list(want[0]), rel=1e-4)
    for (_,row),w in zip(df.iterrows(), want[1]): torch.testing.assert_close(learn.predict(row)[2], w)
    learn.show_results(max_n=2)
    learn.dls.show_batch(max_n=2, unique=True)
    n = len(torch.cat([b[1] for b in learn.dls.train]).unique(dim=0))
    assert n == 480 and type(learn.dls.test_dl(df)) is FastTabDL


def test_lr_find_leaves_no_trace():
    def run(change, *steps):
        learn = change(fit(learner()))
        for s in steps: quietly(s, learn, learn)
        set_seed(2)
        return fit(learn)
    find = lambda l: l.lr_find(num_it=20, show_plot=False)
    assert_same(run(fast, find), run(plain, find))
    assert_same(run(fast, find), run(plain, find))


# export and copies

def test_an_export_has_no_rows(tmp_path):
    df = make_table()
    df['color'] = df.color.where(df.index!=3, 'red')
    df['b'] += 12345
    learn = fit(tabular_learner(make_dls(df), layers=[8], path=tmp_path).accelerate())
    x = make_table(20)
    want = quietly(learn.get_preds, learn, dl=learn.dls.test_dl(x))[0]
    learn.export()
    assert learn.dls.train.n == 480 and type(learn.opt) is FusedAdam
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    assert [len(dl.dataset) for dl in again.dls.loaders] == [0,0]
    assert (tmp_path/'export.pkl').stat().st_size < 60_000
    assert '_shipped' not in vars(again.dls) and again._call_one.learn is again
    torch.testing.assert_close(quietly(again.get_preds, again, dl=again.dls.test_dl(x))[0], want)
    again.decelerate()
    torch.testing.assert_close(quietly(again.get_preds, again, dl=again.dls.test_dl(x))[0], want)
    assert fit(learn) and learn.decelerate().dls.train.n == 480


def test_a_copy_is_its_own():
    learn = fit(learner().accelerate())
    before = deepcopy(learn.model.state_dict())
    twin = deepcopy(learn)
    assert twin._call_one.learn is twin and twin._with_events.__self__ is twin._call_one
    fit(twin)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert type(twin.decelerate().dls.train) is TabWeightedDL and isinstance(learn._call_one, LeanEvents)


# events

class Spy(Callback):
    def __init__(self, log, order=0): self.log,self.order = log,order
for name in vars(event):
    if name.startswith(('before_','after_')): setattr(Spy, name, lambda self, name=name: self.log.append((self.order, name, getattr(self.learn, 'training', None))))

class Everything(Callback):
    "Handles events without a method for each"
    def __init__(self, log): self.log = log
    def __call__(self, event_name): self.log.append(event_name)

def seen(change, *make, fits=1):
    log = []
    learn = change(learner(cbs=[m(log) for m in make]))
    log.clear()
    for _ in range(fits): fit(learn, 1)
    quietly(learn.validate, learn)
    quietly(learn.get_preds, learn)
    return log

@pytest.mark.parametrize('make', [(Spy,), (partial(Spy, order=60), partial(Spy, order=-20)), (Everything,), (Everything, Spy)])
def test_callbacks_see_the_same_events_in_the_same_order(make):
    assert seen(fast, *make) == seen(plain, *make)


@pytest.mark.parametrize('at', ['before_fit','before_epoch','before_batch','after_pred','after_loss','before_backward','before_step','after_step','after_batch'])
@pytest.mark.parametrize('error', [CancelBatchException, CancelStepException, CancelFitException])
def test_cancelled_events(at, error):
    def run(change):
        log = []
        class Cancels(Callback):
            order = 70
            count = 0
        def cancel(self):
            self.count += 1
            if self.count==2: raise error
        setattr(Cancels, at, cancel)
        learn = change(learner(cbs=[Spy(log), Cancels()]))
        try: fit(learn, 2)
        except error: log.append('raised')
        return log
    assert run(fast) == run(plain)


def test_methods_that_a_callback_gets_or_loses_during_a_fit():
    def run(change):
        log = []
        class Grows(Callback):
            def after_batch(self):
                if self.train_iter==3: self.before_step = lambda: log.append('step')
                if self.train_iter==6: del self.before_step
        return fit(change(learner(cbs=Grows())), 1) and log
    assert run(fast) == run(plain) == ['step']*3


def test_callbacks_that_come_and_go():
    def run(change):
        log = []
        learn = change(learner())
        class Adds(Callback):
            def before_train(self):
                if self.epoch==1: self.learn.add_cb(Spy(log))
            def after_train(self):
                if self.epoch==1: self.learn.remove_cb(Spy)
        fit(learn, 3, cbs=Adds())
        for _ in range(5):                  # a new callback may get the address of the last one
            cb = Spy(log)
            learn.add_cb(cb)
            fit(learn, 1)
            learn.remove_cb(cb)
            del cb
        return log
    assert run(fast) == run(plain) and run(fast)


def test_removed_callbacks_are_not_kept_alive():
    learn = learner().accelerate()
    cb = Spy([])
    fit(learn, 1, cbs=cb)
    gone = weakref.ref(cb)
    del cb
    gc.collect()
    assert gone() is None


def test_an_unknown_event():
    for change in (fast, plain):
        with pytest.raises(Exception, match='missing before_lunch'): change(learner())('before_lunch')


def test_learners_with_their_own_loop_keep_it():
    calls = []
    class Mine(TabularLearner):
        def _call_one(self, event_name):
            calls.append(event_name)
            super()._call_one(event_name)
    plain = learner()
    learn = Mine(plain.dls, plain.model, loss_func=plain.loss_func).accelerate()
    calls.clear()
    fit(learn, 1)
    assert 'after_batch' in calls and '_call_one' not in vars(learn) and is_plain(learn.decelerate())
    learn = learner()
    learn._with_events = mine = partial(Learner._with_events, learn)
    assert learn.accelerate()._with_events is mine and learn.decelerate()._with_events is mine


def test_dropconnect_may_come_and_go_later():
    def run(change, back):
        learn = fit(change(learner()))
        cb = DropConnect(.2)
        learn.add_cb(cb)
        fit(learn)
        learn.remove_cb(cb)
        return fit(back(learn))
    want = run(plain, plain)
    for back in (plain, Learner.decelerate): assert_same(run(fast, back), want)


def test_the_loss_is_the_loss_of_fastai():
    def run(change):
        class Losses(Callback):
            def after_loss(self): losses.append((self.loss.item(), self.loss_grad.requires_grad, self.training))
        losses = []
        fit(change(learner(cbs=Losses(), opt_func=SGD)), 1)
        return losses
    assert run(fast) == run(plain)
    class Odd(torch.Tensor): pass
    learn = fast(learner(loss_func=lambda p,y: ((p-y)**2).mean().as_subclass(Odd)))
    fit(learn, 1)
    assert type(learn.recorder.losses[0]) is Odd


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_broken_fit(error):
    class Breaks(Callback):
        def after_step(self):
            if self.train_iter==4: raise error('stop')
    def run(change, back):
        learn = change(learner())
        with pytest.raises(error): fit(learn, cbs=Breaks())
        back(learn)
        return fit(learn)
    want = run(plain, plain)
    for back in (plain, Learner.decelerate): assert_same(run(fast, back), want)
    broken = fast(learner())
    with pytest.raises(error): fit(broken, cbs=Breaks())
    assert is_plain(broken.decelerate())


def test_save_model_and_early_stopping(tmp_path):
    def run(change):
        learn = change(learner(path=tmp_path))
        return fit(learn, 6, lr=.3, cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=1)])
    a,b = run(plain),run(fast)
    assert len(a.recorder.values) == len(b.recorder.values)
    torch.testing.assert_close(a.validate()[0], b.validate()[0], atol=1e-3, rtol=0)


def test_train_metrics_and_recorder():
    def run(change):
        learn = change(learner())
        learn.recorder.train_metrics = True
        learn.metrics = [rmse, mae]
        return fit(learn)
    assert_same(run(plain), run(fast))
    assert type(fit(fast(learner())).recorder) is Recorder


def test_the_switch_of_tabular_learner():
    learn = tabular_learner(make_dls(), layers=[8], fast=True, config=tabular_dropconnect_config(members=2))
    assert type(learn.dls.train) is FastTabDL and learn.opt_func is FusedAdam and isinstance(learn._call_one, LeanEvents)
    assert is_plain(tabular_learner(make_dls(), layers=[8]))


def test_a_learner_of_another_kind():
    from fastai.data.all import DataLoaders
    from torch.utils.data import DataLoader, TensorDataset
    ds = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    def run(change):
        set_seed(0)
        dls = DataLoaders(DataLoader(ds, 16), DataLoader(ds, 16), device='cpu')
        learn = change(Learner(dls, torch.nn.Linear(3, 1), loss_func=torch.nn.functional.mse_loss))
        return fit(learn)
    assert_same(run(plain), run(fast))
