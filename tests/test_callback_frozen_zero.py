"`FrozenZeroInit` holds masked weights exactly where they are, after each step of any optimizer, in all fits"
import contextlib, copy, io, pickle, warnings
from functools import partial
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.tabular.all import (Adam, Callback, CancelFitException, DataLoaders, EarlyStoppingCallback, Lamb, Larc, Learner, Normalize, OptimWrapper,
                                ProgressCallback, QHAdam, RAdam, RMSProp, SaveModelCallback, SGD, TabularDataLoaders, load_learner, noop, params,
                                ranger, set_seed)
from fastcore.foundation import L
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.data import TensorDataset
from fastai_dropconnect.all import *
from fastai_dropconnect.nn_utils import inner_model
from fastai_dropconnect.sparsity.core import HeldWeights, as_bits, bit_mask

torch.set_num_threads(1)


def make_dls(n=96, bs=16):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g)
    ds = TensorDataset(x, x.prod(1, keepdim=True) + x[:,:1])
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=True, device='cpu', num_workers=0)

def make_model(act=nn.Tanh): return nn.Sequential(nn.Linear(4,12), act(), nn.BatchNorm1d(12), nn.Linear(12,8), act(), nn.Linear(8,1))

def split(model): return [params(model[:2]), params(model[2:5]), params(model[5:])]

def make_learn(*cbs, seed=0, opt_func=Adam, path=None, model=None, **kw):
    set_seed(seed)
    learn = Learner(make_dls(), model or make_model(), F.mse_loss, opt_func=opt_func, cbs=L(cbs), path=path, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def hidden(learn): return [learn.model[i].weight for i in (0,3)]
def masked(learn): return [~learn.frozen_zero_init.record[n] for n in ('0.weight','3.weight')]
def zeros(learn): return [w.detach()==0 for w in hidden(learn)]
def same(xs, ys): return len(xs)==len(ys) and all(torch.equal(x, y) for x,y in zip(xs, ys))
def snapshot(learn): return [p.detach().clone() for p in learn.model.parameters()]

class Watch(Callback):
    "Check after each step that the masked weights are what they were when the fit began"
    order = FrozenZeroInit.order+1
    def before_train(self):
        cb = self.learn.frozen_zero_init
        self.masks = [~cb.record[n] for n in cb.weights()]
        self.start = [p.detach()[m].clone() for (p,_),m in zip(cb.weights().values(), self.masks)]
        self.steps = 0
    def after_step(self):
        self.steps += 1
        for (p,_),m,s in zip(self.learn.frozen_zero_init.weights().values(), self.masks, self.start): assert torch.equal(p.detach()[m], s)


torch_opts = {f'torch.{n}': partial(OptimWrapper, opt=partial(getattr(torch.optim, n), **kw)) for n,kw in
              dict(SGD=dict(momentum=0.9, lr=.1), AdamW=dict(weight_decay=.1), RMSprop=dict(momentum=.9), Adagrad={}, NAdam={}).items()}
opts = dict(Adam=Adam, AdamL2=partial(Adam, decouple_wd=False), SGD=partial(SGD, mom=.9), SGDL2=partial(SGD, mom=.9, decouple_wd=False), RAdam=RAdam,
            Lamb=Lamb, ranger=ranger, RMSProp=partial(RMSProp, mom=.9), QHAdam=QHAdam, Larc=Larc) | torch_opts
every_opt = pytest.mark.parametrize('opt', opts.values(), ids=opts)

# Held under any optimizer

@every_opt
@pytest.mark.parametrize('zero', [True,False], ids=['zero','value'])
def test_held_after_every_step(opt, zero):
    learn = make_learn(FrozenZeroInit(.5, zero=zero), Watch(), opt_func=opt, wd=None if 'torch' in str(opt) else .1)
    before = snapshot(learn)
    learn.fit(3, 1e-2)
    assert learn.watch.steps == 6      # in the last epoch
    if zero: assert same(zeros(learn), masked(learn)) and [z.sum().item() for z in zeros(learn)] == [24, 48]
    assert all((w.detach()!=b).any() for w,b in zip(learn.model.parameters(), before) if b.dim()>1)


@every_opt
def test_switched_on_in_the_middle_of_a_training(opt):
    learn = make_learn(opt_func=opt)
    learn.fit(2, 1e-2)
    learn.add_cbs([FrozenZeroInit(.5), Watch()])
    learn.fit(3, 1e-2)
    assert same(zeros(learn), masked(learn))


def test_the_optimizer_remembers_nothing_that_a_release_could_bring_back():
    learn = make_learn(opt_func=ranger)
    learn.fit(1, 1e-2)
    learn.add_cb(FrozenZeroInit(.5))
    learn.fit(2, 1e-2)
    for w,m in zip(hidden(learn), masked(learn)):
        state = [t for t in learn.opt.state[w].values() if torch.is_tensor(t)]
        assert len(state)==2 and all((t[m]==0).all() and (t[~m]!=0).all() for t in state)
    slow = dict(zip(sum(map(list, learn.opt.param_lists), []), sum(map(list, learn.opt.slow_weights), [])))
    assert all((slow[w][m]==0).all() for w,m in zip(hidden(learn), masked(learn)))


@pytest.mark.parametrize('clip', [False,True])
def test_in_a_fit_roots_of_zero_are_avoided(clip):
    "torch takes eight times as long for the root of an exact zero"
    class State(Callback):
        def after_batch(self):
            if not self.training: return
            for w,m in zip(hidden(self.learn), masked(self.learn)):
                state = self.learn.opt.state[w]
                assert (state['sqr_avg'][m]>0).all()
                if clip: assert (state['grad_avg'][m]==0).all() and (state['sqr_avg'][m]>.9).all() and (state['sqr_avg'][~m]<.9).all()
    learn = make_learn()
    learn.fit(1)
    learn.add_cbs([FrozenZeroInit(.5), State(), *[GradientClip(1.)]*clip])
    learn.fit(1)
    for w,m in zip(hidden(learn), masked(learn)): assert all((learn.opt.state[w][n][m]==0).all() for n in ('grad_avg','sqr_avg'))


@pytest.mark.parametrize('reader', [GradientClip(.01), MixedPrecision('bf16'), None], ids=['clip','bf16','Lamb'])
def test_gradients_of_held_weights_count_for_nobody(reader):
    "Who reads several gradients gets zeros; a loss that reads the held weights too would otherwise change the others"
    def fit(scale):
        class Loud(Callback):
            order = FrozenZeroInit.order-1
            def after_backward(self):
                for w,m in zip(hidden(self.learn), masked(self.learn)): w.grad[m] *= scale
        learn = make_learn(FrozenZeroInit(.5, seed=1), *[reader]*(reader is not None), opt_func=Lamb if reader is None else Adam)
        with learn.added_cbs(Loud()): learn.fit(1)
        return snapshot(learn)
    assert same(fit(1.), fit(1000.))


def test_gradients_are_masked_before_anyone_sees_them():
    class Norm(Callback):
        order = FrozenZeroInit.order+1
        def after_backward(self):
            for w,m in zip(hidden(self.learn), masked(self.learn)): assert (w.grad[m]==0).all() and (w.grad[~m]!=0).any()
    learn = make_learn(FrozenZeroInit(.5), Norm(), GradientClip(.1))
    learn.fit(1)


def test_a_plain_fit_does_not_mask_gradients(monkeypatch):
    "It takes time, and the weights are set back after each step anyway"
    calls = []
    monkeypatch.setattr(HeldWeights, 'mask_grads', lambda self: calls.append(1))
    learn = make_learn(FrozenZeroInit(.5))
    learn.fit(1)
    assert not calls and same(zeros(learn), masked(learn))


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_nan_in_a_masked_gradient_does_not_survive(bad):
    class Spoil(Callback):
        order = FrozenZeroInit.order-1
        def after_backward(self):
            for w,m in zip(hidden(self.learn), masked(self.learn)): w.grad[m] = bad
    learn = make_learn(FrozenZeroInit(.5), Spoil(), GradientClip(1.))
    before = snapshot(learn)
    learn.fit(2)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and not same(snapshot(learn), before)
    assert same(zeros(learn), masked(learn))


def test_weights_that_an_optimizer_made_nan_are_zero_again():
    class Spoil(Callback):
        order = FrozenZeroInit.order-1
        def after_step(self):
            for w,m in zip(hidden(self.learn), masked(self.learn)): w.data[m] = float('nan')
    learn = make_learn(FrozenZeroInit(.5), Spoil(), Watch())
    learn.fit(1)
    assert same(zeros(learn), masked(learn))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_bits_of_every_type(dtype):
    w = torch.tensor([1.5, float('nan'), -3, float('-inf')], dtype=dtype)
    as_bits(w).bitwise_and_(bit_mask(torch.tensor([True,False,True,False]), w))
    assert w.tolist() == [1.5, 0, -3, 0] and not w[1::2].signbit().any()


def test_bias_weights_of_two_groups_and_other_layers():
    model = nn.Sequential(nn.Conv1d(1,3,2), nn.Flatten(), nn.Linear(9,4), nn.Linear(4,1))
    learn = make_learn(FrozenZeroInit(.5, layers=['0','2'], params=['weight','bias']), Watch(), model=nn.Sequential(nn.Unflatten(1,(1,4)), *model))
    with pytest.raises(ValueError, match='must be names of modules'): make_learn(FrozenZeroInit(layers=['x'])).fit(1)
    learn.frozen_zero_init.layers = ['1','3']
    learn.fit(1)
    assert [(w==0).sum().item() for w,_ in learn.frozen_zero_init.weights().values()] == [3, 2, 18, 2]

# Counts, and what the constructor says

@pytest.mark.parametrize('sparsity', [0, .1, .5, .9])
@pytest.mark.parametrize('per', ['tensor','row'])
def test_exact_counts(sparsity, per):
    learn = make_learn(FrozenZeroInit(sparsity, per=per))
    learn.fit(1)
    for z in zeros(learn):
        if per=='row': assert (z.sum(1)==round(sparsity*z.shape[1])).all()
        else: assert z.sum() == round(sparsity*z.numel())
    assert not (learn.model[5].weight==0).any()      # the output layer is left alone


def test_a_value_for_each_layer():
    for sparsity in ({'0': .25, '5': .5}, lambda n,m: dict(zip('035', (.25,0,.5)))[n]):
        learn = make_learn(FrozenZeroInit(sparsity, layers=None if isinstance(sparsity, dict) else ['0','3','5']))
        learn.fit(1)
        assert [(learn.model[i].weight==0).sum().item() for i in (0,3,5)] == [12, 0, 4]


def test_seed_repeats_the_masks():
    draw = lambda seed,cb_seed: (l := make_learn(FrozenZeroInit(.5, seed=cb_seed), seed=seed), l.fit(1), masked(l))[2]
    assert same(draw(0, 7), draw(1, 7)) and not same(draw(0, 7), draw(0, 8))
    assert same(draw(3, None), draw(3, None)) and not same(draw(3, None), draw(4, None))


def test_rescale_keeps_the_variance_of_the_outputs():
    x = torch.randn(2000, 400)
    for rescale,ratio in ((True,1), (False,.5**.5)):
        model = nn.Sequential(nn.Linear(400,300,bias=False), nn.Linear(300,1))
        before,learn = model[0](x).std().item(),make_learn(FrozenZeroInit(.5, rescale=rescale), model=model)
        learn.dls = DataLoaders([(x[:8], x[:8,:1])], [])
        learn.fit(1, 0.)
        assert model[0](x).std().item()/before == pytest.approx(ratio, rel=.03)
        w = model[0].weight.clone()
        learn.fit(1, 0.)
        assert torch.equal(model[0].weight, w)       # and only once


@pytest.mark.parametrize('kw,error,says', [
    (dict(sparsity=1.), ValueError, 'sparsity=1.0'), (dict(sparsity='a'), TypeError, "sparsity='a'"), (dict(sparsity={'0': -1}), ValueError, 'sparsity=-1'),
    (dict(per='layer'), ValueError, "per='layer'"), (dict(layers=1), TypeError, 'layers=1'), (dict(seed=.5), TypeError, 'seed=0.5'),
    (dict(zero=False, rescale=True), ValueError, 'rescale=True'), (dict(zero=False, mask_grads=False), ValueError, 'mask_grads=False')])
def test_errors_come_from_the_constructor(kw, error, says):
    with pytest.raises(error, match=says): FrozenZeroInit(**kw)

# Free zeros

def test_free_zeros_are_zeroed_once_for_ever(tmp_path):
    cb = FrozenZeroInit(.5, mask_grads=False)
    learn = make_learn(cb, path=tmp_path)
    start = []
    learn.fit(1, 1e-2, cbs=Callback(before_train=lambda self: start.extend(z.sum().item() for z in zeros(self.learn))))
    assert start == [24, 48] and not any(z.any() for z in zeros(learn))
    before = snapshot(learn)
    learn.fit(1, 0.)
    learn.save('free'); learn.load('free')
    learn.lr_find(show_plot=False, num_it=6)
    learn.fit(1, 0., reset_opt=True)
    assert same(snapshot(learn), before)
    again = make_learn(FrozenZeroInit(.5, mask_grads=False), seed=1, path=tmp_path)      # what another process would do
    again.load('free')
    again.fit(1, 0.)
    assert same(snapshot(again), before)
    again = pickle.loads(pickle.dumps(learn))
    again.fit(1, 0.)
    assert same(snapshot(again), before)

# The mask is found again

def test_next_fits_freeze_unfreeze_fine_tune():
    learn = make_learn(FrozenZeroInit(.5), Watch(), splitter=split)
    learn.fine_tune(2, 1e-2, freeze_epochs=1)
    masks = masked(learn)
    learn.freeze(); learn.fit(1, 1e-2); learn.unfreeze(); learn.fit_one_cycle(1, 1e-2); learn.fit(1, 1e-2, reset_opt=True)
    assert same(masked(learn), masks) and same(zeros(learn), masks)


@pytest.mark.parametrize('kw', [{}, dict(zero=False), dict(mask_grads=False), dict(rescale=True)])
def test_lr_find_leaves_no_trace(kw):
    learn = make_learn(FrozenZeroInit(.5, **kw))
    learn.fit(1)
    learn = make_learn(FrozenZeroInit(.5, **kw))
    before = snapshot(learn)
    class Seen(Callback):
        def before_batch(self): self.zeros = [z.sum().item() for z in zeros(self.learn)]
    learn.add_cb(Seen())
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert same(snapshot(learn), before) and not list(learn.frozen_zero_init.record)
    if kw.get('mask_grads', True) and kw.get('zero', True): assert learn.seen.zeros == [24, 48]      # it looks at the sparse network
    learn.fit(1, 1e-3)
    masks,before = masked(learn),snapshot(learn)
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert same(snapshot(learn), before) and same(masked(learn), masks)
    learn.fit(1, 1e-3)
    assert same(masked(learn), masks)


@pytest.mark.parametrize('zero', [True,False])
@pytest.mark.parametrize('with_opt', [True,False])
def test_save_and_load_in_another_process(tmp_path, zero, with_opt):
    learn = make_learn(FrozenZeroInit(.4, zero=zero), path=tmp_path)
    learn.fit(1, 1e-2)
    learn.save('m', with_opt=with_opt)
    plain = make_learn(path=tmp_path, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain.load('m')                       # a plain Learner loads it
        again = make_learn(FrozenZeroInit(.4, zero=zero), path=tmp_path, seed=3)
        again.load('m')
    assert list(plain.model.state_dict()) == list(learn.model.state_dict()) == list(make_model().state_dict())
    held = [w.detach()[m].clone() for w,m in zip(hidden(again), masked(learn))]
    again.fit(2, 1e-2)
    assert same(masked(again), masked(learn)) and same([w.detach()[m] for w,m in zip(hidden(again), masked(learn))], held)


def test_a_mask_is_found_in_the_weights_themselves(tmp_path):
    "The callback is added after weights were loaded that a Learner without it had saved"
    learn = make_learn(FrozenZeroInit(.4, per='row', rescale=True), path=tmp_path)
    learn.fit(1, 1e-2)
    masks = masked(learn)
    learn.remove_cb(FrozenZeroInit)
    assert not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks
    learn.save('m')
    again = make_learn(path=tmp_path, seed=3).load('m')
    before = snapshot(again)
    again.fit(1, 0., cbs=FrozenZeroInit(.4, per='row', rescale=True))
    assert same(snapshot(again), before)
    again.add_cb(FrozenZeroInit(.4, per='row', rescale=True))
    again.fit(1, 1e-2)
    assert same(masked(again), masks) and same(zeros(again), masks)


def test_loading_brings_the_mask_of_the_file(tmp_path):
    a,b = [make_learn(FrozenZeroInit(.5), seed=s, path=tmp_path) for s in (0,1)]
    for l,n in ((a,'a'), (b,'b')): l.fit(1, 1e-2); l.save(n)
    assert not same(masked(a), masked(b))
    a.load('b')
    a.fit(1, 1e-2)
    assert same(masked(a), masked(b)) and same(zeros(a), masked(b))


def test_a_layer_that_was_replaced_gets_a_mask_of_its_own():
    learn = make_learn(FrozenZeroInit(.5))
    learn.fit(1)
    first = masked(learn)[0]
    learn.model[3],learn.model[5] = nn.Linear(12,10),nn.Linear(10,1)
    learn.fit(1, reset_opt=True)
    assert torch.equal(masked(learn)[0], first) and masked(learn)[1].shape==(10,12) and same(zeros(learn), masked(learn))


def test_pickle_deepcopy_and_a_model_alone():
    learn = make_learn(FrozenZeroInit(.5), Watch())
    learn.fit(1, 1e-2)
    for again in (pickle.loads(pickle.dumps(learn)), copy.deepcopy(learn)):
        before = snapshot(learn)
        again.fit(1, 1e-2)
        assert same(masked(again), masked(learn)) and same(zeros(again), masked(learn)) and same(snapshot(learn), before)
        again.frozen_zero_init.release()
        assert list(learn.frozen_zero_init.record)
    assert len(pickle.dumps(learn.model)) < 12000     # the Learner is not in it
    twin = copy.deepcopy(learn.model)
    twin.load_state_dict(make_model().state_dict())
    assert list(learn.frozen_zero_init.record)


def test_export_and_further_training(tmp_path):
    df = pd.DataFrame(np.random.default_rng(0).normal(size=(80,3)).astype('float32'), columns=list('aby'))
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=['a','b'], y_names='y', valid_idx=range(16), bs=16, device='cpu')
    learn = tabular_learner(dls, layers=[12,8], cbs=FrozenZeroInit(.5, zero=False), path=tmp_path)
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    again.dls = dls
    w,m = again.model.layers[1][0].weight,~learn.frozen_zero_init.record['layers.1.0.weight']
    before = w.detach().clone()
    with again.no_bar(),again.no_logging(): again.fit(1, 1e-2)
    assert m.sum()==48 and torch.equal(w.detach()==before, m)

# With other callbacks

@pytest.mark.parametrize('cbs', [lambda: GradientAccumulation(40), lambda: MixedPrecision('bf16'), lambda: MixedPrecision()], ids=['acc','bf16','fp16'])
def test_held_with(cbs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # fp16 says that there is no CUDA
        learn = make_learn(FrozenZeroInit(.5), Watch(), GradientClip(.5), opt_func=ranger)
        learn.fit(1, 1e-2)
        learn.add_cb(cbs())
        learn.fit(3, 1e-2)
    assert same(zeros(learn), masked(learn))


def compiled(model, wrap):
    if wrap: return torch.compile(model, backend='aot_eager')
    model.compile(backend='aot_eager')
    return model

@pytest.mark.parametrize('wrap', [True,False])
def test_a_compiled_model(wrap):
    "A compiled model trains to the same weights, and keeps its masks when it is compiled between two fits"
    def seeded(f):
        set_seed(1)
        return f(make_model())
    for kw in (dict(), dict(mask_grads=False), dict(zero=False)):
        plain,comp,later = [make_learn(FrozenZeroInit({'0': .5, '3': .25}, seed=3, **kw), model=seeded(f)) for f in (noop, partial(compiled, wrap=wrap), noop)]
        for l in (plain,comp,later): l.fit(1, 1e-2)
        later.model = compiled(later.model, wrap)
        for l in (plain,comp,later): l.fit(1, 1e-2)
        assert list(comp.frozen_zero_init.record)==list(later.frozen_zero_init.record)==['0.weight','3.weight']
        assert same(masked(plain), masked(comp)) and same(masked(plain), masked(later))
        for l in (comp,later):
            for p,q in zip(plain.model.parameters(), l.model.parameters()): torch.testing.assert_close(p, q)
            if not kw: assert same([inner_model(l.model)[i].weight==0 for i in (0,3)], masked(l))


def test_fp16_that_trains_a_copy_is_refused():
    learn = make_learn(FrozenZeroInit(.5)).to_non_native_fp16()
    with pytest.raises(ValueError, match='mask_grads=True'): learn.fit(1)


def test_best_model_reloaded_early_stopping_and_interrupts(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.learn.train_iter==8: raise self.how
    cbs = [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=1)]
    learn = make_learn(FrozenZeroInit(.5), *cbs, path=tmp_path)
    with contextlib.redirect_stdout(io.StringIO()): learn.fit(6, .1)
    masks = masked(learn)
    assert same(zeros(learn), masks)
    learn.remove_cbs(cbs)
    for how in (CancelFitException(), KeyboardInterrupt()):
        stop = Stop(); stop.how = how
        with contextlib.suppress(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=stop)
        assert same(zeros(learn), masks)
        learn.fit(1, 1e-2)
        assert same(zeros(learn), masks) and same(masked(learn), masks)


def test_averaged_copies_have_the_zeros_too():
    class EMA(Callback):
        def before_fit(self): self.avg = copy.deepcopy(self.learn.model)
        def after_step(self):
            for a,p in zip(self.avg.parameters(), self.learn.model.parameters()): a.data.lerp_(p.data, .1)
    learn = make_learn(FrozenZeroInit(.5), EMA())
    learn.fit(2, 1e-2)
    assert same([learn.ema.avg[i].weight==0 for i in (0,3)], masked(learn))

# One Learner at a time

def test_a_second_learner_at_the_same_time_is_refused():
    cb = FrozenZeroInit(.5)
    learn,other = make_learn(cb),make_learn(seed=1)
    learn.fit(1, 1e-2)
    masks,before = masked(learn),snapshot(other)
    for give in (lambda: other.fit(1, cbs=cb), lambda: other.add_cb(cb), lambda: make_learn(cb)):
        with pytest.raises(ValueError, match='belongs to another Learner: make a new FrozenZeroInit for each Learner'): give()
    assert same(snapshot(other), before) and not other.model._state_dict_hooks
    learn.fit(1, 1e-2)
    assert same(masked(learn), masks) and same(zeros(learn), masks)


@pytest.mark.parametrize('kw', [{}, dict(mask_grads=False), dict(zero=False), dict(rescale=True)])
def test_given_to_another_learner_it_starts_anew(kw):
    cb = FrozenZeroInit(.5, **kw)
    first,second,alone = make_learn(),make_learn(seed=1),make_learn(seed=1)
    first.fit(1, 1e-2, cbs=cb)
    record = {n:cb.record[n] for n in cb.record}
    first.fit(1, 1e-2, cbs=cb)
    assert all(torch.equal(cb.record[n], m) for n,m in record.items())
    other = FrozenZeroInit(.5, **kw)
    for l,c in ((second,cb),(alone,other)):
        set_seed(5)
        l.fit(1, 1e-2, cbs=c)
    assert same(snapshot(second), snapshot(alone)) and cb.stds==other.stds
    assert not any(torch.equal(cb.record[n], m) for n,m in record.items())


def test_the_same_model_in_another_learner_keeps_its_masks():
    cb = FrozenZeroInit(.5, mask_grads=False)
    learn = make_learn()
    learn.fit(1, 1e-2, cbs=cb)
    before = snapshot(learn)
    again = make_learn(model=learn.model)
    again.fit(1, 0., cbs=cb)
    assert same(snapshot(again), before)


def test_released_for_one_learner_it_holds_for_the_next():
    cb = FrozenZeroInit(.5)
    learn = make_learn(cb)
    learn.fit(1)
    cb.release()
    learn.remove_cb(cb)
    learn.fit(1, 1e-2, cbs=cb)
    assert not any(z.any() for z in zeros(learn))
    other = make_learn(cb, seed=1)
    other.fit(1, 1e-2)
    assert [z.sum().item() for z in zeros(other)] == [24, 48]

# Validation

@pytest.mark.parametrize('kw', [{}, dict(zero=False), dict(mask_grads=False)])
def test_validation_and_predictions_change_nothing(kw):
    learn = make_learn(FrozenZeroInit(.5, **kw))
    before = snapshot(learn)
    learn.validate()
    learn.get_preds()
    assert same(snapshot(learn), before) and not list(learn.frozen_zero_init.record)


def test_validation_in_the_middle_of_a_fit_does_not_end_the_hold():
    class Peek(Callback):
        order = 90
        def after_batch(self):
            if not self.training or self.learn.iter!=1: return
            own = self.learn.iter,self.learn.n_iter,self.learn.dl
            self.learn.validate()
            self.learn.model.train()
            self.learn.training = True
            self.learn.iter,self.learn.n_iter,self.learn.dl = own
    learn = make_learn(FrozenZeroInit(.5), Peek(), Watch(), opt_func=ranger)
    learn.fit(2, 1e-2)
    assert learn.watch.steps==6 and same(zeros(learn), masked(learn))


@pytest.mark.parametrize('mask_grads', [True,False])
def test_a_weight_without_entries_is_not_rescaled(mask_grads):
    learn = make_learn(FrozenZeroInit(.9, mask_grads, rescale=True, layers=['1']), model=nn.Sequential(nn.Linear(4,1), nn.Linear(1,1)))
    learn.fit(1, 0.)
    assert learn.model[1].weight.item()==0 and learn.recorder.values[0][0] < 10

# Letting go, and looking

def test_release_and_removal_let_the_weights_train():
    for free in (lambda l: l.frozen_zero_init.release(), lambda l: l.remove_cb(FrozenZeroInit)):
        learn = make_learn(FrozenZeroInit(.5))
        learn.fit(1, 1e-2)
        masks,before = masked(learn),snapshot(learn)
        free(learn)
        assert same(snapshot(learn), before)
        learn.fit(2, 1e-2)
        assert all((w.detach()[m]!=0).all() for w,m in zip(hidden(learn), masks))


def test_report_metric_and_plot():
    cb = FrozenZeroInit({'0': .75, '3': .5}, per='row')
    learn = make_learn(cb, metrics=cb.metric())
    learn.fit(1)
    r = cb.report()
    assert r.index.tolist() == ['0.weight','3.weight'] and r['shape'].tolist() == [(12,4), (8,12)]
    assert r.masked.tolist() == r.zeros.tolist() == r.sparsity.tolist() == [.75, .5] and r.dead_outputs.tolist() == [0, 0]
    assert r.dead_inputs.tolist() == [(learn.model[i].weight==0).all(0).sum().item() for i in (0,3)]
    assert (r.std_after < r.std_before).all()
    assert learn.recorder.metric_names[3] == 'zeros' and learn.recorder.values[0][2] == pytest.approx((36+48)/144)
    cb.plot()

def test_report_counts_dead_inputs_and_outputs():
    cb = FrozenZeroInit(.1, layers=['0'])
    learn = make_learn(cb)
    with torch.no_grad():
        learn.model[0].weight[:,1] = 0
        learn.model[0].weight[[2,5,7]] = 0
    r = cb.report()
    assert (r.dead_inputs.item(), r.dead_outputs.item())==(1, 3)


def test_plot_of_a_weight_without_rows():
    cb = FrozenZeroInit(layers='0', params=['weight','bias'])
    make_learn(cb).fit(1)
    cb.plot()
    shapes = {ax.get_title(): ax.images[0].get_array().shape for ax in plt.gcf().axes}
    plt.close()
    assert shapes=={'0.weight': (12,4), '0.bias': (1,12)}

# Whatever the order of things

events = st.lists(st.sampled_from(['fit','fit','lr_find','save','load','freeze','unfreeze','pickle','reset_opt']), min_size=2, max_size=5)

@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(sizes=st.lists(st.integers(1,6), min_size=1, max_size=2), sparsity=st.floats(0,.95), per=st.sampled_from(['tensor','row']), zero=st.booleans(),
       opt=st.sampled_from(sorted(opts)), events=events, seed=st.integers(0,99))
def test_masked_weights_stay_and_the_mask_never_moves(tmp_path_factory, sizes, sparsity, per, zero, opt, events, seed):
    set_seed(seed)
    dims = [4, *sizes, 1]
    model = nn.Sequential(*[m for i,o in zip(dims, dims[1:]) for m in (nn.Linear(i,o), nn.Tanh())][:-1])
    learn = make_learn(FrozenZeroInit(sparsity, per=per, zero=zero), model=model, seed=seed, opt_func=opts[opt], path=tmp_path_factory.mktemp('m'),
                       splitter=lambda m: [params(m[:-1]), params(m[-1:])])
    learn.fit(1, 1e-2)
    learn.save('m')
    get = lambda: [(p.detach(), ~learn.frozen_zero_init.record[n]) for n,(p,_) in learn.frozen_zero_init.weights().items()]
    masks,held = [m for _,m in get()],[p[m] for p,m in get()]
    for e in events:
        if e=='fit': learn.fit(1, 1e-2)
        elif e=='reset_opt': learn.fit(1, 1e-2, reset_opt=True)
        elif e=='lr_find':
            with contextlib.suppress(Exception): learn.lr_find(show_plot=False, num_it=6, end_lr=1e-2, suggest_funcs=None)
        elif e=='save': learn.save('m')
        elif e=='load': learn.load('m')
        elif e=='pickle': learn = (setattr(learn, 'splitter', params), pickle.loads(pickle.dumps(learn)))[1]
        elif len(learn.opt.param_lists) > 1: getattr(learn, e)()
        assert same([m for _,m in get()], masks)
        assert same([p[m] for p,m in get()], held)
        for p,m in get(): assert m.sum() == (round(sparsity*p[0].numel())*len(p) if per=='row' else round(sparsity*p.numel()))
