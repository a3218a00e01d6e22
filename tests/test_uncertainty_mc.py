"Monte-Carlo passes: what is noisy, that nothing is left behind, and that moments agree with samples"
from contextlib import nullcontext
from types import SimpleNamespace
import pandas as pd, pytest, torch
from fastai.tabular.all import Learner, MSELossFlat, TabularModel, set_seed
from torch import nn
from conftest import make_dls, make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import mc      # noqa: F401
from fastai_dropconnect.uncertainty.mc import mc_samples, seeded
from fastai_dropconnect.uncertainty.moments import output_moments

pytestmark = pytest.mark.filterwarnings('ignore')
TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])
def tabular_args(n=16): return torch.randint(0, 5, (n,2)),torch.randn(n, 3)
def net(): return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.out = WeightDropout(nn.LSTM(6, 5, 2, dropout=.2, batch_first=True), .3),nn.Linear(5, 2)
    def forward(self, x): return self.out(self.rnn(x[:,None].expand(-1, 3, -1))[0][:,-1])

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer,self.out = nn.TransformerEncoderLayer(6, 2, 8, dropout=.3, batch_first=True),nn.Linear(6, 2)
    def forward(self, x): return self.out(self.layer(x[:,None].expand(-1, 4, -1)).mean(1))

NETS = dict(
    plain=(net, .2, None), dropout=(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(.3, inplace=True), nn.Linear(12, 2)), None, None),
    dropconnect=(lambda: nn.Sequential(DropConnectLinear(6, 12, p=.3), nn.ReLU(), nn.Linear(12, 2)), None, None),
    sampled=(lambda: nn.Sequential(DropConnectLinear(6, 12, p=.3, sample_eval=True), nn.Linear(12, 2)), None, None),
    members=(lambda: masked_ensemble_(net(), 3), .2, None), recurrent=(Recurrent, None, None), attention=(Attention, None, None),
    embeddings=(lambda: TabularDropConnectModel(**TAB, embed_weight_p=.3), None, tabular_args()),
    ple=(lambda: TabularDropConnectModel(**TAB, num_embeddings=PLE(bins=6, weight_p=.2).fitted(torch.randn(50, 3))), .1, tabular_args()),
    fastai=(lambda: TabularModel(**TAB, y_range=(0,1)), .2, tabular_args()), ps=(lambda: TabularModel(**TAB, ps=[.2,.1], embed_p=.1), None, tabular_args()))

def case(name):
    torch.manual_seed(0)
    make,p,args = NETS[name]
    return make(),p,args or (torch.randn(16, 6),)

def state(model):
    return dict(tensors={k:v.clone() for k,v in model.state_dict().items()}, training=[m.training for m in model.modules()],
                classes=[type(m) for m in model.modules()], ids=[id(p) for p in model.parameters()],
                attrs=[sorted(k for k in vars(m) if not k.startswith('_') or k=='_dropconnect') for m in model.modules()],
                values=[{k:v for k,v in vars(m).items() if k in ('p','mode','weight_p','embed_p','dropout','average')} for m in model.modules()],
                hooks=[(len(m._forward_hooks),len(m._forward_pre_hooks)) for m in model.modules()],
                fast=torch.backends.mha.get_fastpath_enabled())

def assert_same(a, b):
    for k,v in a['tensors'].items(): assert torch.equal(v, b['tensors'][k]), k
    assert {k:v for k,v in a.items() if k!='tensors'} == {k:v for k,v in b.items() if k!='tensors'}

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('training', [True,False])
def test_samples_are_noisy_repeat_and_leave_nothing_behind(name, training):
    model,p,args = case(name)
    model.train(training)
    before,rng = state(model),torch.get_rng_state()
    a = mc_samples(model, args, n=4, p=p, seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(before, state(model))
    assert a.shape[:2]==(16,4) and (a.std(1)>0).any() and a.isfinite().all() and not a.requires_grad
    assert torch.equal(mc_samples(model, args, n=4, p=p, seed=3), a)
    assert not torch.equal(mc_samples(model, args, n=4, p=p, seed=4), a)
    assert (a[:,1]!=a[:,2]).any()

@pytest.mark.parametrize('name', ['plain','ple','attention'])
def test_an_error_leaves_nothing_behind(name):
    model,p,args = case(name)
    before = state(model)
    last = list(model.modules())[-1]
    last.forward = lambda *args: 1/0
    for f in (mc_samples, output_moments):
        with pytest.raises(ZeroDivisionError): f(model, args, p=p)
    del last.forward
    assert_same(before, state(model))

@pytest.mark.parametrize('mode', ['example','batch','gaussian'])
@pytest.mark.parametrize('name', ['plain','fastai','members'])
def test_each_mode_has_the_moments_that_are_computed(name, mode):
    model,p,args = case(name)
    model.eval()
    s = mc_samples(model, args, n=3000, p=p, mode=mode, seed=1)
    if name=='members': s = s.unflatten(-1, (3,2)).flatten(1, 2)
    mean,var = output_moments(model, args, p=p)
    ratio = var.sqrt()/s.std(1)
    assert (ratio.log().abs().median() < .05) and (ratio.log().abs() < .5).all()     # twelve inputs are not quite normal
    assert ((mean-s.mean(1)).abs()/s.std(1)).median() < .1

def test_p_0_is_the_plain_model_and_rows_may_be_few():
    model,_,(x,) = case('plain')
    out = model.eval()(x)
    assert torch.equal(mc_samples(model, (x,), n=3, p=0.)[:,0], out)
    for n in (0, 1):
        assert mc_samples(model, (x[:n],), n=3, p=.1).shape==(n,3,2)
        assert [len(t) for t in output_moments(model, (x[:n],), p=.1)]==[n,n]

def test_float64_and_autocast():
    model,_,(x,) = case('plain')
    assert mc_samples(model.double(), (x.double(),), n=2, p=.1, mode='gaussian').dtype==torch.float64
    with torch.autocast('cpu', torch.bfloat16): assert mc_samples(model.float(), (x,), n=2, p=.1, mode='gaussian').isfinite().all()

@pytest.mark.parametrize('name,kw', [('embeddings', {}), ('recurrent', {}), ('ple', {}), ('plain', dict(mode='batch'))])
def test_rows_are_not_repeated_where_a_mask_is_shared(name, kw):
    model,p,args = case(name)
    with pytest.raises(ValueError, match='`repeat` must be 1 .* one mask for all rows'): mc_samples(model, args, p=p, repeat=2, **kw)

def test_repeated_rows_have_noise_of_their_own():
    model,_,args = case('ps')
    s = mc_samples(model, args, n=7, repeat=3, seed=0)
    assert s.shape==(16,7,2) and len(s[0,:,0].unique())>4

@pytest.mark.parametrize('kw,match', [(dict(), '`p` must be given'), (dict(p=1.), 'p=1.0'), (dict(p=.1, mode='rows'), "mode='rows'"), (dict(p=.1, n=0), 'n=0')])
def test_arguments(kw, match):
    model,_,args = case('plain')
    with pytest.raises(ValueError, match=match): mc_samples(model, args, **kw)

def test_moments_refuse_what_they_cannot_do():
    model,_,args = case('embeddings')
    with pytest.raises(TypeError, match=r'embeds.0 \(DropConnectEmbedding\)'): output_moments(model, args)
    with pytest.raises(TypeError, match='got Softmax'): output_moments(nn.Sequential(DropConnectLinear(6, 3, p=.1), nn.Softmax(1)), (torch.randn(3, 6),))

@pytest.mark.parametrize('dropout', [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_to_another_value_than_0_has_no_moments(dropout):
    model,x = nn.Sequential(nn.Linear(6, 9), nn.SELU(), dropout(.2), nn.Linear(9, 2)),torch.randn(5, 6)
    with pytest.raises(TypeError, match=f'got {dropout.__name__}: draw samples'): output_moments(model, (x,))
    assert mc_samples(model, (x,), n=3).std(1).gt(0).all()

def test_the_diagonal_is_exact_for_one_noisy_layer():
    torch.manual_seed(0)
    model,x = nn.Sequential(DropConnectLinear(6, 9, p=.2), nn.ReLU(), nn.Linear(9, 2)),torch.randn(5, 6)
    for a,b in zip(output_moments(model, (x,)), output_moments(model, (x,), diagonal=True)): assert torch.allclose(a, b, atol=1e-5)


# Of a Learner

def learner(**kwargs):
    set_seed(0)
    learn = tabular_learner(make_dls(make_table(120), bs=16), layers=[12,8], **kwargs)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    return learn

def test_nothing_in_the_learner_changes():
    learn = learner(metrics=lambda p, t: (p-t).abs().mean())
    before,preds = state(learn.model),learn.get_preds()[0]
    held = {k:id(v) for k,v in vars(learn).items() if k in ('loss_func','model','opt','metrics','dls')}
    for kw in (dict(seed=0), dict(method='moments')):
        learn.get_mc_preds(p=.2, **kw)
        assert_same(before, state(learn.model))
        assert held=={k:id(v) for k,v in vars(learn).items() if k in held}
    assert torch.equal(learn.get_preds()[0], preds) and 'forward' not in vars(learn.model)
    with pytest.raises(ZeroDivisionError):
        learn.get_mc_preds(p=.2, dl=[(1/0 for _ in range(2))] and Broken(learn.dls.valid))
    assert_same(before, state(learn.model))
    assert held=={k:id(v) for k,v in vars(learn).items() if k in held}

class Broken:
    "Batches that end in an error"
    def __init__(self, dl): self.dl = dl
    def __len__(self): return 2
    def __iter__(self):
        yield next(iter(self.dl))
        raise ZeroDivisionError
    def __getattr__(self, name):
        if name=='dl' or name=='get_idxs': raise AttributeError(name)
        return getattr(self.dl, name)

def test_members_and_snapshots_are_samples():
    learn = learner(config=tabular_dropconnect_config(members=2))
    assert torch.equal(learn.get_mc_preds(n=2)[0], learn.get_member_preds()[0])
    with learn.no_logging(): learn.fit_zero_restarts(2, 1, seed=0)
    samples,targs = learn.get_mc_preds(n=9, p=.1, seed=0)
    assert samples.shape==(len(targs),9,1)
    mean,var,_ = learn.get_mc_preds(p=.1, method='moments')
    members = learn.get_member_preds()[0]
    assert (var.sqrt()>members.std(1, correction=0)*.99).all() and (mean-members.mean(1)).abs().max()<.3*var.sqrt().max()
    with pytest.raises(ValueError, match='`n` must be at least 4'): learn.get_mc_preds(n=3)

def test_any_learner():
    x = torch.randn(40, 6)
    from fastai.basics import DataLoader, DataLoaders
    dl = DataLoader(list(zip(x, x[:,:2])), bs=8)
    learn = Learner(DataLoaders(dl, dl), net(), MSELossFlat(), opt_func=None)
    learn.remove_cb(learn.progress)
    assert learn.get_mc_preds(n=3, p=.1)[0].shape==(40,3,2)

@pytest.mark.parametrize('mode', ['gaussian','example','batch'])
def test_rows_of_different_batches_have_noise_of_their_own(mode):
    "A seed repeats the whole prediction, not each batch, and leaves all random numbers as they were"
    learn = learner()
    one = make_table(120)[:1]
    dl = learn.dls.test_dl(pd.concat([one]*64, ignore_index=True), bs=2)
    rng = torch.get_rng_state()
    samples = learn.get_mc_preds(n=20, p=.2, mode=mode, dl=dl, seed=3)[0][:,:,0]
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(learn.get_mc_preds(n=20, p=.2, mode=mode, dl=dl, seed=3)[0][:,:,0], samples)
    first = samples[::2]     # of each batch
    assert len(first.unique(dim=0))==32
    ratio = first.mean(0).var()*32/first.var()      # noise that all batches share would not average out: 32
    assert .3 < ratio < 3

@pytest.mark.parametrize('kind,numbers', [('mps', [0]), ('xpu', [0, 1]), ('cuda', [1])])
@pytest.mark.parametrize('fails', [False, True])
def test_random_numbers_of_any_accelerator_go_on_as_before(kind, numbers, fails, monkeypatch):
    "A stand-in for devices that are not here: a generator for each of two"
    states = {0: torch.tensor([10]), 1: torch.tensor([20])}
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, 'get_rng_state', lambda device: states[device])
    monkeypatch.setattr(module, 'set_rng_state', lambda state, device: states.update({device: state}))
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device(kind, i)) for i in numbers] + [torch.zeros(1)])
    before = torch.get_rng_state()
    with nullcontext() if not fails else pytest.raises(KeyError), seeded(model, 3):
        states.update({i: torch.tensor([99]) for i in states})
        assert torch.initial_seed()==3
        if fails: raise KeyError
    assert {i: int(s) for i,s in states.items()}=={i: own if i in numbers else 99 for i,own in ((0, 10), (1, 20))}
    assert torch.equal(torch.get_rng_state(), before)

def test_no_rows_to_sample_are_named():
    learn = learner()
    empty = learn.dls.test_dl(make_table(120)[:0])
    for kw in (dict(), dict(method='moments')):
        with pytest.raises(ValueError, match='`dl` must have rows, got none'): learn.get_mc_preds(p=.1, dl=empty, **kw)


@pytest.mark.parametrize('scale', [1e-9, 1e-4, 1e6])
def test_moments_do_not_depend_on_the_unit(scale):
    "Of a network whose numbers are of another size from the first layer on"
    net = nn.Sequential(nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 30), nn.LeakyReLU(), nn.Linear(30, 2))
    x = torch.randn(40, 5)
    mean,var = output_moments(net, (x,), p=.1)
    with torch.no_grad():
        net[0].weight.mul_(scale)
        for layer in net[::2]: layer.bias.mul_(scale)
    small,of_small = output_moments(net, (x,), p=.1)
    torch.testing.assert_close(small/scale, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of_small/scale/scale, var, rtol=1e-3, atol=1e-6)
