"What estimators say of their certainty: coverage, shapes, files, copies"
import pickle, warnings
import numpy as np, pandas as pd, pytest, torch
from sklearn.base import clone
import sklearn_checks
from fastai_dropconnect import table_estimator
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
from fastai_dropconnect.fit_best import BUDGETS
from fastai_dropconnect.uncertainty.noise import NOISES

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(autouse=True)
def small_networks(monkeypatch, request):
    "Train one small network instead of searching, unless the name of a test starts with test_search"
    if not request.function.__name__.startswith('test_search'): monkeypatch.setattr(table_estimator, 'fit_best_on', sklearn_checks.fit_small)

def table(n=300, seed=0, scale=1000):
    "The noise grows with x"
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(x=r.uniform(0, 1, n), size=r.choice(['S', 'M', 'L'], n)), index=np.arange(n)+7)
    return df,scale*(3*df.x + (.1+df.x)*r.normal(0, 1, n) + 10)

def regressor(**kw): return DropConnectRegressor(**(dict(budget='quick', random_state=0, verbose=0) | kw))
def covered(interval, y): return float(((interval[...,0]<=y) & (y<=interval[...,1])).mean())

@pytest.mark.parametrize('noise', [None, *NOISES])
def test_intervals_hold_what_they_say(noise, tmp_path):
    df,y = table(1500)
    model = regressor(noise=noise).fit(df, y)
    new,targs = table(4000, seed=1)
    for level in (.5, .8, .95): assert abs(covered(model.predict_interval(new, level), targs)-level)<.04
    for level in (.1, .9): assert abs((targs<=model.predict_quantiles(new, [level])[:,0]).mean()-level)<.035
    qs = model.predict_quantiles(new, np.linspace(.02, .98, 25))
    assert qs.shape==(4000,25) and (np.diff(qs)>=0).all()
    widths = np.diff(model.predict_interval(new))[:,0]
    if noise is not None: assert widths[new.x>.8].mean()>1.5*widths[new.x<.2].mean()
    dist = model.predict_dist(new)
    assert (dist.index==new.index).all() and np.allclose(dist['mean'], model.predict(new), rtol=1e-5)
    assert np.allclose(dist[['lower','upper']], model.predict_interval(new)) and (dist.sd>0).all()
    for again in (pickle.loads(pickle.dumps(model)), DropConnectRegressor.load(model.save(tmp_path))):
        assert (again.predict_interval(new, .7)==model.predict_interval(new, .7)).all()
    assert clone(model).get_params()==model.get_params() and again.noise==noise

def test_several_targets_each_have_their_own():
    df,y = table(600)
    both = np.stack([y, -1e-3*y+50], 1)
    for noise in (None,'mixture'):
        model = regressor(noise=noise).fit(df, both)
        res = model.predict_interval(df)
        assert res.shape==(600,2,2) and (res[...,0]<res[...,1]).all() and covered(res, both)>.85
        dist = model.predict_dist(df)
        assert np.allclose(dist[['0_mean','1_mean']], model.predict(df), rtol=1e-4) and np.allclose(dist['1_sd'], dist['1_sd'].abs())

def test_few_rows_have_infinite_ends_and_say_so():
    df,y = table(12)
    model = regressor().fit(df, y)
    with pytest.warns(UserWarning, match='12 held-out rows are too few'): assert np.isinf(model.predict_interval(df)).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isfinite(model.predict_interval(df, .5)).all()

def test_rows_in_parts_are_predicted_as_one(monkeypatch):
    from fastai_dropconnect import intervals
    df,y = table(200)
    model = regressor(noise='quantile').fit(df, y)
    want,dist = model.predict_interval(df),model.predict_dist(df)
    monkeypatch.setattr(intervals, 'MOST_AT_ONCE', 7)
    assert np.allclose(model.predict_interval(df), want)
    pd.testing.assert_frame_equal(model.predict_dist(df), dist, rtol=1e-4)
    assert model.predict_interval(df[:0]).shape==(0,2) and len(model.predict_dist(df[:0]))==0

def test_equal_targets():
    df,_ = table(60)
    for noise in (None,*NOISES):
        model = regressor(noise=noise).fit(df, np.full(60, 7.))
        assert np.allclose(model.predict(df), 7, atol=1.5) and np.isfinite(model.predict_interval(df)).all()

@pytest.mark.parametrize('value', [1e-6, -3e9, 0])
def test_equal_targets_are_predicted_exactly(value, tmp_path):
    df,_ = table(60)
    model = regressor().fit(df, np.full(60, value))
    for m in (model, DropConnectRegressor.load(model.save(tmp_path))):
        assert (m.predict(df)==value).all() and (m.predict_interval(df)==value).all()
        dist = m.predict_dist(df)
        assert (dist[['mean', 'lower', 'upper']]==value).all(axis=None) and (dist.sd==0).all()
    few = regressor().fit(df[:12], np.full(12, value))
    assert np.isinf(few.predict_interval(df)).all() and np.isinf(few.predict_dist(df)[['lower', 'upper']]).all(axis=None)

def test_new_levels_are_named_and_nothing_is_deprecated():
    df,y = table()
    model = regressor().fit(df, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', message='The given NumPy array is not writable')     # fastai with pandas 3
        odd = df.assign(size=np.where(df.x>.5, 'XL', df['size']))
        dist,interval = model.predict_dist(odd),model.predict_interval(odd)
    assert np.allclose(dist[['lower', 'upper']], interval)
    assert (dist.warnings=="size: 'XL' is new").equals(df.x>.5) and (dist.warnings[df.x<=.5]=='').all()

def test_all_rows_at_the_end_keep_the_calibration():
    df,y = table(400)
    model = regressor(noise='quantile').fit(df, y, time=np.arange(400))
    assert covered(model.predict_interval(df), y)>.8

def test_what_is_refused():
    df,y = table(60)
    with pytest.raises(ValueError, match="noise='normal'"): regressor(noise='normal').fit(df, y)
    with pytest.raises(ValueError, match='`with_gbm` must be False with `noise`'): regressor(noise='quantile', with_gbm=True).fit(df, y)
    with pytest.raises(TypeError, match='noise'): DropConnectClassifier(noise='quantile')
    model = regressor().fit(df, y)
    for level in (0, 1, -.1, 'a'):
        with pytest.raises((ValueError,TypeError), match='`level`'): model.predict_interval(df, level)
    with pytest.raises(ValueError, match='`levels`'): model.predict_quantiles(df, [.5,0])

def test_search_blends_distributions_of_folds(monkeypatch):
    df,y = table(150)
    monkeypatch.setitem(BUDGETS, 'quick', (3e10, ()))
    model = regressor(noise='quantile').fit(df, y)
    n_kinds = (model.leaderboard_.weight>0).sum()
    assert len(model.learner_.model.models)==3*n_kinds and abs(model.learner_.loss_func.shares.sum()-1)<1e-6
    new,targs = table(2000, seed=1)
    assert abs(covered(model.predict_interval(new), targs)-.9)<.07
