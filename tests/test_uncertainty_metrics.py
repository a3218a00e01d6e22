"Scores equal those of other packages and their definitions"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai_dropconnect.uncertainty.metrics import *

torch.set_num_threads(1)
LEVELS = torch.arange(1, 20, dtype=torch.float64)/20


@pytest.fixture(scope='module')
def cases():
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    return dict(y=2*draw(200), mean=draw(200), sd=draw(200).exp(), weights=draw(200, 3).softmax(1), means=draw(200, 3),
                sds=(.5*draw(200, 3)).exp(), quantiles=draw(200, 19).sort(1).values)


def test_scoringrules(cases):
    sr = pytest.importorskip('scoringrules')
    c = {k:v.numpy() for k,v in cases.items()}
    close = lambda got, want: np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-10)
    close(crps_gaussian(cases['mean'], cases['sd'], cases['y']), sr.crps_normal(c['y'], c['mean'], c['sd']))
    logs = sr.logs_normal(c['y'], c['mean'], c['sd'])
    seen = np.isfinite(logs)        # theirs underflows far out
    assert seen.sum()>150
    close(nll_gaussian(cases['mean'], cases['sd'], cases['y'])[seen], logs[seen])
    parts = [cases[n] for n in ('weights','means','sds')]
    close(crps_mixture(*parts, cases['y']), sr.crps_mixnorm(c['y'], c['means'], c['sds'], c['weights']))
    close(crps_quantiles(cases['quantiles'], cases['y'], LEVELS), sr.crps_quantile(c['y'], c['quantiles'], LEVELS.numpy()))
    lo,hi = cases['quantiles'][:,0],cases['quantiles'][:,-1]
    close(winkler_score(lo, hi, cases['y']), sr.interval_score(c['y'], lo.numpy(), hi.numpy(), .1))


def test_properscoring(cases):
    ps = pytest.importorskip('properscoring')
    got = crps_gaussian(cases['mean'], cases['sd'], cases['y'])
    np.testing.assert_allclose(got, ps.crps_gaussian(*[cases[n].numpy() for n in ('y','mean','sd')]), rtol=1e-9)


def test_sklearn():
    from sklearn.metrics import brier_score_loss, mean_pinball_loss
    g = torch.Generator().manual_seed(1)
    p,y = torch.rand(300, generator=g),torch.randint(0, 2, (300,), generator=g)
    assert brier_score(p, y).mean().item() == pytest.approx(brier_score_loss(y, p), rel=1e-5)
    q = torch.randn(300, generator=g)
    assert pinball_loss(q[:,None], p, [.7]).mean().item() == pytest.approx(mean_pinball_loss(p, q, alpha=.7), rel=1e-5)


def test_mixtures_score_as_their_integral(cases):
    weights,means,sds,y = [cases[n][:5] for n in ('weights','means','sds','y')]
    x = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    cdf = (weights[:,None]*torch.special.ndtr((x[None,:,None]-means[:,None])/sds[:,None])).sum(-1)
    want = torch.trapezoid((cdf-(x>=y[:,None]).double()).square(), x)
    torch.testing.assert_close(crps_mixture(weights, means, sds, y), want, rtol=0, atol=3e-4)


@given(shift=st.floats(-5, 5), scale=st.floats(.1, 10), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scores_have_the_unit_of_the_target(shift, scale, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(20, 19, generator=g, dtype=torch.float64).sort(1).values
    y,lo,hi = torch.randn(20, generator=g, dtype=torch.float64),q[:,0],q[:,-1]
    f = lambda v: scale*v+shift
    torch.testing.assert_close(crps_quantiles(f(q), f(y), LEVELS), scale*crps_quantiles(q, y, LEVELS))
    torch.testing.assert_close(winkler_score(f(lo), f(hi), f(y)), scale*winkler_score(lo, hi, y))
    assert torch.equal(interval_coverage(f(lo), f(hi), f(y)), interval_coverage(lo, hi, y))
    torch.testing.assert_close(crps_gaussian(f(lo), scale*(hi-lo), f(y)), scale*crps_gaussian(lo, hi-lo, y))


def test_a_calibration_error_of_few_rows_counts_its_bins():
    probs,y = torch.tensor([.1,.15,.9]),torch.tensor([0,1,1])
    # two rows with mean .125 and share .5, one with .9 and 1
    assert expected_calibration_error(probs, y, 5).item() == pytest.approx((2*.375+.1)/3, rel=1e-6)


def test_no_rows_and_one_row():
    none = torch.zeros(0)
    assert crps_gaussian(none, none, none).shape == (0,) and winkler_score(none, none, none).shape == (0,)
    assert brier_score(torch.zeros(0, 3), none).shape == (0,)
    assert pinball_loss(torch.zeros(1, 19), torch.zeros(1), LEVELS).shape == (1,)


def test_half_precision_and_gradients():
    q = torch.zeros(4, 19, dtype=torch.bfloat16, requires_grad=True)
    pinball_loss(q, torch.ones(4, dtype=torch.bfloat16), LEVELS).sum().backward()
    assert q.grad.isfinite().all() and (q.grad<0).all()
