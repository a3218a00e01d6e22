"Distributions equal brute force, quantiles are ordered, mixing is exact, heads and losses survive any target"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from fastai_dropconnect import nn_utils
from fastai_dropconnect.uncertainty.noise import *

torch.set_num_threads(1)


def draw(kind, n, members, seed, spread=1.):
    "Distributions of `n` rows that differ among rows and members"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    if kind=='quantile': return QuantileDistribution((spread*rand(n, members, 1)+rand(n, members, 9)).sort(-1).values)
    return GaussianMixture(rand(n, members, 3).log_softmax(-1), spread*rand(n, members, 3), (rand(n, members, 3)/2).exp())

KINDS = 'quantile','mixture'


@given(kind=st.sampled_from(KINDS), members=st.integers(1, 5), seed=st.integers(0, 999), spread=st.sampled_from([0., 1., 30.]))
@settings(max_examples=40, deadline=None)
def test_quantiles_are_ordered_and_invert_the_cdf(kind, members, seed, spread):
    dist = draw(kind, 7, members, seed, spread)
    levels = torch.tensor([.001,.04,.05,.3,.5,.77,.95,.9999], dtype=torch.float64)
    q = dist.quantiles(levels)
    assert (q.diff(dim=1)>=0).all() and q.isfinite().all()
    torch.testing.assert_close(dist.cdf(q), levels.expand(7, -1), rtol=0, atol=1e-9)
    low,high = dist.interval(.9)
    assert torch.equal(torch.stack([low,high], 1), dist.quantiles([.05,.95]))


@given(kind=st.sampled_from(KINDS), members=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_a_mixture_is_the_mean_of_its_members(kind, members, seed):
    dist = draw(kind, 4, members, seed)
    parts = [draw(kind, 4, members, seed) for _ in range(members)]
    for k in range(members): parts[k] = _member(dist, k)
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).expand(4, -1)
    torch.testing.assert_close(dist.cdf(x), torch.stack([p.cdf(x) for p in parts]).mean(0), rtol=0, atol=1e-12)
    density = torch.stack([p.log_prob(x).exp() for p in parts]).mean(0)
    torch.testing.assert_close(dist.log_prob(x).exp(), density, rtol=1e-9, atol=1e-12)
    means,sds = torch.stack([p.mean for p in parts]),torch.stack([p.sd for p in parts])
    torch.testing.assert_close(dist.mean, means.mean(0))
    torch.testing.assert_close(dist.sd.square(), (sds.square()+means.square()).mean(0)-means.mean(0).square())
    torch.testing.assert_close(dist.sd_members, means.std(0, correction=0), atol=1e-9, rtol=1e-9)

def _member(dist, k):
    if isinstance(dist, QuantileDistribution): return QuantileDistribution(dist.knots[:,k:k+1])
    return GaussianMixture(*[t[:,k:k+1] for t in (dist.log_weights, dist.means, dist.sds)])


@pytest.mark.parametrize('kind', KINDS)
def test_moments_and_density_equal_the_integral(kind):
    dist = draw(kind, 3, 2, 0)
    x = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    p = dist.log_prob(x.expand(3, -1)).exp()
    atol = 2e-3 if kind=='quantile' else 1e-6       # its density jumps
    torch.testing.assert_close(torch.trapezoid(p, x), torch.ones(3, dtype=torch.float64), rtol=0, atol=atol)
    mean = torch.trapezoid(p*x, x)
    torch.testing.assert_close(mean, dist.mean, rtol=0, atol=2*atol)
    torch.testing.assert_close(torch.trapezoid(p*(x-mean[:,None]).square(), x).sqrt(), dist.sd, rtol=0, atol=4*atol)


@pytest.mark.parametrize('kind', KINDS)
def test_samples_follow_the_cdf(kind):
    dist = draw(kind, 3, 3, 1, 2.)
    u = dist.cdf(dist.sample(20_000, torch.Generator().manual_seed(0)))
    # Kolmogorov-Smirnov at 1e-4
    grid = torch.arange(1, 20_001, dtype=torch.float64)/20_000
    assert (u.sort(1).values-grid).abs().max() < 2.23/math.sqrt(20_000)


def test_equal_quantiles_have_no_infinite_density():
    dist = QuantileDistribution(torch.tensor([[[0.]*3+[1.]*3+[2.]*3]]))
    assert torch.isfinite(dist.quantiles([.01,.3,.5,.99])).all()
    assert dist.log_prob(torch.tensor([[0.,.5,1.,7.]])).isfinite().all()
    same = QuantileDistribution(torch.ones(2, 3, 19))
    assert torch.equal(same.quantiles([.05,.5,.95]), torch.ones(2, 3)) and (same.sd==0).all()


@given(noise=st.sampled_from(NOISES), targets=st.integers(1, 3), members=st.integers(1, 3), scale=st.sampled_from([1e-4, 1., 1e5]),
       seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_head_and_its_loss_for_any_outputs(noise, targets, members, scale, seed):
    g = torch.Generator().manual_seed(seed)
    mean,sd = scale*torch.randn(targets, generator=g),scale*torch.rand(targets, generator=g).clamp(.01)
    head,loss = NoiseHead(noise, mean, sd).eval(),NoiseLoss(noise, sd)
    raw = (30*torch.randn(6, members*targets*head.noise.n_params, generator=g)).requires_grad_()
    out,y = head(raw),mean+sd*torch.randn(6, targets, generator=g)
    dist = loss.distribution(out.detach())
    assert dist.mean.shape == (6,targets) and dist.mean.isfinite().all()
    assert (dist.quantiles([.05,.1,.5,.95]).diff(dim=-1)>=0).all()
    if noise!='quantile': assert (dist.sds<=1.001*sd[:,None,None]).all() and (dist.sds>=.0049*sd[:,None,None]).all()
    each = loss(out, y, reduction='none')
    assert each.shape == (6,) and each.isfinite().all()
    torch.testing.assert_close(each.sum(), loss(out, y, reduction='sum'))
    if members==1:
        loss(out, y).backward()
        assert raw.grad.isfinite().all() and (raw.grad!=0).any()


@pytest.mark.parametrize('noise', NOISES)
def test_two_targets_are_two_single_ones(noise):
    n = NoiseModel(noise).n_params
    raw,y = torch.randn(5, 2*n),torch.randn(5, 2)
    both = NoiseHead(noise, [1.,2.], [3.,4.])(raw),NoiseLoss(noise, [3.,4.])
    each = [(NoiseHead(noise, [m], [s])(raw[:,i*n:(i+1)*n]),NoiseLoss(noise, [s])) for i,(m,s) in enumerate([(1.,3.),(2.,4.)])]
    want = torch.stack([loss(out, y[:,i], reduction='none') for i,(out,loss) in enumerate(each)], 1).mean(1)
    torch.testing.assert_close(both[1](both[0], y, reduction='none'), want)
    torch.testing.assert_close(both[1].activation(both[0]), torch.cat([loss.activation(out) for out,loss in each], 1))


def test_the_loss_of_a_mixture_is_that_of_its_distribution():
    for noise in NOISES:
        head,loss = NoiseHead(noise, [0.], [1.]).eval(),NoiseLoss(noise, [1.])
        a,b,y = *head(torch.randn(2, 8, head.noise.n_params)),torch.randn(8, 1)
        both = torch.cat([a,b], 1)
        dist = loss.distribution(both)
        got = loss(both, y, reduction='none').double()
        if noise=='quantile':
            q = dist.quantiles(dist.levels)[:,0]
            want = torch.maximum(dist.levels*(y-q), (dist.levels-1)*(y-q)).mean(1)
        else: want = -(loss.distribution(a).log_prob(y)+loss.distribution(b).log_prob(y).sub(loss.distribution(a).log_prob(y)).exp().log1p()).sub(math.log(2))[:,0].double()
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-5)


def test_the_default_levels_hold_for_autocast():
    head,loss = NoiseHead('quantile', [3.], [2.]),NoiseLoss('quantile', [2.])
    with torch.autocast('cpu', torch.bfloat16): out = head(torch.nn.Linear(4, 19)(torch.randn(8, 4)))
    assert out.dtype==torch.float32 and loss(out, torch.randn(8, 1)).isfinite()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('scale', [1e-34,1e-19,1e-12,1e12,1e34])
def test_distributions_have_the_unit_of_the_target(kind, scale):
    "Charges in coulombs have the quantiles of charges in electrons"
    dist = draw(kind, 5, 3, 0)
    scaled = type(dist)(*[t if k=='log_weights' else t*scale for k,t in vars(dist).items() if t is not None])
    levels,x = [.001,.05,.3,.5,.95,.999],dist.mean+dist.sd*torch.linspace(-3, 3, 5, dtype=torch.float64)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    close(scaled.quantiles(levels)/scale, dist.quantiles(levels))
    close(scaled.cdf(x*scale), dist.cdf(x))
    close(scaled.log_prob(x*scale)+math.log(scale), dist.log_prob(x))
    for n in ('mean','sd','sd_noise','sd_members'): close(getattr(scaled, n)/scale, getattr(dist, n))
    close(scaled.sample(3, torch.Generator().manual_seed(0))/scale, dist.sample(3, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('kind', ['quantile', 'mixture'])
def test_devices_without_float64(kind, monkeypatch):
    "Apple's GPUs have float32 at most"
    noise = NoiseModel(kind)
    out = torch.randn(200, 3*noise.n_params, generator=torch.Generator().manual_seed(0))
    targ = torch.linspace(-3, 3, 200)[:,None]
    wide = noise.distribution(out, 1)
    quantiles,cdf,sd = wide.quantiles([.01,.4,.99]),wide.cdf(targ),wide.sd
    monkeypatch.setattr(nn_utils, 'widest_float', lambda device: torch.float32)
    narrow = noise.distribution(out, 1)
    assert narrow.cdf(targ).dtype==torch.float32
    for got,expected in zip((narrow.quantiles([.01,.4,.99]), narrow.cdf(targ), narrow.sd), (quantiles, cdf, sd), strict=True):
        torch.testing.assert_close(got, expected.float(), atol=2e-4, rtol=2e-4)
    flat = QuantileDistribution(torch.ones(2, 3, 9))
    assert flat.cdf(torch.ones(2)).isfinite().all() and flat.log_prob(torch.ones(2)).isfinite().all()
