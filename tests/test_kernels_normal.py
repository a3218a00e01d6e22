"The normal numbers of 'gaussian': moments, tails, correlations; the same numbers from torch; noise of outputs in every type"
import numba, numpy as np, pytest, torch
from scipy import stats

from fastai_dropconnect import functional
from fastai_dropconnect.functional import _normals, _torch_normals, linear_dropconnect
from fastai_dropconnect.masks import draw_seed
if numba.config.DISABLE_JIT: pytest.skip('these loops need compiled code', allow_module_level=True)
from fastai_dropconnect.kernels.normal import add_noise_, normals

N = 4_000_000
DRAWS = pytest.mark.parametrize('draw', [normals, _torch_normals], ids=['numba','torch'])


def near(value, expected, std, sigmas=5): assert abs(value-expected) < sigmas*std, (value, expected, std)


def test_moments_and_tails():
    z = normals(draw_seed(), N).double().numpy()
    for k,moment,var in ((1,0,1), (2,1,2), (3,0,15), (4,3,96), (6,15,10_170)): near((z**k).mean(), moment, (var/N)**.5)
    assert stats.kstest(z[:500_000], 'norm').pvalue > 1e-4
    for s in (1, 2, 3, 4, 4.5, 5):
        for tail in ((z>s).sum(), (z<-s).sum()): assert stats.binomtest(int(tail), N, stats.norm.sf(s)).pvalue > 1e-5
    bins = np.histogram(stats.norm.cdf(z), 1000, (0,1))[0]
    assert stats.chisquare(bins).pvalue > 1e-4


def test_defaults_of_torch_change_nothing():
    "The kernel fills memory by its address"
    want = normals(torch.tensor(5), 1000)
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(normals(torch.tensor(5), 1000), want)
    finally: torch.set_default_dtype(torch.float32)
    seed = torch.tensor(5)
    with torch.device('meta'): assert torch.equal(normals(seed, 1000), want)


def test_places_are_uncorrelated():
    z = normals(draw_seed(), 2**20).double()
    for f in (lambda t: t, torch.square, torch.abs):
        v = f(z)-f(z).mean()
        v = v/v.std()
        for lag in (1, 2, 15, 16, 17, 32, 255, 256, 257, 512, 1024): near((v[:-lag]*v[lag:]).mean().item(), 0, (1/len(z))**.5)


def test_sine_and_cosine_of_a_pair_are_independent():
    z = normals(draw_seed(), 2**20).view(-1, 2, 256).transpose(0, 1).flatten(1).double()
    near((z[0]*z[1]).mean().item(), 0, (1/2**19)**.5)
    near((z[0].square()*z[1].square()).mean().item(), 1, (8/2**19)**.5)
    corner = ((z[0].abs()>2) & (z[1].abs()>2)).sum().item()
    assert stats.binomtest(corner, 2**19, (2*stats.norm.sf(2))**2).pvalue > 1e-4


@pytest.mark.parametrize('shape', [(64,100), (500,33), (4096,1)], ids=str)
def test_rows_outputs_and_seeds_are_uncorrelated(shape):
    torch.manual_seed(1)
    z = torch.stack([normals(draw_seed(), shape[0]*shape[1]).view(shape) for _ in range(200)]).double()
    for axis in (0, 1, 2):
        t = z.movedim(axis, 0).flatten(1)[:64]
        c = (t@t.T/t.shape[1] - torch.eye(len(t), dtype=t.dtype)).fill_diagonal_(0)
        assert c.abs().max()*t.shape[1]**.5 < 5.5


def test_neighbouring_seeds_are_uncorrelated():
    for step in (1, 2, 2**31, 2**32, 2**62):
        a,b = normals(torch.tensor(5), 2**18).double(),normals(torch.tensor(5+step), 2**18).double()
        near((a*b).mean().item(), 0, 2**-9)


@DRAWS
def test_a_seed_repeats_and_a_place_has_its_number(draw):
    seed = draw_seed()
    assert torch.equal(draw(seed, 5000), draw(seed, 5000)) and torch.equal(draw(seed, 5000)[:777], draw(seed, 777))
    assert draw(seed, 0).shape==(0,) and draw(seed, 1).shape==(1,)
    assert draw(torch.tensor(-2**63), 100).isfinite().all() and draw(torch.tensor(2**63-1), 100).isfinite().all()


def test_torch_draws_the_same_numbers():
    for _ in range(5):
        seed = draw_seed()
        torch.testing.assert_close(normals(seed, 100_001), _torch_normals(seed, 100_001), rtol=1e-4, atol=4e-4)
    assert _normals(seed.to('meta'), torch.empty(3, 4, device='meta'), None).shape==(3,4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('shape', [(0,5), (1,1), (3,171), (7,512), (64,100)], ids=str)
def test_noise_is_added_in_place(dtype, shape):
    seed,y,var = draw_seed(),torch.randn(shape, dtype=dtype),torch.rand(shape, dtype=dtype)
    if len(var): var[0] = 0
    before,z = y.clone(),normals(seed, y.numel()).view(shape).to(dtype)
    noise = add_noise_(y, var, seed, .7)
    torch.testing.assert_close(y, before+.7*var.sqrt()*z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise*var, var.sqrt()*z, rtol=1e-5, atol=1e-5)
    assert noise.dtype==dtype and torch.equal(y[:1], before[:1]) and not noise[:1].any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_backends_and_types_agree(dtype):
    x,w,b,g = (torch.randn(s, dtype=torch.float64) for s in ((40,30), (20,30), (20,), (40,20)))
    def run(backend, dtype):
        ts = [t.to(dtype).requires_grad_() for t in (x,w,b)]
        torch.manual_seed(2)
        y = linear_dropconnect(*ts, .3, 'gaussian', backend=backend)
        y.backward(g.to(dtype))
        return [t.double() for t in (y.detach(), *[t.grad for t in ts])]
    half = dtype in (torch.bfloat16,torch.float16)
    for ours,theirs,exact in zip(run('numba', dtype), run('torch', dtype), run('numba', torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=.02 if half else 1e-3, atol=.1 if half else 4e-3)
        assert (ours-exact).abs().mean() < (.02 if half else 1e-5)*exact.abs().mean()


@pytest.mark.parametrize('p', [.05, .5, .9])
def test_noise_of_a_layer_has_the_right_variance(p):
    x,w,b = torch.randn(3, 50),torch.randn(6, 50),torch.randn(6)
    x[0,1:] = 0
    ys = torch.stack([linear_dropconnect(x, w, b, p, 'gaussian') for _ in range(8000)]).double()
    mean,var = (x@w.t()+b).double(),p/(1-p)*(x.square()@w.square().t()).double()
    assert ((ys.mean(0)-mean).abs()/(var/8000).sqrt()).max() < 5
    assert ((ys.var(0)/var-1).abs()*(8000/2)**.5).max() < 5.5
    z = ((ys-mean)/var.sqrt()).flatten(1)
    c = z.T@z/8000
    assert c.fill_diagonal_(0).abs().max()*8000**.5 < 5


def test_a_variance_in_any_layout():
    "The loop reads memory in its order, so another layout is copied first"
    seed,var = draw_seed(),torch.rand(6, 4)
    y,z = torch.zeros(6, 4),torch.zeros(6, 4)
    add_noise_(y, var, seed, .7)
    add_noise_(z, var.t().contiguous().t(), seed, .7)
    assert torch.equal(y, z) and y.any()


@pytest.mark.parametrize('n', [8, 400])
def test_squares_are_stored_for_small_layers_only(n, monkeypatch):
    "The gradients are the same: 400*64 inputs are too many to store, 8*64 are not"
    def grads(most):
        monkeypatch.setattr(functional, '_most_kept', most)
        stored.clear()
        torch.manual_seed(3)
        x,w = torch.randn(n, 64, requires_grad=True),torch.randn(5, 64, requires_grad=True)
        y = linear_dropconnect(x, w, None, .3, 'gaussian')
        y.square().sum().backward()
        return len(stored),x.grad,w.grad
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        a,b = grads(functional._most_kept),grads(0)
    assert a[0]-b[0]==(2 if n==8 else 0)
    for got,want in zip(a[1:], b[1:]): assert torch.equal(got, want)
