"`GradualPruning` and `GroupLasso`: what is gone stays exactly zero, counts are exact, and a resumed fit prunes as an uninterrupted one"
import pickle, random, warnings
from functools import partial
import pytest, torch, torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam, Lamb, OptimWrapper, QHAdam, RAdam, RMSProp, SGD, ranger
from fastai.tabular.all import Callback, DataLoaders, L, Learner, ProgressCallback, noop, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.penalty import GroupLasso
from fastai_dropconnect.callback.prune import GradualPruning
from fastai_dropconnect.sparsity.graph import ChannelGraph
from fastai_dropconnect.sparsity.prune import Pruner, keep_best, watch_inputs

torch.set_num_threads(1)


def make_dls(n=96, bs=16):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g)
    ds = TensorDataset(x, x.prod(1, keepdim=True) + x[:,:1])
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=True, device='cpu', num_workers=0)

def make_model(): return nn.Sequential(nn.Linear(4,12), nn.Tanh(), nn.BatchNorm1d(12), nn.Linear(12,8), nn.Tanh(), nn.Linear(8,1))
N_ALL = 4*12+12*8+8

def make_learn(*cbs, seed=0, opt_func=Adam, path=None, model=None, **kw):
    set_seed(seed)
    learn = Learner(make_dls(), model or make_model(), F.mse_loss, opt_func=opt_func, cbs=L(cbs), path=path, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def weights(learn): return {n: p.detach().clone() for n,p in learn.model.named_parameters() if p.dim()>1}
def n_live(learn): return int(learn.gradual_pruning.report().live.sum())
def equal(a, b): return all(torch.equal(a[n], b[n]) for n in a)

class Watch(Callback):
    "Check after each step that pruned weights are zero and never come back"
    order = GradualPruning.order+1
    def before_fit(self): self.counts,self.gone = [],{}
    def after_step(self):
        cb = next(c for c in self.learn.cbs if isinstance(c, (GradualPruning,GroupLasso)))
        for n,(p,_) in cb.weights().items():
            if n not in cb.record: continue
            mask = cb.record[n]
            assert (p.detach()[~mask]==0).all() and (p.detach()[mask]!=0).any()
            assert not (mask & self.gone.get(n, ~mask)).any(), 'a weight came back'
            self.gone[n] = ~mask
        self.counts.append(sum(int(m.sum()) for m in self.gone.values()))

torch_opts = {f'torch.{n}': partial(OptimWrapper, opt=partial(getattr(torch.optim, n), **kw)) for n,kw in
              dict(SGD=dict(momentum=0.9, lr=.1, weight_decay=.1), AdamW=dict(weight_decay=.1), RMSprop=dict(momentum=.9, weight_decay=.1)).items()}
opts = dict(Adam=Adam, AdamL2=partial(Adam, decouple_wd=False), FusedAdam=FusedAdam, SGD=partial(SGD, mom=.9), RAdam=RAdam, Lamb=Lamb,
            ranger=ranger, RMSProp=partial(RMSProp, mom=.9), QHAdam=QHAdam) | torch_opts

@pytest.mark.parametrize('make', [lambda: GradualPruning(8, regrow=0), lambda: GroupLasso(threshold=.2)], ids=['pruning','lasso'])
@pytest.mark.parametrize('opt', opts.values(), ids=opts)
def test_exact_zeros_under_every_optimizer(opt, make):
    learn = make_learn(make(), Watch(), opt_func=opt, wd=None if 'torch' in str(opt) else .1)
    learn.fit(4, 1e-2)
    assert learn.watch.counts==sorted(learn.watch.counts) and learn.watch.counts[-1]>0
    if hasattr(learn, 'gradual_pruning'):
        assert N_ALL//8-8 <= n_live(learn) <= N_ALL//8
        assert learn.watch.counts[0]==0 and learn.watch.counts[-1]==learn.watch.counts[-3]     # begins later, and ends earlier


@pytest.mark.parametrize('kw', [{}, dict(structured=True), dict(regrow=0), dict(schedule='linear'), dict(schedule='once'), dict(criterion='size'), dict(every=3)],
                         ids=lambda kw: next(iter(kw), 'plain'))
def test_counts(kw):
    learn = make_learn(GradualPruning(6, **kw))
    learn.fit(5, 1e-2)
    assert N_ALL/6*(.5 if kw.get('structured') else .85) <= n_live(learn) <= round(N_ALL/6)
    zeros = {n: w==0 for n,w in weights(learn).items()}
    learn.fit(2, 1e-2)                    # holds them
    assert equal({n: w==0 for n,w in weights(learn).items()}, zeros)
    learn.gradual_pruning.release()
    learn.fit(1, 1e-2)
    assert all((w!=0).float().mean()>.5 for w in weights(learn).values())


def test_structured_pruning_empties_rows_and_columns():
    learn = make_learn(GradualPruning(4, structured=True))
    learn.fit(5, 1e-2)
    for n,w in weights(learn).items():
        full = (w!=0).any(1)[:,None] & (w!=0).any(0)
        assert torch.equal(w!=0, full), n


@pytest.mark.parametrize('kw', [{}, dict(structured=True), dict(regrow=0)], ids=['regrow','structured','no regrow'])
def test_a_resumed_fit_equals_an_uninterrupted_one(kw, tmp_path):
    class Stop(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch==2: self.learn.save('half')
    def fit(learn, **more):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(5, 1e-2, **more)
    class Seed(Callback):
        order = -100
        def before_epoch(self):
            set_seed(self.epoch)
            self.dls.train.rng = random.Random(self.epoch)
    a = make_learn(GradualPruning(6, **kw), Seed(), Stop(), path=tmp_path)
    fit(a)
    b = make_learn(GradualPruning(6, **kw), Seed(), seed=7, path=tmp_path)
    b.load('half', with_opt=True)
    fit(b, start_epoch=3)
    assert equal(weights(a), weights(b))


def test_pickle_lr_find_and_broken_fits(tmp_path):
    learn = make_learn(GradualPruning(6), path=tmp_path)
    before = weights(learn)
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert equal(weights(learn), before) and not list(learn.gradual_pruning.record)
    class Break(Callback):
        def after_batch(self):
            if self.epoch==1 and self.iter==3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=Break())
    assert learn.gradual_pruning._held is None and learn.gradual_pruning._pruner is None
    zeros = {n: w==0 for n,w in weights(learn).items()}
    learn.fit(2, 1e-2)
    assert all((z <= (w==0)).all() for z,w in zip(zeros.values(), weights(learn).values()))
    want = learn.get_preds()[0]
    again = pickle.loads(pickle.dumps(learn))
    assert torch.equal(again.get_preds()[0], want)
    again.fit(1, 1e-2)
    assert equal({n: w==0 for n,w in weights(again).items()}, {n: w==0 for n,w in weights(learn).items()})


@pytest.mark.parametrize('cb', [lambda: MixedPrecision('bf16'), lambda: GradientAccumulation(32)], ids=['bf16','accumulation'])
def test_composes(cb):
    learn = make_learn(GradualPruning(6, regrow=.2), cb())
    learn.fit(5, 1e-2)
    assert .7*N_ALL/6 <= n_live(learn) <= round(N_ALL/6)


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match='at least one weight'): make_learn(GradualPruning(1e6)).fit(1)
    with pytest.raises(ValueError, match='to_fp16'): make_learn(GradualPruning(4)).to_non_native_fp16().fit(1)
    with pytest.raises(ValueError, match="criterion='x'"): GradualPruning(4, criterion='x')
    with pytest.raises(TypeError, match='`begin`'): GradualPruning(4, begin='x')


def test_warns_without_decay():
    with pytest.warns(UserWarning, match='neither weight decay nor a penalty'): make_learn(GradualPruning(4), wd=0.).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        make_learn(GradualPruning(4), wd=.01).fit(1)
        make_learn(GradualPruning(4), GroupLasso(l1=1e-3, cut=None), wd=0.).fit(1)


def test_the_penalty_is_in_the_gradients_but_not_in_the_losses():
    a,b = make_learn(), make_learn(GroupLasso(.1, .1, .1, cut=None))
    assert a.validate()==b.validate()
    for learn in (a,b):
        set_seed(3)
        learn.dls.train.rng = random.Random(3)
        learn.fit(4, 1e-2)
    assert a.recorder.losses[0]==b.recorder.losses[0]
    assert sum(w.abs().sum() for w in weights(b).values()) < .5*sum(w.abs().sum() for w in weights(a).values())


def test_masks_of_a_pruner_are_exact_and_shrink():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    pruner = Pruner(net, {n: p for n,p in net.named_parameters() if p.dim()>1})
    before = pruner.masks
    for share in (.5, .2, .06):
        masks = pruner.prune(share, exact=True)
        assert round(share*pruner.n_all)-3 <= pruner.n_live() <= round(share*pruner.n_all)
        assert all((m<=before[n]).all() for n,m in masks.items())
        before = masks
    units = Pruner(net, {n: p for n,p in net.named_parameters() if p.dim()>1}, structured=True)
    with watch_inputs(units): net(torch.randn(50, 10))
    assert set(units.mean_squares)=={'0','2','4'} and not any(m._forward_pre_hooks for m in net.modules())
    assert all(m.any() for m in units.prune(.001).values())       # a unit of each layer stays


def test_equal_scores_are_counted_exactly():
    scores,masks = dict(a=torch.ones(6)),dict(a=torch.ones(2, 3, dtype=torch.bool))
    for n in range(7): assert keep_best(scores, masks, n)['a'].sum()==n


class Twice(nn.Module):
    "Sums, columns side by side, and a layer that is not pruned"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.last = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(6, 5),nn.Linear(13, 3)
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.last(torch.cat([h+F.relu(self.b(h)), torch.tanh(self.c(x))], 1))

def convs(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
def mlp(): return nn.Sequential(nn.Linear(7, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))

@pytest.mark.parametrize('steps', [50, 3], ids=['distinct','equal scores'])
@pytest.mark.parametrize('make', [Twice, convs, mlp])
def test_ranks_find_what_the_search_finds(make, steps, monkeypatch):
    "Once the numbers are counted again and again, and once they follow from the ranks"
    assert ChannelGraph(make()).has_ranks
    def masks(searches):
        torch.manual_seed(steps)
        net,res = make(),[]
        for p in net.parameters(): p.data.copy_((p.data*steps).round()/steps + torch.randn_like(p)*(steps>3))
        pruner = Pruner(net, {n: p for n,p in net.named_parameters() if p.dim()>1 and n!='b.weight'})
        if searches: monkeypatch.setattr(ChannelGraph, 'has_ranks', False)
        for share in (.6, .4, .3, .2, .1, .05, .02):
            pruner.prune(share, exact=True)
            res.append(pruner.masks)
            for p in pruner.weights.values(): p.data.add_(.3*torch.randn_like(p)*(p!=0)) if steps>3 else None
        monkeypatch.undo()
        return res
    a,b = masks(False),masks(True)
    assert all(torch.equal(x[n], y[n]) for x,y in zip(a, b) for n in x) and 0<sum(m.sum() for m in a[-1].values())<sum(m.sum() for m in a[0].values())

def test_padding_and_ensembles_have_no_ranks():
    assert not ChannelGraph(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))).has_ranks
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Flatten(), nn.Linear(6*16, 4))
    pruner = Pruner(net, {n: p for n,p in net.named_parameters() if p.dim()>1})
    pruner.prune(.1, exact=True)
    assert .09*pruner.n_all < pruner.n_live() <= round(.1*pruner.n_all)
