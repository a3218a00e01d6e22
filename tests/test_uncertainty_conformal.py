"Intervals hold what they promise on exchangeable rows, and equal those of MAPIE"
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai_dropconnect.uncertainty.conformal import *

torch.set_num_threads(1)
f64 = torch.float64


@given(n=st.integers(1, 60), level=st.sampled_from([.5, .8, .9, .95]), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_quantile_is_the_exact_order_statistic(n, level, seed):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=f64)
    q = conformal_quantile(scores, level)
    k = next(k for k in range(1, n+2) if k/(n+1) >= level-1e-12)       # smallest rank that keeps the promise
    assert q == (scores.sort().values[k-1] if k<=n else math.inf)
    assert conformal_quantile(scores, level, torch.ones(n)) == q


def test_weights_are_counts():
    scores,w = torch.tensor([1.,2.,3.,4.]),torch.tensor([5.,0.,20.,14.])
    want = conformal_quantile(scores.repeat_interleave(w.long()), .8)
    assert conformal_quantile(scores, .8, w) == want == 4


def coverage(method, seed, n_cal=99, n_new=200, level=.9):
    "Share of new rows within, of a model that is wrong in mean and sd"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n_cal+n_new, generator=g, dtype=f64)
    y = x+(.2+x)*torch.randn(len(x), generator=g, dtype=f64)
    pred = dict(mean=.7*x, sd=.1+.3*x, lower=.7*x-.3, upper=.7*x+.2)
    cut = lambda s: {k:v[s] for k,v in pred.items()}
    q = conformal_quantile(conformal_scores(y[:n_cal], method, **cut(slice(n_cal))), level)
    lower,upper = conformal_interval(q, method, **cut(slice(n_cal, None)))
    return ((lower<=y[n_cal:]) & (y[n_cal:]<=upper)).double().mean()

@pytest.mark.parametrize('method', [m for m in METHODS if m!='pit'])      # its coverage: test_intervals
def test_coverage_of_200_seeds(method):
    got = torch.stack([coverage(method, seed) for seed in range(200)])
    # with 99 rows the coverage of a seed is Beta(90, 10), apart from 200 draws around it
    variance = .9*.1/101 + .9*.1/200
    assert abs(got.mean()-.9) < 4*math.sqrt(variance/200)
    assert abs(got.var()/variance-1) < 4*math.sqrt(2/200)


def test_coverage_within_groups():
    inside = []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        scale = torch.tensor([1.,5.]).repeat(150)
        errors = scale*torch.randn(300, generator=g).abs()
        cal = Calibration('split', .9, errors[:200,None].double(), groups=(['a','b']*100))
        inside.append((errors[200:]<=cal.quantiles_for(100, ['a','b']*50)[:,0]).double())
    share = torch.stack(inside).view(200, 50, 2).mean((0,1))
    # of the 100 rows of a group the 91st error: 91/101
    assert (share-91/101).abs().max() < 4*math.sqrt(.09/200*(1/102+1/50))


@pytest.fixture(scope='module')
def table():
    from sklearn.linear_model import LinearRegression, QuantileRegressor
    r = np.random.default_rng(0)
    x = r.random((900, 2))
    y = x@[1.,2.]+(.1+x[:,0])*r.normal(size=900)
    tr,cal,new = slice(300),slice(300, 600),slice(600, None)
    return dict(x=x, y=y, tr=tr, cal=cal, new=new, mean=LinearRegression().fit(x[tr], y[tr]),
                quantiles=[QuantileRegressor(quantile=q, alpha=0).fit(x[tr], y[tr]) for q in (.05,.95,.5)])

def ours(table, method, symmetric=True, **preds): # Functions of x
    at = lambda rows: {k:torch.from_numpy(f(table['x'][rows])) for k,f in preds.items()}
    scores = conformal_scores(torch.from_numpy(table['y'][table['cal']]), method, **at(table['cal']), symmetric=symmetric)
    q = conformal_quantile(scores, .9) if symmetric else conformal_quantile(scores, .95).unbind()
    return torch.stack(conformal_interval(q, method, **at(table['new'])), 1).numpy()

def test_split_equals_mapie(table):
    mapie = pytest.importorskip('mapie.regression')
    m = mapie.SplitConformalRegressor(table['mean'], confidence_level=.9, prefit=True)
    m.conformalize(table['x'][table['cal']], table['y'][table['cal']])
    _,want = m.predict_interval(table['x'][table['new']])
    np.testing.assert_allclose(ours(table, 'split', mean=table['mean'].predict), want[:,:,0], rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('symmetric', [True, False])
def test_cqr_equals_mapie(table, symmetric):
    mapie = pytest.importorskip('mapie.regression')
    low,high,_ = table['quantiles']
    m = mapie.ConformalizedQuantileRegressor(table['quantiles'], confidence_level=.9, prefit=True)
    m.conformalize(table['x'][table['cal']], table['y'][table['cal']])
    _,want = m.predict_interval(table['x'][table['new']], symmetric_correction=symmetric)
    np.testing.assert_allclose(ours(table, 'cqr', symmetric, lower=low.predict, upper=high.predict), want[:,:,0], rtol=1e-12, atol=1e-12)

def test_cv_plus_equals_mapie(table):
    mapie = pytest.importorskip('mapie.regression')
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold
    x,y,new = table['x'][:60],table['y'][:60],table['x'][table['new']]
    kfold = KFold(5)
    m = mapie.CrossConformalRegressor(LinearRegression(), confidence_level=.9, method='plus', cv=kfold)
    m.fit_conformalize(x, y)
    _,want = m.predict_interval(new, minimize_interval_width=False)
    folds,errors,preds = torch.zeros(60, dtype=torch.long),torch.zeros(60, dtype=f64),[]
    for k,(tr,te) in enumerate(kfold.split(x)):
        model = LinearRegression().fit(x[tr], y[tr])
        folds[te],errors[te] = k,torch.from_numpy(y[te]-model.predict(x[te]))
        preds.append(torch.from_numpy(model.predict(new)))
    got = torch.stack(cv_plus_interval(torch.stack(preds, 1), errors, folds), 1).numpy()
    np.testing.assert_allclose(got, want[:,:,0], rtol=1e-12, atol=1e-12)


@given(n=st.integers(0, 30), more=st.integers(0, 30), last=st.sampled_from([None, 1, 10]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_update_equals_a_calibration_of_all_rows(n, more, last, seed):
    g = torch.Generator().manual_seed(seed)
    scores,times = torch.randn(n+more, 2, generator=g, dtype=f64),torch.randint(0, 9, (n+more,), generator=g).double()
    groups = [f'g{i%2}' for i in range(n+more)]
    args = dict(method='cqr', last=last, half_life=5.)
    cal = Calibration(scores=scores[:n], times=times[:n], groups=groups[:n], **args)
    cal.add(scores[n:], times[n:], groups[n:])
    whole = Calibration(scores=scores, times=times, groups=groups, **args)
    assert torch.equal(cal.q, whole.q) and len(cal.scores)==len(whole.scores)
    if last is None: assert torch.equal(cal.scores, whole.scores) and cal.groups==whole.groups


def test_the_last_rows_follow_a_drift():
    g = torch.Generator().manual_seed(0)
    errors = torch.cat([torch.rand(2000, generator=g), 3*torch.rand(500, generator=g)])[:,None].double()
    assert Calibration('split', .9, errors).q < 2 < Calibration('split', .9, errors, last=500).q


def test_intervals_never_end_before_they_start():
    lower,upper = conformal_interval(torch.tensor(-5.), 'cqr', lower=torch.zeros(3), upper=torch.tensor([1.,20.,0.]))
    assert (lower<=upper).all() and lower.tolist()==[.5,5.,0.]
