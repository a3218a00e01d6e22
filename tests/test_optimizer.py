"FusedAdam takes fastai's steps: same state, same schedules, same weights up to rounding"
import pickle
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.basics import params
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.optimizer import Adam, OptimWrapper, ranger, SGD
from fastai.tabular.all import set_seed, tabular_learner
from fastai_dropconnect.optimizer import FusedAdam, convert_adam, is_adam
from torch import nn
from conftest import make_dls

CLOSE = dict(atol=2e-6, rtol=0)

def groups(model): return [params(model.embeds)+params(model.bn_cont), *map(params, model.layers)]

def trained(opt_func, *fits, layers=(20,10), **kwargs):
    "Return a Learner with parameter groups on which `fits` were called"
    set_seed(0)
    learn = tabular_learner(make_dls(), layers=list(layers), opt_func=opt_func, splitter=groups, **kwargs)
    with learn.no_bar(),learn.no_logging():
        for f in fits:
            set_seed(1)
            f(learn)
    return learn

def assert_same(ours, theirs, close=CLOSE):
    for a,b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True): torch.testing.assert_close(a, b, **close)
    for a,b in zip(ours.opt.state_dict()['state'], theirs.opt.state_dict()['state'], strict=True):
        assert a.keys()==b.keys() and a.get('step')==b.get('step') and a.get('do_wd')==b.get('do_wd')
        for k in ('grad_avg','sqr_avg'):
            if k in a: torch.testing.assert_close(a[k], b[k], **close)

def schedule_of_all(learn):
    "Change every hyperparameter in each step"
    sched = {h: combined_cos(.25, a, b, c) for h,a,b,c in
             [('lr',1e-3,1e-2,1e-4), ('mom',.95,.8,.9), ('wd',.2,.01,.1), ('sqr_mom',.999,.9,.99), ('eps',1e-3,1e-6,1e-5)]}
    learn.fit(3, cbs=ParamScheduler(sched))

FITS = dict(one_cycle=[lambda l: l.fit_one_cycle(3, 1e-2)], slices=[lambda l: l.fit_one_cycle(3, slice(1e-4, 1e-2))],
            all_hypers=[schedule_of_all], fine_tune=[lambda l: l.fine_tune(2, 1e-2)],
            frozen=[lambda l: l.freeze_to(-2), lambda l: l.fit(1, 1e-3), lambda l: l.unfreeze(), lambda l: l.fit(2, 1e-3)],
            reset=[lambda l: l.fit(1, 1e-2), lambda l: l.opt.clear_state(), lambda l: l.fit(2, 1e-2)],
            reset_opt=[lambda l: l.fit(1, 1e-2), lambda l: l.fit(2, 1e-2, reset_opt=True)],
            lr_find=[lambda l: l.fit(1, 1e-2), lambda l: l.lr_find(num_it=15, show_plot=False), lambda l: l.fit(1, 1e-2)])
OPTIONS = dict(default={}, l2=dict(decouple_wd=False), strong=dict(wd=.3), no_wd=dict(wd=0.), moments=dict(mom=.7, sqr_mom=.9, eps=1e-3))


@pytest.mark.parametrize('fits', FITS)
def test_fits_end_with_the_weights_of_adam(fits):
    ours,theirs = trained(FusedAdam, *FITS[fits]),trained(Adam, *FITS[fits])
    assert type(ours.opt) is FusedAdam
    # an `eps` of 1e-6 enlarges what CPUs round differently: 2.5e-6 in weights, 6.6e-6 in momentum on an AMD EPYC
    assert_same(ours, theirs, dict(rtol=0, atol=2e-5) if fits=='all_hypers' else CLOSE)


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('learner', [dict(), dict(wd_bn_bias=True), dict(train_bn=False)])
def test_options_of_the_optimizer(options, learner):
    kwargs = OPTIONS[options]
    one_cycle = FITS['one_cycle'] if options!='strong' else [lambda l: l.fit_one_cycle(3, 1e-2, wd=.3)]
    assert_same(*(trained(partial(cls, **kwargs), *one_cycle, **learner) for cls in (FusedAdam,Adam)))


def test_slices_of_lr_at_construction():
    ps = [[nn.Parameter(torch.ones(1))] for _ in range(3)]
    assert FusedAdam(ps, lr=slice(1e-4, 1e-2)).hypers == Adam(ps, lr=slice(1e-4, 1e-2)).hypers


def steps(opt_func, ps, grads):
    "Set the gradients of each step on copies of `ps`; `None` is no gradient, 0 a gradient of zeros"
    ps = [nn.Parameter(p.clone()) for p in ps]
    opt = opt_func(ps, lr=.1)
    for gs in grads:
        for p,g in zip(ps, gs):
            if g is not None: p.grad = torch.zeros_like(p) if isinstance(g, int) else g
        opt.step()
        yield [p.detach().clone() for p in ps]
        for p in ps: p.grad = None


@pytest.mark.parametrize('decouple_wd', [True,False])
def test_parameters_without_a_gradient_rest_and_zero_gradients_move(decouple_wd):
    ps,g = [torch.ones(3), torch.ones(2)],torch.randn(3)
    def grads(): return [(g.clone(),None), (0,torch.ones(2)), (None,0), (g.clone(),0), (None,None)]
    ours,theirs = ([*steps(partial(cls, decouple_wd=decouple_wd), ps, grads())] for cls in (FusedAdam,Adam))
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b, **CLOSE)
    assert torch.equal(ours[0][1], ps[1]) and not torch.equal(ours[2][1], ours[1][1]) and torch.equal(ours[4][0], ours[3][0])


def test_zero_grad_leaves_tensors_of_zeros():
    lin = nn.Linear(2, 1)
    opt = FusedAdam(list(lin.parameters()), lr=.1)
    opt.zero_grad()                                     # no gradient yet
    assert lin.weight.grad is None
    (lin(torch.ones(1, 2))**2).sum().backward(create_graph=True)
    grad = lin.weight.grad
    opt.zero_grad()
    assert lin.weight.grad is grad and not grad.any() and grad.grad_fn is None and not grad.requires_grad
    emb = nn.Embedding(3, 2, sparse=True)
    opt = FusedAdam(list(emb.parameters()), lr=.1)
    emb(torch.tensor([1])).sum().backward()
    opt.zero_grad()
    assert not emb.weight.grad.to_dense().any()


LAYOUTS = dict(grad=lambda g: g.t().contiguous().t(), expanded=lambda g: g[:,:1].expand(-1, g.shape[1]), sliced=lambda g: g.repeat(1, 2)[:,::2])

@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_of_gradients(layout):
    p,g = torch.randn(4, 3),torch.randn(4, 3)
    grads = [(LAYOUTS[layout](g),), (g,), (LAYOUTS[layout](2*g),)]
    for a,b in zip(steps(FusedAdam, [p], grads), steps(Adam, [p], grads)): torch.testing.assert_close(a, b, **CLOSE)


ORDERS = dict(channels_last=lambda m: m.to(memory_format=torch.channels_last), turned=lambda m: setattr(m, 'weight', nn.Parameter(m.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))) or m)

@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('half_way', [False,True])
def test_strides_of_parameters(order, half_way, monkeypatch):
    "Weights in another order take the fused kernel; those that have changed their order on the way end where they should"
    conv = nn.Conv2d(3, 4, 2)
    if not half_way: conv = ORDERS[order](conv)
    twin = deepcopy(conv)
    plain = []
    monkeypatch.setattr(FusedAdam, '_plain_step', lambda self, p, hypers, step=FusedAdam._plain_step: plain.append(p) or step(self, p, hypers))
    for model,cls in ((conv,FusedAdam), (twin,Adam)):
        opt = cls(list(model.parameters()), lr=.1)
        torch.manual_seed(0)
        for i in range(4):
            model(torch.randn(2, 3, 4, 4)).pow(2).sum().backward()
            opt.step()
            opt.zero_grad()
            if half_way and i==1: model.weight.data = ORDERS[order](deepcopy(model)).weight.data
    torch.testing.assert_close(conv.weight, twin.weight, **CLOSE)
    assert conv.weight.stride()!=(12,4,2,1) and len(plain)==(2 if half_way else 0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    p,grads = torch.randn(5, dtype=dtype),[(torch.randn(5, dtype=dtype),) for _ in range(4)]
    for a,b in zip(steps(FusedAdam, [p], grads), steps(Adam, [p], grads)): torch.testing.assert_close(a, b, atol=1e-12 if dtype is torch.float64 else 0, rtol=0)


def test_checkpoints_move_both_ways(tmp_path):
    fit = FITS['one_cycle'][0]
    want = trained(Adam, fit, fit)
    for one,other in ((Adam,FusedAdam), (FusedAdam,Adam)):
        trained(one, fit).save(tmp_path/'half')
        again = trained(other, lambda l: l.load(tmp_path/'half'), fit)
        assert_same(again, want)
    opt = trained(FusedAdam, fit).opt
    twin = pickle.loads(pickle.dumps(opt))
    assert type(twin) is FusedAdam and twin.hypers==opt.hypers


def test_steps_after_a_copy_do_not_reach_the_original():
    learn = trained(FusedAdam, FITS['one_cycle'][0])
    before = deepcopy(learn.model.state_dict())
    twin = deepcopy(learn)
    with twin.no_bar(),twin.no_logging(): twin.fit(1, 1e-2)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert not torch.equal(twin.model.layers[0][0].weight, learn.model.layers[0][0].weight)


def test_only_adam_is_converted():
    ps = [nn.Parameter(torch.ones(2))]
    for decouple in (True,False):
        opt = Adam(ps, lr=.1, wd=.3, decouple_wd=decouple)
        fused = convert_adam(opt, FusedAdam)
        assert is_adam(opt) and fused.decouple_wd is decouple and fused.hypers[0]['wd'] == .3 and is_adam(convert_adam(fused, Adam))
    others = [SGD(ps, lr=.1), ranger(ps, lr=.1), OptimWrapper(ps, torch.optim.Adam, lr=.1), FusedAdam(ps, lr=.1), None]
    assert not any(map(is_adam, others))
    opt.cbs.append(lambda p, **kwargs: None)
    assert not is_adam(opt)


def test_a_closure_is_refused():
    with pytest.raises(NotImplementedError, match='closure'): FusedAdam([nn.Parameter(torch.ones(1))], lr=.1).step(lambda: 0)


def test_repeats_bit_for_bit():
    a,b = (trained(FusedAdam, *FITS['one_cycle']) for _ in range(2))
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


