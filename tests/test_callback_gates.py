"`FeatureGates` keeps the model plain outside of training batches, whatever happens to a fit"
import copy, pickle, warnings
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.tabular.all import (Callback, CancelFitException, Categorify, FillMissing, Learner, Normalize, OptimWrapper, ProgressCallback, SaveModelCallback,
                                SGD, TabularDataLoaders, load_learner, noop, ranger, set_seed)
from torch import nn
from torch.nn import functional as F
from conftest import Scaled
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.gates import FeatureGates, column_sizes, input_layer, nats_per_loss
from fastai_dropconnect.layers.gates import mean_gates
from fastai_dropconnect.tabular.resnet import tabular_resnet_config

warnings.filterwarnings('ignore', message='load_learner')

def make_table(n=240, seed=0):
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(color=r.choice(['red','green'], n), junk=r.choice(list('abcdef'), n), a=r.normal(size=n), b=r.normal(size=n), c=r.normal(size=n)))
    return df.assign(y=(2*df.a + (df.color=='red') + r.normal(0, .1, n)).astype('float32'))

def make_dls(bs=16): return TabularDataLoaders.from_df(make_table(), procs=[Categorify,FillMissing,Normalize], cat_names=['color','junk'], cont_names=['a','b','c'],
                                                       y_names='y', valid_idx=range(192, 240), bs=bs, device='cpu')

def make_learn(*cbs, config=None, seed=0, path=None, layers=(16,8), **kw):
    set_seed(seed)
    learn = tabular_learner(make_dls(), layers=list(layers), config=config, cbs=list(cbs), path=path, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, n=2, seed=1, lr=2e-2, **kw):
    set_seed(seed)
    learn.fit(n, lr, **kw)
    return learn

def preds(learn):
    with learn.no_bar(): return learn.get_preds()[0]

def weight(learn): return input_layer(learn.model).weight.detach()
def removed_inputs(learn):
    sizes = torch.tensor(list(column_sizes(learn).values()))
    return ~learn.feature_gates.kept().repeat_interleave(sizes)

def is_plain(learn):
    layer = input_layer(learn.model)
    return not layer._forward_pre_hooks and 'forward' not in vars(layer)

class Each(Callback):
    "Call a function at each of some events"
    order = 50
    def __init__(self, f, *events): self.f,self.events = f,events
    def __call__(self, name):
        if name in self.events: self.f(self.learn, name)


CONFIGS = dict(plain=None, dropconnect=tabular_dropconnect_config(weight_p=.1, ps=.1), ple=tabular_dropconnect_config(num_embeddings=PLE(dim=3, bins=4)),
               members=tabular_dropconnect_config(members=2, num_embeddings=Periodic(dim=2)), lin_last=dict(lin_first=False),
               resnet=tabular_resnet_config(width=8, path_p=.1))

@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('config', CONFIGS)
def test_what_is_validated_is_the_plain_model_with_exact_zeros(config, fast):
    checked = []
    def check(learn, name):
        assert is_plain(learn)
        state = learn.feature_gates.record.state
        z = mean_gates(state['log_alpha']).repeat_interleave(torch.tensor(list(column_sizes(learn).values())))
        if 'raw' in state: assert torch.equal(weight(learn), state['raw']*z)
        assert not weight(learn)[:,z==0].any()
        checked.append('raw' in state)
    learn = make_learn(FeatureGates(60, gate_lr=.3, warm=.1), config=CONFIGS[config], fast=fast)
    fit(learn, 4, cbs=Each(check, 'before_validate', 'after_epoch'))
    assert set(checked)=={True,False} and is_plain(learn)
    cb = learn.feature_gates
    if config!='resnet': assert 'a' in cb.kept_columns() and 'b' not in cb.kept_columns()
    assert list(cb.table().index[cb.table().kept])==cb.kept_columns()
    before = [preds(learn), {k: v.shape for k,v in learn.model.state_dict().items()}]
    learn.remove_cb(cb)
    after = [preds(learn), {k: v.shape for k,v in learn.model.state_dict().items()}]
    assert torch.equal(before[0], after[0]) and before[1]==after[1] and not learn.model._state_dict_hooks and not learn.model._load_state_dict_post_hooks


def test_gates_before_the_layer_are_gates_in_the_weights():
    learn = make_learn(FeatureGates(5, end=1.))
    seen = []
    def compare(learn, name):
        cb,model = learn.feature_gates,learn.model
        xb = learn.xb
        with torch.no_grad():
            a = model.eval()(*xb)      # the hook multiplies by the fixed gates
            cb._into_weights()
            assert is_plain(learn)
            assert torch.allclose(model(*xb), a, atol=1e-5)
            own = cb.record.state['raw']
            cb._before_layer()
            assert torch.equal(weight(learn), own)
        model.train()
        seen.append(1)
    fit(learn, 1, cbs=Each(compare, 'after_step'))
    assert len(seen)==12


@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9, wd=.1), ranger, partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))])
def test_removed_columns_stay_at_zero_in_all_fits(opt_func):
    learn = fit(make_learn(FeatureGates(60, gate_lr=.3, warm=.1, end=.5), opt_func=opt_func), 3, lr=1e-2)
    removed = removed_inputs(learn)
    assert removed.any() and not removed.all()
    def check(learn, name): assert not weight(learn)[:,removed].any()
    fit(learn, 2, cbs=Each(check, 'after_step', 'after_epoch'), lr=1e-2)
    gates = learn.feature_gates.table()
    learn.remove_cb(learn.feature_gates)
    fit(learn, 1, lr=1e-2)
    assert weight(learn)[:,removed].any() and not gates.kept.all()


def test_price_0_is_training_without_the_callback():
    a,b = fit(make_learn(FeatureGates(0))),fit(make_learn())
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q)
    assert a.feature_gates.kept_columns()==['color','junk','a','b','c'] and a.feature_gates.table().kept.all()


def test_a_file_saved_in_the_middle_predicts_the_same_anywhere(tmp_path):
    outs = {}
    def save(learn, name):
        learn.save(f'e{learn.epoch}')
        outs[learn.epoch] = copy.deepcopy(learn.model).eval()(*learn.dls.valid.one_batch()[:2]).detach()
    learn = fit(make_learn(FeatureGates(5, end=.7), path=tmp_path), 4, cbs=Each(save, 'after_epoch'))
    other = make_learn(seed=5, path=tmp_path)
    for e,want in outs.items():
        other.load(f'e{e}')
        assert torch.equal(other.model.eval()(*other.dls.valid.one_batch()[:2]), want)
    again = make_learn(FeatureGates(5), seed=6, path=tmp_path).load('e3')
    assert again.feature_gates.kept_columns()==learn.feature_gates.kept_columns() and again.feature_gates.record.state['fixed']
    best = fit(make_learn(FeatureGates(5, end=.9), path=tmp_path), 3, cbs=[SaveModelCallback(fname='best')])
    assert torch.equal(preds(best), preds(make_learn(seed=3, path=tmp_path).load('best')))


class Seed(Callback):
    "Draw the same numbers in an epoch, whatever came before"
    order = -20
    def before_epoch(self):
        set_seed(self.epoch)
        self.learn.dls.train.rng.seed(self.epoch)

@pytest.mark.parametrize('stop', [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    def new(): return make_learn(FeatureGates(20, end=.55), path=tmp_path, opt_func=SGD)
    whole = fit(new(), 4, cbs=Seed())
    def cancel(learn, name):
        if learn.epoch==stop:
            learn.save('middle')
            raise CancelFitException()
    fit(new(), 4, cbs=[Seed(), Each(cancel, 'after_epoch')])
    resumed = new().load('middle')
    fit(resumed, 4, start_epoch=stop+1, cbs=Seed())
    for p,q in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True): assert torch.equal(p, q)
    assert torch.equal(whole.feature_gates.record.state['log_alpha'], resumed.feature_gates.record.state['log_alpha'])


def test_export_pickle_copies_and_one_row(tmp_path):
    learn = fit(make_learn(FeatureGates(60, gate_lr=.3, warm=.1), path=tmp_path, fast=True))
    want,kept = preds(learn),learn.feature_gates.kept_columns()
    row = make_table().iloc[200]
    one = learn.predict(row)[2]
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    assert torch.allclose(again.predict(row)[2], one, atol=1e-6) and again.feature_gates.kept_columns()==kept
    twin = copy.deepcopy(learn)
    assert torch.equal(preds(fit(twin, 1)), preds(twin)) and torch.equal(preds(learn), want)
    cb = pickle.loads(pickle.dumps(learn.feature_gates))
    assert torch.equal(cb.record.state['log_alpha'], learn.feature_gates.record.state['log_alpha'])
    assert fit(make_learn(config=None, layers=[4])).model(*learn.dls.valid.one_batch()[:2]).shape[1]==1


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_broken_fit_leaves_a_plain_model_that_trains_on(error):
    def stop(learn, name):
        if learn.iter==5 and learn.epoch==1: raise error('stop')
    learn = make_learn(FeatureGates(20))
    with pytest.raises(error): fit(learn, 3, cbs=Each(stop, 'after_backward'))
    state = learn.feature_gates.record.state
    assert is_plain(learn) and 'fixed' not in state and learn.feature_gates._gate is None
    raw,log_alpha = state['raw'],state['log_alpha'].clone()
    z = mean_gates(log_alpha).repeat_interleave(torch.tensor(list(column_sizes(learn).values())))
    assert torch.equal(weight(learn), raw*z)
    seen = []
    def first(learn, name):
        if not seen: seen.extend([weight(learn).clone(), learn.feature_gates._gate.log_alpha.detach().clone()])
    fit(learn, 2, cbs=Each(first, 'before_batch'))
    assert torch.equal(seen[0], raw) and torch.equal(seen[1], log_alpha) and learn.feature_gates.record.state['fixed']
    def cancel(learn, name):
        if learn.iter==5: raise CancelFitException()
    learn = fit(make_learn(FeatureGates(20)), 3, cbs=Each(cancel, 'before_batch'))
    assert is_plain(learn) and learn.feature_gates.record.state['fixed']


def test_weights_that_were_loaded_between_epochs_are_taken_as_they_are():
    def other(learn, name):
        if learn.epoch==0: nn.init.constant_(input_layer(learn.model).weight, .25)
    seen = []
    def look(learn, name):
        if learn.epoch==1 and not seen: seen.append(weight(learn).clone())
    fit(make_learn(FeatureGates(5)), 2, cbs=[Each(other, 'after_epoch'), Each(look, 'before_batch')])
    assert (seen[0]==.25).all()


def test_the_scale_of_mixed_precision_is_taken_out_of_the_gates_gradients():
    a,b = [fit(make_learn(FeatureGates(20)), cbs=cbs) for cbs in (None, Scaled())]
    assert torch.equal(*[l.feature_gates.record.state['log_alpha'] for l in (a,b)]) and torch.equal(preds(a), preds(b))


@pytest.mark.filterwarnings('ignore:torch.cuda.amp')
def test_mixed_precision_and_gradients_that_are_not_finite():
    learn = fit(make_learn(FeatureGates(20)), cbs=MixedPrecision('fp16'))
    assert learn.feature_gates.record.state['log_alpha'].isfinite().all()
    def spoil(learn, name):
        if learn.iter==3: learn.feature_gates._gate.log_alpha.grad.fill_(np.nan)
    learn = fit(make_learn(FeatureGates(20, end=1.)), 1, cbs=Each(spoil, 'after_backward'))
    assert learn.feature_gates.record.state['log_alpha'].isfinite().all()


def test_a_network_keeps_at_least_one_column():
    learn = fit(make_learn(FeatureGates(1e9, gate_lr=1., warm=0)))
    assert len(learn.feature_gates.kept_columns())==1 and preds(learn).isfinite().all()


def test_the_gradient_of_the_price_is_that_of_the_expected_count():
    learn = make_learn(FeatureGates(30, warm=0))
    seen = []
    def check(learn, name):
        cb = learn.feature_gates
        if cb._gate is None or cb._loss is None or seen: return
        loss = cb._gate.expected_open()*30/192*2*cb._loss
        want, = torch.autograd.grad(loss, cb._gate.log_alpha)
        assert torch.allclose(cb._price_gradient(), want, rtol=1e-5)
        seen.append(1)
    fit(learn, 1, cbs=Each(check, 'after_batch'))
    assert seen


@pytest.mark.parametrize('loss,unit', [(F.mse_loss, 1.), (nn.SmoothL1Loss(), 1.), (partial(F.l1_loss, reduction='mean'), .5), (F.cross_entropy, 1.), (lambda a, b: 0, 1.)])
def test_units(loss, unit): assert nats_per_loss(loss, torch.tensor(.5))==unit


def test_few_steps_get_a_higher_learning_rate():
    cb = FeatureGates()
    def rate(n_epoch): return FeatureGates._lr(SimpleNamespace(gate_lr=None, end=.7, learn=SimpleNamespace(n_epoch=n_epoch, dls=SimpleNamespace(train=range(100)))))
    assert rate(1)==.1 and rate(100)==.03 and .03<rate(8)<.1 and cb.gate_lr is None


def test_lr_find_and_validation_do_not_train_gates(tmp_path):
    learn = make_learn(FeatureGates(20), path=tmp_path)
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=8)
    learn.validate()
    assert not learn.feature_gates.record.state and is_plain(learn)


def test_other_models_are_refused(dls):
    with pytest.raises(TypeError, match="the Learner's model must be a tabular model.*got Sequential"):
        Learner(dls, nn.Sequential(nn.Linear(2, 1)), loss_func=F.mse_loss, cbs=FeatureGates())
    learn = make_learn()
    learn.model.layers[0][0] = nn.Linear(9, 16)
    with pytest.raises(TypeError, match='2 embeddings and 9 inputs'): learn.add_cb(FeatureGates())


@pytest.mark.parametrize('kw', [dict(price=-1), dict(gate_lr=0), dict(end=1.5), dict(end=0), dict(p0=0), dict(warm=1)], ids=str)
def test_bad_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): FeatureGates(**kw)


def test_beside_other_callbacks():
    learn = fit(make_learn(FeatureGates(20, end=.5), FrozenZeroInit(.3, seed=1), DropConnect(.1), RecalibrateBN(), SnapshotEnsemble()), 4)
    assert preds(learn).isfinite().all() and is_plain(learn) and learn.feature_gates.record.state['fixed']
    assert not weight(learn)[~learn.frozen_zero_init.record['layers.0.0.weight']].any() and not weight(learn)[:,removed_inputs(learn)].any()
