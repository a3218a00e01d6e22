"Every model and callback composes with fastai's features, and trains the same network on the fast path"
from contextlib import contextmanager
from functools import cache, partial
import pytest, torch
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.tabular.all import Callback, Learner, SchedLin, SGD, noop, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.gates import FeatureGates
from fastai_dropconnect.callback.hard_concrete import HardConcrete
from fastai_dropconnect.callback.penalty import GroupLasso
from fastai_dropconnect.callback.prune import GradualPruning
from fastai_dropconnect.sparsity.core import MaskRecord
from fastai_dropconnect.tabular.resnet import tabular_resnet_config
from conftest import make_dls, make_table


@cache
def shared_dls(n): return make_dls(make_table(n), bs=16)

def learner(config=None, cbs=None, seed=0, n=120, **kwargs):
    "Make a Learner; `config` are arguments of `tabular_dropconnect_config` or a config, `cbs` makes the callbacks"
    set_seed(seed)
    if type(config) is dict: config = tabular_dropconnect_config(**config)
    learn = tabular_learner(shared_dls(n), layers=[12,8], config=config, cbs=cbs and cbs(), **kwargs)
    learn.remove_cb(learn.progress)
    return learn

# Whatever a Learner of this package can be made of
LEARNERS = dict(
    plain=dict(), example=dict(config=dict(weight_p=.2)), batch=dict(config=dict(weight_p=.2, mode='batch')),
    gaussian=dict(config=dict(weight_p=.2, mode='gaussian')), embeddings=dict(config=dict(embed_weight_p=.2, out_p=.1)),
    ple=dict(config=dict(num_embeddings='ple', weight_p=.1)), periodic=dict(config=dict(num_embeddings='periodic')),
    members=dict(config=dict(members=3, weight_p=.1)), callback=dict(cbs=lambda: DropConnect(.2)),
    schedule=dict(cbs=lambda: DropConnect(SchedLin(.3, .1))), frozen_zero=dict(cbs=lambda: FrozenZeroInit(.5, seed=3)),
    free_zero=dict(cbs=lambda: FrozenZeroInit(.5, mask_grads=False)), recalibrated=dict(cbs=lambda: RecalibrateBN(True)),
    pruned=dict(cbs=lambda: GradualPruning(8)), units=dict(cbs=lambda: GradualPruning(4, structured=True)), lasso=dict(cbs=lambda: GroupLasso(threshold=.1)),
    quantiles=dict(noise='quantile'), mixtures=dict(noise='mixture', config=dict(members=2)),
    snapshots=dict(cbs=SnapshotEnsemble), best_average=dict(cbs=lambda: BestAverage(every=2)), variational=dict(cbs=lambda: VariationalDropConnect()),
    gates=dict(cbs=lambda: FeatureGates(5, end=.6)), ple_gates=dict(config=dict(num_embeddings='ple', members=2), cbs=lambda: FeatureGates(5)),
    hard=dict(cbs=lambda: HardConcrete(5, gate_lr=.3)), resnet=dict(config=tabular_resnet_config(width=8, weight_p=.1, path_p=.2)), zero_restarts=dict(cbs=lambda: ZeroRestarts(1, seed=2)),
    all_callbacks=dict(cbs=lambda: [DropConnect(.2), FrozenZeroInit(.5), RecalibrateBN(), ZeroRestarts(1)]))

class Autocast(Callback):
    "Mixed precision on the CPU; fastai's `MixedPrecision` knows CUDA only"
    def before_batch(self):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.context.__exit__(None, None, None)

def fit(learn, n_epoch=1, **kwargs):
    set_seed(1)
    learn.fit_one_cycle(n_epoch, 1e-2, **kwargs)

def frozen(learn):
    learn.freeze()
    fit(learn)
    learn.unfreeze()
    fit(learn)

def fine_tuned(learn):
    set_seed(1)
    learn.fine_tune(1, 1e-2, 1)

def compiled(learn):
    torch._dynamo.reset()
    model,learn.model = learn.model,torch.compile(learn.model, backend='eager')
    fit(learn)
    learn.model = model

def split(model): return [list(model.embeds.parameters()), [p for n,p in model.named_parameters() if not n.startswith('embeds')]]

# What fastai's users do with one
FEATURES = dict(
    plain=lambda l: fit(l, 2), clip=lambda l: fit(l, cbs=GradientClip(.1)), accumulate=lambda l: fit(l, cbs=GradientAccumulation(32)),
    amp=lambda l: fit(l, cbs=Autocast), frozen=frozen, fine_tune=fine_tuned, compile=compiled,
    trackers=lambda l: fit(l, 2, cbs=[EarlyStoppingCallback(patience=3), SaveModelCallback()]))

# All Learners as they are, and those that hold most of the others with each feature; test_contract.py compiles each layer
PAIRS = [(name,'plain') for name in LEARNERS] + [('example','compile'), ('gates','compile')]
PAIRS += [(name,feature) for name in ('example','members','all_callbacks','gates') for feature in FEATURES if feature not in ('plain','compile')]

@contextmanager
def quiet(learn):
    with learn.no_bar(),learn.no_logging(): yield learn

fast = partial(Learner.accelerate, replacement=True, valid_bs=16)   # the draws of fastai

def trained(name, feature, change, **kwargs):
    learn = learner(**LEARNERS[name], splitter=split, **kwargs)
    change(learn)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with quiet(learn): FEATURES[feature](learn)
    assert torch.stack(learn.recorder.losses).isfinite().all()
    assert any((p!=q).any() for p,q in zip(before, learn.model.parameters()))
    return learn

@pytest.mark.parametrize('name,feature', PAIRS)
def test_composes_and_the_fast_path_trains_the_same_network(name, feature, tmp_path):
    a,b = [trained(name, feature, change, path=tmp_path, opt_func=partial(SGD, mom=.9)) for change in (noop, fast)]
    assert [l.item() for l in a.recorder.losses] == [l.item() for l in b.recorder.losses]
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k


@pytest.mark.parametrize('name', LEARNERS)
def test_validate_get_preds_and_lr_find_change_nothing(name, tmp_path):
    learn = learner(**LEARNERS[name], path=tmp_path, fast=True)
    with quiet(learn):
        fit(learn)
        state,opt = [{k: v.clone() if torch.is_tensor(v) else v for k,v in s.items()} for s in (learn.model.state_dict(), learn.opt.state_dict()['hypers'][0])]
        preds = learn.get_preds()[0]
        learn.validate()
        learn.lr_find(show_plot=False, num_it=12)
        assert torch.equal(learn.get_preds()[0], preds)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k]), k


@pytest.mark.parametrize('name', LEARNERS)
def test_fits_under_autocast(name, tmp_path):
    "All callbacks train in half precision, and hold what they hold"
    learn = learner(**LEARNERS[name], path=tmp_path)
    with quiet(learn): fit(learn, 2, cbs=Autocast())
    assert torch.stack(learn.recorder.losses).isfinite().all() and learn.get_preds()[0].dtype==torch.float32
    for n,p in learn.model.named_parameters(): assert p.dtype==torch.float32 and p.isfinite().all(), n
    params = dict(learn.model.named_parameters())
    for cb in learn.cbs:
        if not isinstance(getattr(cb, 'record', None), MaskRecord) or not getattr(cb, 'mask_grads', True): continue
        for n in cb.record: assert (params[n][~cb.record[n]]==0).all(), n
