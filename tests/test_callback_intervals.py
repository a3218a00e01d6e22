"Intervals beside predictions: `predict` of a row, `show_results`, with and without the fast path"
import numpy as np, pytest
from fastai.tabular.all import load_learner, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import intervals
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
