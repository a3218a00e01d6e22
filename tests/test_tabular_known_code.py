"Batches share what the first has looked up, only where known code runs, and nothing changes: losses, parameters, gradients that callbacks see"
from functools import partial
import pytest, torch, torch.nn.functional as F
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.tabular.all import BaseLoss, Callback, L1LossFlat, Lambda, MSELossFlat, params, rmse, set_seed
from torch import nn
from fastai_dropconnect import accelerate
from fastai_dropconnect.all import *
from fastai_dropconnect.optimizer import RepeatedStep, repeat_step
from fastai_dropconnect.tabular import known_code, one_pass
from fastai_dropconnect.tabular.known_code import is_known
from conftest import make_dls

@pytest.fixture
def used(monkeypatch):
    "How many steps were repeated, and how many lookups were fixed"
    count = dict(steps=0, lookups=0)
    def counted(cls, method, name):
        shipped = getattr(cls, method)
        def call(*args):
            count[name] += 1
            return shipped(*args)
        monkeypatch.setattr(cls, method, call)
    counted(RepeatedStep, 'step', 'steps')
    counted(one_pass.FixedLookup, '__call__', 'lookups')
    return count

def learner(**kwargs):
    set_seed(0)
    learn = tabular_learner(make_dls(), layers=[20,10], fast=True, **kwargs)
    learn.remove_cb(learn.progress)
    return learn

def trained(learn, n=2, change=lambda learn: None):
    change(learn)
    set_seed(1)
    with learn.no_logging(): learn.fit_one_cycle(n, 1e-2)
    return learn

def looking(monkeypatch):
    "Let each batch look for itself, as if unknown code ran"
    monkeypatch.setattr(accelerate, 'keeps_tensors', lambda learn: False)

def assert_equal(a, b):
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k
    assert torch.equal(torch.stack(list(a.recorder.losses)), torch.stack(list(b.recorder.losses)))
    for s,t in zip(a.opt.state_dict()['state'], b.opt.state_dict()['state'], strict=True):
        assert s.keys()==t.keys() and s.get('step')==t.get('step')
        for k in ('grad_avg','sqr_avg'): assert k not in s or torch.equal(s[k], t[k])

def by_parts(model): return [params(model.embeds), params(model.bn_cont)+params(model.layers)]

STEADY = dict(plain={}, clipped=dict(cbs=lambda: GradientClip(.1)), metrics=dict(metrics=[rmse]), mae=dict(loss_func=L1LossFlat()),
    example=dict(config=lambda: tabular_dropconnect_config(weight_p=.2, embed_weight_p=.1)),
    members=dict(config=lambda: tabular_dropconnect_config(members=3)), vectors=dict(config=lambda: tabular_dropconnect_config(num_embeddings=PLE(4, bins=8))), frozen_zero=dict(cbs=lambda: FrozenZeroInit(.5, seed=3)),
    all_zero=dict(cbs=lambda: FrozenZeroInit(.5, seed=3, layers=lambda n,m: hasattr(m, 'weight') and m.weight.ndim==2)),
    pruned=dict(cbs=lambda: GradualPruning(4)), lasso=dict(cbs=lambda: GroupLasso()), recalibrated=dict(cbs=lambda: RecalibrateBN()),
    l2=dict(opt_func=partial(FusedAdam, decouple_wd=False)), no_decay=dict(wd_bn_bias=True), groups=dict(splitter=by_parts))

def made(name): return learner(**{k: v() if k in ('cbs','config') else v for k,v in STEADY[name].items()})

@pytest.mark.parametrize('name', STEADY)
def test_the_same_network_bit_for_bit(used, monkeypatch, name):
    a = trained(made(name))
    assert used == dict(steps=28, lookups=28)           # of 30 batches in two epochs, all but the first of each
    looking(monkeypatch)
    assert_equal(a, trained(made(name)))
    assert used['steps']==28


def half_frozen(learn):
    learn.model.embeds[1].requires_grad_(False)
    learn.model.layers[0][0].weight.requires_grad_(False)
def frozen_group(learn): learn.freeze()
def with_hook(learn): learn.model.embeds[0].weight.register_hook(lambda g: 2*g)
def double_(p): p.grad.mul_(2)
def with_late_hook(learn): learn.model.embeds[0].weight.register_post_accumulate_grad_hook(double_)
CHANGES = dict(half_frozen=(half_frozen, True), frozen_group=(frozen_group, False), hook=(with_hook, False), late_hook=(with_late_hook, False))

@pytest.mark.parametrize('name', CHANGES)
def test_tables_that_autograd_must_see(used, monkeypatch, name):
    change,fixed = CHANGES[name]
    def run(): return trained(learner(splitter=by_parts), change=change)
    a = run()
    assert used['steps']==28 and used['lookups']==28*fixed
    looking(monkeypatch)
    assert_equal(a, run())


def test_a_table_that_the_optimizer_does_not_train_collects_its_gradients(used, monkeypatch):
    def run(): return trained(learner(splitter=lambda m: [params(m.layers)]))
    a = run()
    assert used == dict(steps=28, lookups=0)
    looking(monkeypatch)
    b = run()
    assert_equal(a, b)
    for e,f in zip(a.model.embeds, b.model.embeds): assert torch.equal(e.weight.grad, f.weight.grad) and e.weight.grad.any()


def test_gradients_that_callbacks_see(used, monkeypatch):
    "A callback of this module counts as known here, to look into batches that share a step"
    class Looks(Callback):
        keeps_tensors = True
        def after_backward(self): seen.append([p.grad.clone() for p in self.model.parameters()])
        def after_step(self): seen.append([p.grad.clone() for p in self.model.parameters()])
        def after_batch(self):
            if self.training: seen.append([p.grad.clone() for p in self.model.parameters()])
    monkeypatch.setattr(known_code, '_packages', (*known_code._packages, __name__))
    def run():
        seen.clear()
        trained(learner(cbs=Looks()), 1)
        return list(seen)
    seen = []
    a = run()
    assert used['lookups']==14
    looking(monkeypatch)
    for gs,hs in zip(a, run(), strict=True):
        for g,h in zip(gs, hs, strict=True): assert torch.equal(g, h)
    assert not any(g.any() for g in a[-1]) and all(g.any() for g in a[-2])


class Reads(Callback):
    def after_backward(self): self.sizes = [p.grad.norm() for p in self.model.parameters()]
class Unhurried(Callback):
    def __call__(self, event_name): pass
class MyReLU(nn.ReLU): pass
def my_loss(pred, y): return (pred-y).square().mean()
def own_method(learn): learn._step = lambda: learn.opt.step()
def own_step(learn):
    learn.create_opt()
    shipped = learn.opt.step
    learn.opt.step = lambda: shipped()
def own_module(learn): learn.model.layers[0][1] = MyReLU()
def hooked_module(learn): learn.model.layers[0].register_forward_hook(lambda m, args, out: 2*out)
def own_loader(learn): learn.dls.train.after_iter = lambda: None
def train_metrics(learn): learn.recorder.train_metrics = True
def set_loss(learn): learn.loss_func = my_loss
UNKNOWN = dict(callback=lambda l: l.add_cb(Reads()), every_event=lambda l: l.add_cb(Unhurried()), accumulation=lambda l: l.add_cb(GradientAccumulation(64)),
               method=own_method, step=own_step, module=own_module, hook=hooked_module, loader=own_loader, metrics=train_metrics, loss=set_loss)

@pytest.mark.parametrize('name', UNKNOWN)
@pytest.mark.filterwarnings('ignore:fastai makes the batches')
def test_unknown_code_is_not_trusted(used, name):
    trained(learner(), 1, change=UNKNOWN[name])
    assert used == dict(steps=0, lookups=0)


def test_somebody_watches_torch(used):
    with torch.autograd.set_detect_anomaly(True): trained(learner(), 1)
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    trained(learner(), 1)
    hook.remove()
    assert used == dict(steps=0, lookups=0)


def test_callbacks_that_come_in_a_fit_end_it(used):
    "A known callback adds one that is not"
    class Adds(Callback):
        def before_train(self):
            if self.epoch==1: self.learn.add_cb(Reads())
    learn = learner()
    with learn.no_logging(): learn.fit(3, cbs=Adds())
    assert used['steps']==14 and len(learn.reads.sizes)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_broken_batch_ends_it(used, monkeypatch, error):
    def run():
        learn = learner()
        def breaks(x): raise error('stop')
        def at_five():
            if learn.opt.state_dict()['state'][0].get('step')==5: learn.model.layers[0][0].forward = breaks
        with monkeypatch.context() as m:
            m.setattr(known_code, '_callbacks', (*known_code._callbacks, Stops))
            learn.add_cb(Stops(at_five))
            with pytest.raises(error): trained(learn, 1)
        learn.remove_cb(Stops)
        vars(learn.model.layers[0][0]).pop('forward')
        assert learn._call_one._steady is None
        return trained(learn, 1)
    class Stops(Callback):
        def __init__(self, f): self.f = f
        def before_batch(self): self.f()
    a = run()
    assert used['steps']==4+14
    looking(monkeypatch)
    assert_equal(a, run())


def test_a_batch_that_looks_up_twice(used, monkeypatch):
    class Twice(one_pass.OnePassTabularModel):
        def forward(self, x_cat, x_cont): return super().forward(x_cat, x_cont)+super().forward(x_cat.flip(0), x_cont)
    monkeypatch.setattr(known_code, '_packages', (*known_code._packages, __name__))
    def change(learn): learn.model.__class__ = Twice
    a = trained(learner(), change=change)
    assert used == dict(steps=28, lookups=28)
    looking(monkeypatch)
    assert_equal(a, trained(learner(), change=change))


def test_what_is_known():
    for f in (nn.Sequential(nn.Linear(2, 1), nn.ReLU()), MSELossFlat(), F.mse_loss): assert is_known(f)
    for f in (nn.Sequential(MyReLU()), my_loss, partial(F.mse_loss), BaseLoss(MyReLU), Lambda(my_loss)): assert not is_known(f)
    lin = nn.Linear(2, 1)
    lin.itself = loop = MSELossFlat()
    loop.owner = lin
    assert is_known(lin) and is_known(loop)


# the step

def test_only_plain_steps_are_repeated():
    def opt(*params, **kwargs):
        res = FusedAdam(list(params), lr=.1, **kwargs)
        for p in params: p.grad = torch.ones_like(p)
        res.step()
        return res
    a,b = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    assert repeat_step(opt(a, b)) is not None
    assert repeat_step(opt(nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))) is None
    o = opt(a, b)
    b.grad = None
    assert repeat_step(o) is None               # it may get one in the next batch
    b.requires_grad_(False)
    assert [id(p) for p in repeat_step(o).params()]==[id(a)]
    o.clear_state()
    assert repeat_step(o) is None
