"Intervals beside predictions: `predict` of a row, `show_results`, with and without the fast path"
import numpy as np, pytest
from fastai.tabular.all import load_learner, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import intervals
from fastai_dropconnect.callback.calibrate import calibration_of
from conftest import make_dls, make_table

pytestmark = pytest.mark.filterwarnings('ignore')
DF = make_table(200)

def learner(noise='quantile', calibrate=True, fast=False, **config):
    set_seed(0)
    learn = tabular_learner(make_dls(DF), [12], noise=noise, fast=fast, config=config and tabular_dropconnect_config(**config))
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    if calibrate: learn.calibrate(.8)
    return learn

@pytest.mark.parametrize('fast', [False,True])
@pytest.mark.parametrize('noise,config', [('quantile',{}), ('mixture',dict(members=2)), (None,{}), (None,dict(members=2)), (None,dict(weight_p=.1))])
def test_predict_has_the_interval_of_predict_distribution(noise, config, fast, tmp_path):
    learn = learner(noise, fast=fast, **config)
    want = learn.predict_distribution(DF[5:6])
    learn.path = tmp_path
    learn.export()
    for l in (learn,load_learner(tmp_path/'export.pkl')):
        row,decoded,pred = l.predict(DF.iloc[5])
        np.testing.assert_allclose(row.items[['y','y_lower','y_upper']], want[['mean','lower','upper']], rtol=1e-4, atol=1e-5)
        assert list(row.y_names)==['y','y_lower','y_upper'] and float(decoded)==pytest.approx(float(pred))
        row.show()

def test_without_an_interval_all_is_as_before():
    for kw in (dict(noise=None, calibrate=False), dict(noise=None, calibrate=False, fast=True)):
        row,*_ = learner(**kw).predict(DF.iloc[5])
        assert list(row.y_names)==['y'] and not [n for n in row.items if n.endswith(('lower','upper'))]
    df = DF.assign(y=np.where(DF.y>0, 'a', 'b'))
    classes = tabular_learner(make_dls(df), [12])
    with classes.no_bar(): classes.calibrate()
    assert list(classes.predict(df.iloc[0])[0].y_names)==['y']

def test_show_results(monkeypatch):
    shown = []
    monkeypatch.setattr(intervals, 'display_df', shown.append)
    learn = learner()
    learn.show_results(max_n=3, shuffle=False)
    want = learn.predict_distribution(DF[160:163])
    assert len(shown[0])==3
    np.testing.assert_allclose(shown[0][['y_pred','y_lower','y_upper']], want[['mean','lower','upper']], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shown[0]['y'], DF.y[160:163], rtol=1e-5)

@pytest.mark.parametrize('fast', [False,True])
def test_predict_takes_the_group_of_the_row_that_it_was_given(fast, tmp_path):
    "Of a column that is no feature, of an unseen level, which is not a missing one, and from a dictionary"
    df = make_table(700).assign(site=lambda d: d.index%2)
    set_seed(0)
    learn = tabular_learner(make_dls(df), [12], noise='quantile', fast=fast)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    odd = df[:4].assign(color=['violet',None,'red','blue'])
    for group in ('color','site'):
        learn.calibrate(group=group, df=df)
        for i,k in enumerate(calibration_of(learn).group_q): calibration_of(learn).group_q[k] += 10*(i+1)
        want = learn.predict_distribution(odd)
        learn.path = tmp_path
        learn.export()
        for l in (learn,load_learner(tmp_path/'export.pkl')):
            for k in calibration_of(l).group_q: calibration_of(l).group_q[k] = calibration_of(learn).group_q[k]
            row = odd.iloc[0].copy()
            seen = []
            for i in range(4):
                row[:] = odd.iloc[i]        # one Series for all rows
                seen.append(l.predict(row)[0])
            for i,s in enumerate(seen):
                np.testing.assert_allclose(s.items[['y','y_lower','y_upper']].to_numpy('float64')[0], want[['mean','lower','upper']].iloc[i], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(l.predict(odd.iloc[0].to_dict())[0].items.y_upper, want.upper.iloc[0], rtol=1e-4)
    assert list(learn.predict(odd.iloc[0].drop('site'))[0].y_names)==['y']        # an interval of which group?
