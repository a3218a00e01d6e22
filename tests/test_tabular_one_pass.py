"Embeddings in one pass: the numbers of the layers one by one, bit for bit, and the layers themselves where anything is unusual"
import pickle
from copy import deepcopy
import pytest, torch, torch.autograd.forward_ad as forward_ad
from fastai.tabular.all import SGD, TabularModel, set_seed
from torch import nn
from torch.func import functional_call, vmap
from fastai_dropconnect.all import *
from fastai_dropconnect.kernels import lookup as kernels
from fastai_dropconnect.tabular.one_pass import OnePassTabularModel, embed_columns
from conftest import make_dls

SIZES = [(9,4), (3,2), (50,17), (2,1)]

def codes(n=40):
    g = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(rows, (n,), generator=g) for rows,_ in SIZES], 1)

def tables(p=0., **kwargs):
    torch.manual_seed(0)
    return nn.ModuleList([DropConnectEmbedding(*size, p=p, **kwargs) if p else nn.Embedding(*size, **kwargs) for size in SIZES])

def one_by_one(embeds, x): return torch.cat([e(x[:,i]) for i,e in enumerate(embeds)], 1)

def with_gradients(f, embeds, x):
    torch.manual_seed(2)
    for p in embeds.parameters(): p.grad = None
    out = f(embeds, x)
    (out*torch.arange(out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *[p.grad for p in embeds.parameters()]]

def assert_same(embeds, x):
    for a,b in zip(with_gradients(embed_columns, embeds, x), with_gradients(one_by_one, embeds, x), strict=True):
        assert (a is None and b is None) or (a.dtype==b.dtype and torch.equal(a, b))

def test_defaults_of_torch_change_nothing():
    embeds,x = tables(),codes()
    try:
        torch.set_default_dtype(torch.float64)
        assert_same(embeds, x)
    finally: torch.set_default_dtype(torch.float32)


def test_forward_mode():
    embeds,x = tables(),codes()
    names = [f'{i}.weight' for i in range(len(SIZES))]
    class OnePass(nn.Module):
        def __init__(self, f): super().__init__(); self.embeds,self.f = embeds,f
        def forward(self, x): return self.f(self.embeds, x)
    def tangent(f):
        with forward_ad.dual_level():
            duals = {f'embeds.{n}': forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n,p in zip(names, embeds.parameters())}
            return forward_ad.unpack_dual(functional_call(OnePass(f), duals, x)).tangent
    assert torch.equal(tangent(embed_columns), tangent(one_by_one))


@pytest.fixture
def calls(monkeypatch):
    "How often the kernel ran"
    count = []
    shipped = kernels.lookup
    monkeypatch.setattr(kernels, 'lookup', lambda *args: count.append(1) or shipped(*args))
    return count


def freeze_one(embeds): embeds[1].requires_grad_(False)
def no_grad(embeds): embeds.requires_grad_(False)[0].requires_grad_(True)

@pytest.mark.parametrize('n', [0,1,40])
@pytest.mark.parametrize('p', [0.,.3])
@pytest.mark.parametrize('change', [lambda e: e, freeze_one, no_grad, nn.Module.eval])
def test_same_numbers(calls, n, p, change):
    embeds = tables(p)
    change(embeds)
    assert_same(embeds, codes(n))
    assert calls


def test_other_layouts_of_the_codes(calls):
    assert_same(tables(), codes().T.contiguous().T)
    assert_same(tables(), codes(80)[::2])
    assert len(calls)==2


def with_hook(embeds): embeds[2].register_forward_hook(lambda m, args, out: 2*out)
def with_own_forward(embeds): embeds[0].forward = lambda x: torch.zeros(len(x), 4)
def transposed(embeds): embeds[0].weight.data = embeds[0].weight.data.t().contiguous().t()
def parametrized(embeds): nn.utils.parametrize.register_parametrization(embeds[0], 'weight', nn.ReLU())

@pytest.mark.parametrize('change', [with_hook, transposed, parametrized, nn.Module.double])
def test_unusual_layers_are_called(calls, change):
    embeds = tables()
    change(embeds)
    assert_same(embeds, codes())
    assert not calls

@pytest.mark.parametrize('options', [dict(padding_idx=1), dict(scale_grad_by_freq=True)])
def test_options_of_layers(calls, options):
    assert_same(tables(**options), codes())
    assert not calls

def test_a_method_of_ones_own():
    embeds = tables()
    with_own_forward(embeds)
    assert not embed_columns(embeds, codes())[:,:4].any()


def test_codes_out_of_range():
    for code in (-1, 9):
        x = codes()
        x[3,0] = code
        with pytest.raises(IndexError, match='out of range'): embed_columns(tables(), x)


def test_codes_that_change_before_backward_are_refused():
    x = codes()
    out = embed_columns(tables(), x)
    x.zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace'): out.sum().backward()


def test_second_derivatives_and_functions_of_torch():
    embeds,x = tables(),codes()
    weights = list(embeds.parameters())
    def second(f):
        first = torch.autograd.grad(f(embeds, x).pow(3).sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    for a,b in zip(second(embed_columns), second(one_by_one), strict=True): torch.testing.assert_close(a, b)
    model = OnePassTabularModel(SIZES, 0, 1, [8]).eval()
    twice = {n: torch.stack([p, 2*p]) for n,p in model.named_parameters()}
    both = vmap(lambda params: functional_call(model, params, (x,)))(twice)
    torch.testing.assert_close(both[1], functional_call(model, {n: p[1] for n,p in twice.items()}, (x,)))


def test_the_model_is_the_same():
    plain = TabularModel(SIZES, 0, 1, [8], embed_p=.5)
    fast = deepcopy(plain)
    fast.__class__ = OnePassTabularModel
    assert list(fast.state_dict())==list(plain.state_dict())
    outs = []
    for m in (plain,fast):
        torch.manual_seed(3)
        outs.append(m(codes()))
    assert torch.equal(*outs)
    again = torch.compile(fast.eval(), backend='aot_eager', fullgraph=True, dynamic=True)
    torch.testing.assert_close(again(codes()), plain.eval()(codes()))


@pytest.mark.parametrize('copied', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_accelerate_keeps_the_parameters(copied):
    set_seed(0)
    learn = tabular_learner(make_dls(), layers=[8], opt_func=SGD)
    params = list(learn.model.parameters())
    learn.accelerate()
    assert type(learn.model) is OnePassTabularModel
    assert all(a is b for a,b in zip(params, learn.model.parameters(), strict=True))
    twin = copied(learn)
    with twin.no_bar(),twin.no_logging(): twin.fit(1, 1e-2)
    assert not torch.equal(twin.model.embeds[0].weight, params[0])      # it trains its own tables
    assert type(learn.decelerate().model) is TabularModel and type(twin.decelerate().model) is TabularModel


def test_zeros_of_embeddings_are_held():
    set_seed(0)
    learn = tabular_learner(make_dls(), layers=[8]).accelerate()
    held = HeldWeights({e.weight: torch.rand_like(e.weight)>.5 for e in learn.model.embeds})
    x,y = learn.dls.one_batch()[:2],learn.dls.one_batch()[2]
    learn.create_opt()
    for _ in range(3):
        (learn.model(*x)-y).square().mean().backward()
        held.step(learn.opt)
        learn.opt.zero_grad()
    for w,bits in held.bits.items(): assert not w[bits==0].any() and w[bits!=0].all()
