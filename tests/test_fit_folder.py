"A fit with a folder: broken off anywhere it goes on, and ends as one that was not"
import json, shutil
import numpy as np, pandas as pd, pytest, torch
from conftest import InterruptAt
from fastai.learner import Learner
from sklearn.metrics import make_scorer
from fastai_dropconnect import fit_folder
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
from fastai_dropconnect.fit_best import BUDGETS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(autouse=True, scope='module')
def small_budgets():
    with pytest.MonkeyPatch.context() as m:
        m.setitem(BUDGETS, 'quick', (1e7,('smaller',)))
        yield

def table(n=90, seed=0):
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(x=r.normal(0, 1, n), size=r.choice(['S', 'M', 'L'], n)))
    return df,3*df.x*np.where(df['size']=='S', -1, 1)+10

def regressor(folder, **kw): return DropConnectRegressor(**(dict(budget='quick', random_state=0, verbose=0, folder=folder) | kw))
def files(folder): return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}

@pytest.fixture(scope='module')
def fitted(small_budgets, tmp_path_factory): # A folder that a fit has filled, and what its estimator predicts
    path = tmp_path_factory.mktemp('fitted')
    df,y = table()
    return path,regressor(path).fit(df, y).predict(df)

@pytest.fixture
def folder(fitted, tmp_path): return shutil.copytree(fitted[0], tmp_path/'a') # A copy that a test may change

def stop_after(monkeypatch, n):
    "Count the networks that are trained, and raise an error before the one after the first `n`"
    real,calls = fit_folder.train_candidate,[]
    def train(*args):
        if len(calls)>=n: raise MemoryError
        calls.append(args)
        return real(*args)
    monkeypatch.setattr(fit_folder, 'train_candidate', train)
    return calls

def test_a_network_that_was_interrupted_is_trained_anew(monkeypatch, tmp_path):
    df,y = table(1200)
    kwargs = dict(eval_set=(df[:200],y[:200]))
    fit = Learner.fit
    def interrupted(self, *args, **kw):
        self.add_cb(InterruptAt(31))
        return fit(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(Learner, 'fit', interrupted)
        early = regressor(tmp_path).fit(df, y, **kwargs)
    assert list(early.leaderboard_.name)==['numbers'] and np.isfinite(early.predict(df)).all()
    assert not list(tmp_path.glob('candidate_*'))
    whole = regressor(None).fit(df, y, **kwargs)
    np.testing.assert_array_equal(regressor(tmp_path).fit(df, y, **kwargs).predict(df), whole.predict(df))

@pytest.mark.parametrize('n,noise', [(4, None), (1, 'quantile')])
def test_a_fit_that_was_broken_off_ends_as_one_that_was_not(monkeypatch, tmp_path, n, noise):
    df,y = table()
    whole = regressor(None, noise=noise).fit(df, y)
    with monkeypatch.context() as m:
        stop_after(m, n)
        with pytest.raises(MemoryError): regressor(tmp_path, noise=noise).fit(df, y)
    calls = stop_after(monkeypatch, 99)
    again = regressor(tmp_path, noise=noise).fit(df, y)
    assert len(calls)==9-n       # three folds, three kinds of networks
    assert (again.predict(df)==whole.predict(df)).all() and (again.predict_interval(df)==whole.predict_interval(df)).all()
    columns = ['name','epochs','loss','weight']
    pd.testing.assert_frame_equal(again.leaderboard_[columns], whole.leaderboard_[columns])

def test_a_whole_fit_is_read(monkeypatch, tmp_path):
    df,y = table()
    args = dict(budget='quick', verbose=0, folder=tmp_path)
    fit = lambda: DropConnectClassifier(**args).fit(df, y>10, eval_set=(df[:30],y[:30]>10))       # without a seed it is 0
    first = fit()
    before = files(tmp_path)
    stop_after(monkeypatch, 0)
    assert (fit().predict_proba(df)==first.predict_proba(df)).all()
    assert files(tmp_path)==before

def test_folders_of_others_are_refused_and_stay_as_they_are(folder, tmp_path):
    df,y = table()
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'notes.txt').write_text('mine')
    (tmp_path/'c').mkdir()
    (tmp_path/'c'/'fit.json').write_text('{}')
    before = files(tmp_path)
    for folder,kw,match in [('a', dict(noise='quantile'), 'noise'), ('a', dict(metric='r2'), 'metric'), ('a', dict(random_state=1), 'seed'),
                            ('b', {}, 'new, empty'), ('c', {}, 'something else')]:
        with pytest.raises(ValueError, match=f'`folder`.*{match}'): regressor(tmp_path/folder, **kw).fit(df, y)
    with pytest.raises(ValueError, match='rows differ'): regressor(tmp_path/'a').fit(df, y+1*(y>11))
    with pytest.raises(ValueError, match='rows differ'): regressor(tmp_path/'a').fit(df.assign(x=df.x**3), y)
    assert files(tmp_path)==before

def test_a_metric_that_was_rewritten_is_another_one(tmp_path):
    "Two lambdas have one name, and so has a function before and after somebody edits it"
    df,y = table()
    fit = lambda f: regressor(tmp_path, metric=make_scorer(f, greater_is_better=False)).fit(df, y, eval_set=(df[:30],y[:30]))
    for _ in range(2): fit(lambda y, p: np.abs(y-p).mean())
    with pytest.raises(ValueError, match='metric differ'): fit(lambda y, p: np.abs(y-p).max())

def test_a_damaged_network_is_an_error(folder):
    file = next((folder/'candidate_000').glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-4] + b'1234')
    with pytest.raises(ValueError, match='checksum'): regressor(folder).fit(*table())

def test_a_file_that_was_not_finished_is_written_again(monkeypatch, fitted, folder):
    df,y = table()
    (folder/'candidate_002'/'model.json').unlink()
    calls = stop_after(monkeypatch, 99)
    assert (regressor(folder).fit(df, y).predict(df)==fitted[1]).all() and len(calls)==1
    assert json.loads((folder/'candidate_002'/'model.json').read_text())['candidate']
