"What torch does to functions and layers: compilation, tracing, vmap, derivatives of derivatives, tensors without data"
from contextlib import nullcontext
import pytest, torch, torch.autograd.forward_ad as forward_ad, torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastai_dropconnect.all import *
from fastai_dropconnect.functional import MODES
from fastai_dropconnect.masks import draw_seed, drop_probability, drop_threshold, example_mask

modes = pytest.mark.parametrize('mode', MODES)
pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore::torch.jit.TracerWarning')


def rows(n, width): return (torch.randn(n, width),)
def words(n): return (torch.randint(0, 5, (n,)),)
def table(n): return torch.randint(0, 5, (n,2)),torch.randn(n, 3)

# Each makes a layer, and a batch of `n` rows for it
CASES = {
    'drop_bias': lambda: (DropConnectLinear(5, 4, p=.3, drop_bias=True), lambda n: rows(n, 5)),
    'masked': lambda: (MaskedEnsembleLinear(5, 4, n_members=3), lambda n: rows(n, 15)),
    'masked-example': lambda: (MaskedEnsembleLinear(5, 4, n_members=2, p=.3), lambda n: rows(n, 10)),
    'embedding': lambda: (DropConnectEmbedding(5, 4, p=.3), words),
    'embedding_dropout': lambda: (EmbeddingDropout(nn.Embedding(5, 4), .3), words),
    'weight_dropout': lambda: (WeightDropout(nn.Linear(5, 4), .3, 'weight'), lambda n: rows(n, 5)),
    **{f'table-{m}': lambda m=m: (TabularDropConnectModel([(5,2), (5,2)], 3, 1, [6], weight_p=.3, mode=m, embed_weight_p=.2), table) for m in MODES}}


def step(layer, args, seed=3): # Outputs, and gradients of all parameters
    layer.zero_grad()
    torch.manual_seed(seed)
    y = layer(*args)
    y.square().sum().backward()
    return [y.detach(), *[p.grad.clone() for p in layer.parameters()]]

# torch.compile

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_one_graph_for_any_number_of_rows(case):
    torch._dynamo.reset()
    layer,batch = case()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for n in (6, 9):
        args = batch(n)
        for ours,theirs in zip(step(layer, args), step(compiled, args), strict=True): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@modes
def test_p_may_change_within_one_graph(mode):
    torch._dynamo.reset()
    compiled = torch.compile(linear_dropconnect, backend='aot_eager', fullgraph=True, dynamic=True)
    for n,p in ((6,.3), (7,.4), (8,.5)):
        args = torch.randn(n, 5),torch.randn(4, 5),torch.randn(4),p,mode
        torch.manual_seed(1)
        want = linear_dropconnect(*args)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(*args), want)
    with pytest.raises(ValueError, match='`p` must be a number with 0 <= p < 1, got p=1.5'): linear_dropconnect(*args[:3], 1.5)

# Derivatives of derivatives

def fixed(mode, seed=3):
    "The layer as a function with the same noise in each call"
    def f(x, w, b):
        torch.manual_seed(seed)
        return linear_dropconnect(x, w, b, .3, mode)
    return f

def doubles(*shapes): return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

def dense(mode, seed=3, n=6, n_in=5, n_out=4):
    "The dense expression with the noise of `fixed`"
    torch.manual_seed(seed)
    if mode=='example':
        seed,q = draw_seed(),drop_probability(drop_threshold(.3))
        mask = example_mask(seed, .3, n, n_out, n_in).double()/(1-q)
        return lambda x, w, b: torch.einsum('ri,oi,roi->ro', x, w, mask) + b
    if mode=='batch':
        mask = F.dropout(torch.ones(n_out, n_in, dtype=torch.float64), .3)
        return lambda x, w, b: F.linear(x, w*mask, b)
    x,w,b = doubles((n,n_in), (n_out,n_in), (n_out,))
    eps = (fixed(mode)(x, w, b)-F.linear(x, w, b)).detach()/(.3/.7*F.linear(x**2, w**2).detach()).sqrt()
    return lambda x, w, b: F.linear(x, w, b) + eps*(.3/.7*F.linear(x**2, w**2)).sqrt()


@modes
@pytest.mark.parametrize('needed', ['x', 'w', 'xwb'])
def test_a_gradient_penalty_is_that_of_the_dense_expression(mode, needed):
    ts = dict(zip('xwb', doubles((6,5), (4,5), (4,))))
    wrt = [ts[name] for name in needed]
    for name in set('xwb')-set(needed): ts[name].requires_grad_(False)
    results = []
    for f in (fixed(mode), dense(mode)):
        first = torch.autograd.grad(f(*ts.values()).pow(3).sum(), wrt, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt)
        results.append((*first, *second))
    for ours,theirs in zip(*results, strict=True): torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert all(g.abs().sum()>0 for g in results[0])


@modes
@pytest.mark.parametrize('backend', ['numba', 'torch'])
def test_second_derivatives(mode, backend, monkeypatch):
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', backend)
    assert torch.autograd.gradgradcheck(fixed(mode), doubles((6,5), (4,5), (4,)))


def test_second_derivatives_where_the_variance_is_zero():
    x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gx,gw = torch.autograd.grad(linear_dropconnect(x, w, None, .3, 'gaussian').sum(), (x,w), create_graph=True)
    second = torch.autograd.grad(gx.square().sum()+gw.square().sum(), (x,w))
    assert all(g.isfinite().all() for g in (gx, gw, *second))


def test_a_third_derivative():
    x,w,b = doubles((6,5), (4,5), (4,))
    def third(f):
        g, = torch.autograd.grad(f(x, w, b).pow(3).sum(), x, create_graph=True)
        h, = torch.autograd.grad(g.square().sum(), w, create_graph=True)
        return torch.autograd.grad(h.pow(3).sum(), x)[0]
    torch.testing.assert_close(third(fixed('example')), third(dense('example')), rtol=1e-8, atol=1e-8)

# torch.func, and forward mode

@modes
def test_torch_func_differentiates(mode):
    x,w,b = [t.detach() for t in doubles((6,5), (4,5), (4,))]
    t = torch.randn_like(w)
    ours,theirs = fixed(mode),dense(mode)
    for f in (lambda g: torch.func.grad(lambda w: g(x, w, b).pow(3).sum())(w),
              lambda g: torch.func.jvp(lambda w: g(x, w, b), (w,), (t,))[1],
              lambda g: torch.func.jvp(torch.func.grad(lambda w: g(x, w, b).pow(3).sum()), (w,), (t,))[1],
              lambda g: torch.func.vjp(lambda x: g(x, w, b), x)[1](torch.ones(6, 4, dtype=torch.float64))[0]):
        torch.testing.assert_close(f(ours), f(theirs), rtol=1e-8, atol=1e-8)
    with forward_ad.dual_level():
        outs = [forward_ad.unpack_dual(f(x, forward_ad.make_dual(w, t), b)).tangent for f in (ours,theirs)]
    torch.testing.assert_close(*outs)


@modes
def test_a_hessian(mode):
    x,w,b = [t.detach() for t in doubles((2,3), (2,3), (2,))]
    def f(x): return fixed(mode)(x, w, b).pow(3).sum()
    want = torch.autograd.functional.hessian(f, x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(f))(x), want, rtol=1e-8, atol=1e-8)


@modes
def test_vmap(mode, p=.3):
    x,w,b = torch.randn(5, 8),torch.randn(3, 8),torch.randn(3)
    def f(row): return linear_dropconnect(row, w, b, p, mode)
    with pytest.raises(RuntimeError, match='randomness'): torch.func.vmap(f)(x)
    different = torch.func.vmap(f, randomness='different')(x[:1].expand(2000, -1))
    plain,std = F.linear(x[0], w, b),(p/(1-p)*F.linear(x[0]**2, w**2)).sqrt()
    assert ((different.mean(0)-plain).abs()/std).max() < 5/2000**.5
    assert (different.std(0)/std-1).abs().max() < .1
    same = torch.func.vmap(f, randomness='same')(x[:1].expand(5, -1))
    assert (same==same[0]).all() and (same[0]!=plain).any()


@modes
def test_vmap_over_the_weights(mode):
    x,w = torch.randn(6, 5),torch.randn(3, 4, 5)
    def f(x, w): return linear_dropconnect(x, w, None, .3, mode)
    torch.manual_seed(1)
    members = torch.func.vmap(f, (None,0), randomness='same')(x, w)
    for k in range(3):
        torch.manual_seed(1)
        torch.testing.assert_close(members[k], f(x, w[k]))


@modes
def test_gradients_for_each_row(mode):
    layer,x = DropConnectLinear(5, 4, p=.3, mode=mode),torch.randn(6, 5)
    params = {n: p.detach() for n,p in layer.named_parameters()}
    def loss(params, row): return torch.func.functional_call(layer, params, row).square().sum()
    torch.manual_seed(1)
    each = torch.func.vmap(torch.func.grad(loss), (None,0), randomness='same')(params, x)
    for k in range(6):
        torch.manual_seed(1)
        for n,g in torch.func.grad(loss)(params, x[k]).items(): torch.testing.assert_close(each[n][k], g)

@pytest.mark.parametrize('layer', [*[DropConnectLinear(5, 4, p=.3, mode=m) for m in MODES], MaskedEnsembleLinear(5, 4, n_members=3, shared_input=True)],
                         ids=[*MODES,'members'])
def test_a_batch_of_gradients(layer):
    y,ws = layer(torch.randn(6, 5)),tuple(layer.parameters())
    gs = torch.randn(3, *y.shape)
    together = torch.func.vmap(lambda g: torch.autograd.grad(y, ws, g, retain_graph=True))(gs)
    for k in range(3):
        for ours,theirs in zip(torch.autograd.grad(y, ws, gs[k], retain_graph=True), together, strict=True): torch.testing.assert_close(ours, theirs[k])

# Tracing, and tensors without data

@modes
def test_a_traced_layer_draws_new_noise_for_any_number_of_rows(mode):
    layer = DropConnectLinear(5, 4, p=.3, mode=mode)
    traced = torch.jit.trace(layer, torch.randn(6, 5), check_trace=False)
    for n in (6, 3):
        for ours,theirs in zip(step(layer, rows(n, 5)), step(traced, rows(n, 5)), strict=True): assert ours.shape==theirs.shape
        x = torch.randn(n, 5)
        for ours,theirs in zip(step(layer, (x,)), step(traced, (x,)), strict=True): torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim('n')},)).module()
    torch.testing.assert_close(step(exported, (x[:2],))[0], step(layer, (x[:2],))[0])


@modes
def test_second_derivatives_of_compiled_and_traced_layers_are_right_or_refused(mode):
    torch._dynamo.reset()
    layer,x = DropConnectLinear(5, 4, p=.3, mode=mode),torch.randn(6, 5)
    def penalty(f):
        torch.manual_seed(1)
        g, = torch.autograd.grad(f(x).pow(3).sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), layer.weight)[0]
    for f in (torch.compile(layer, backend='aot_eager'), torch.jit.trace(layer, x, check_trace=False)):
        try: torch.testing.assert_close(penalty(f), penalty(layer))
        except RuntimeError as e: assert 'double backward' in str(e) or 'fastai_dropconnect.example_grad' in str(e)


@modes
def test_tensors_without_data(mode):
    for make in (lambda *s: torch.empty(*s, device='meta'), None):
        context = FakeTensorMode() if make is None else nullcontext()
        with context:
            x,w,b = [(make or torch.empty)(*s).requires_grad_() for s in ((6,5), (4,5), (4,))]
            y = linear_dropconnect(x, w, b, .3, mode)
            assert y.shape==(6,4) and y.device==x.device
            y.sum().backward()
            assert [t.grad.shape for t in (x,w,b)]==[(6,5), (4,5), (4,)]


@pytest.mark.parametrize('layer', [DropConnectLinear(5, 4), DropConnectEmbedding(5, 4), EmbeddingDropout(nn.Embedding(5, 4), .3),
                                   WeightDropout(nn.Linear(5, 4), .3, 'weight'), EnsembleLinear(5, 4, n_members=2),
                                   MaskedEnsembleLinear(5, 4, n_members=2)], ids=lambda l: type(l).__name__)
def test_script_is_refused_by_name(layer):
    for model in (layer, nn.Sequential(nn.Identity(), layer)):
        with pytest.raises(TypeError, match=f'torch.jit.script does not support {type(layer).__name__}: use torch.compile'): torch.jit.script(model)


def scripted(x:torch.Tensor, w:torch.Tensor): return linear_dropconnect(x, w, None, .3)
def test_script_of_a_function_names_what_it_cannot_compile():
    with pytest.raises(Exception, match='linear_dropconnect'): torch.jit.script(scripted)
