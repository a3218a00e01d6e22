"The uncertainty benchmark on made-up numbers: scores, calibrations, and resumed runs"
import sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import make_table
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.uncertainty import __main__ as command, one_call, uci
from benchmarks.uncertainty.data import TABLES, Data
from benchmarks.uncertainty.methods import LEVELS, NETWORKS, Prediction
from benchmarks.uncertainty.report import report_text
from benchmarks.uncertainty.score import ece_by_chance, intervals, rolling_quantiles, score_classes, score_numbers

rng = np.random.default_rng(0)
def normal(n=4000, spread=False):
    sd = rng.uniform(.2, 2, n)
    y = rng.normal(size=n)*sd
    return Prediction(np.zeros(n), spread=sd/6 if spread else None),y

def test_calibrated_intervals_hold_what_they_say():
    (valid,y),(test,y_test) = normal(spread=True),normal(spread=True)
    rows = {r['calibration']:r for r in score_numbers(valid, test, y, y_test)}
    for name in ('split','local','cqr'): assert abs(rows[name]['coverage']-.9)<.02, name      # four standard errors
    assert rows['local']['winkler'] < .95*rows['split']['winkler'] and list(rows)==['raw','split','local','cqr']

def test_quantiles_of_a_method_are_its_own():
    valid,y = normal()
    q = np.tile(np.quantile(y, LEVELS), (len(y),1))
    pred = Prediction(valid.mean, sd=np.ones(len(y)), quantiles=q)
    low,high = intervals(pred, pred, y, y)['raw']
    assert (low==q[:,0]).all() and (high==q[:,-1]).all()
    assert score_numbers(pred, pred, y, y)[0]['coverage']==pytest.approx(.9, abs=.001)

def test_rolling_quantiles_know_the_days_before_only():
    days = pd.Series(pd.to_datetime(['2012-01-02','2012-01-01','2012-01-02']))
    res = rolling_quantiles(np.arange(20.), np.array([100.,200.,300.]), days, window=19)
    assert res.tolist()==[19.,18.,19.]      # the 18th of 19: the outcome of the first day, 200, counts on the second

def test_worst_quarter():
    (valid,y),(test,y_test) = normal(),normal()
    days = pd.Series(pd.Timestamp('2010-01-01')+pd.to_timedelta(np.arange(4000)//20, unit='D'))
    rows = {r['calibration']:r for r in score_numbers(valid, test, y, y_test, (days,days))}
    assert all(.8<r['worst_quarter']<=r['coverage'] for r in rows.values()) and 'last 500' in rows

def test_ends_that_move_apart_follow_a_shift():
    (valid,y),(test,y_test) = normal(),normal()
    days = pd.Series(pd.Timestamp('2010-01-01')+pd.to_timedelta(np.arange(4000)//20, unit='D'))
    rows = {r['calibration']:r for r in score_numbers(valid, test, y, y_test+5, (days,days))}
    both,apart = rows['last 500'],rows['last 500, ends apart']
    assert apart['coverage']>.86 and apart['width']<.6*both['width'] and apart['winkler']<.6*both['winkler']

def test_classes_get_a_temperature():
    z = rng.normal(size=(3000,2))
    y = (rng.random(3000) < 1/(1+np.exp(z[:,0]-z[:,1]))).astype(int)
    p = Prediction(z[:,1], logits=3*z)
    raw,calibrated = score_classes(p, p, y, y)
    assert abs(calibrated['temperature']-3)<.4 and calibrated['log_loss']<raw['log_loss'] and calibrated['ece']<raw['ece']

def test_ece_by_chance():
    p = torch.rand(500, generator=torch.Generator().manual_seed(0))
    probs = torch.stack([1-p,p], 1)
    few,many = ece_by_chance(probs, 50),ece_by_chance(probs.repeat(16, 1), 50)
    # in each of 15 bins the mean of n/15 draws with the variance p(1-p): E|error| = sqrt(2/pi * 15/n * p(1-p)), about .8*.39*sqrt(15/n)
    assert few.mean()==pytest.approx(.054, rel=.15) and many.mean()==pytest.approx(few.mean()/4, rel=.15)

def made_up(options, classes=False):
    df = make_table(120).rename(columns=dict(y='target')).astype(dict(target=float))
    if classes: df['target'] = (df.target>df.target.median()).astype(int)
    parts = tuple(df.iloc[i::3].reset_index(drop=True) for i in range(3))
    return Data('classes' if classes else 'numbers', 'made up', ['color','code'], ['b'], 'target', parts, 1, 16, False, classes)

@pytest.mark.filterwarnings('ignore')
def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, 'numbers', made_up)
    monkeypatch.setitem(TABLES, 'classes', lambda o: made_up(o, True))
    names,methods = ['numbers','classes'],['plain','plain, noise p=.1 when it predicts','plain, moments p=.1','quantile']
    path = tmp_path/'uncertainty.csv'
    command.run(names, methods[:1], 1, None, path, 1, 5)
    first = path.read_text()
    path.write_text(first+'numbers,made')       # killed while it wrote
    command.run(names, methods, 1, None, path, 1, 5)
    assert path.read_text().startswith(first)
    res = command.known(path)
    assert res.groupby('dataset').method.nunique().to_dict()==dict(numbers=4, classes=2)
    assert np.isfinite(res[res.dataset=='numbers'][['rmse','crps','winkler','coverage']]).all(axis=None)
    assert '## numbers' in report_text(res) and 'CQR' in report_text(res)

def test_unknown_names_are_refused(capsys):
    assert command.main(['--tables', 'x'])==2 and '`tables` must' in capsys.readouterr().err
    assert command.main(['--methods', 'plain; x'])==2 and "got ['x']" in capsys.readouterr().err
    assert all(m.nets>=1 for m in NETWORKS.values())


def test_splits_of_concrete():
    "Test rows choose nothing, and each row is in one part"
    df = pd.DataFrame(dict(row=range(100)))
    train,test = [p.row.tolist() for p in uci.parts(df, 3, choose=False)]
    assert len(test)==10 and sorted(train+test)==list(range(100))
    fit,valid = [p.row.tolist() for p in uci.parts(df, 3, choose=True)]
    assert len(valid)==18 and sorted(fit+valid)==sorted(train)

def test_scores_of_concrete_have_the_unit_of_the_target():
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=r.normal(size=200), b=r.normal(size=200)))
    df[uci.TARGET] = 50 + 10*df.a + r.normal(size=200)
    rmse,nll = uci.scores(df, 0, 30, noise='gaussian')
    assert .5<rmse<5 and .5<nll<4      # noise of 1 has .92 + .5


def _made_up(classes):
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=r.normal(size=900), b=r.normal(size=900)))
    df['y'] = r.random(900)<1/(1+np.exp(-2*df.a)) if classes else df.a + (.1+df.b.abs())*r.normal(size=900)
    df['y'] = df.y.astype(int if classes else float)
    parts = tuple(df.iloc[i:j].reset_index(drop=True) for i,j in ((0,400),(400,600),(600,900)))
    return Data('made-up', 'made-up', [], ['a','b'], 'y', parts, 1, 64, True, classes)

def test_the_call_is_scored_on_rows_that_it_has_not_seen():
    "True intervals have a Winkler score of 3.7 here, the best of one width for all rows 5.2"
    data = _made_up(False)
    test = data.parts[2]
    model = one_call.fit(data, DropConnectRegressor, budget='quick', noise='quantile', random_state=0)
    found = one_call.number_scores(model, test[['a','b']], torch.as_tensor(test.y.to_numpy()))
    assert abs(found['coverage']-.9)<.09 and 3<found['winkler']<4.7 and .4<found['crps']<.6 and .8<found['rmse']<1.3
    data = _made_up(True)
    test = data.parts[2]
    model = one_call.fit(data, DropConnectClassifier, budget='quick', random_state=0)
    found = one_call.class_scores(model, test[['a','b']], torch.as_tensor(test.y.to_numpy()))
    assert .3<found['log_loss']<.6 and found['ece']<.15

def test_references_are_the_best_of_the_file():
    rows = pd.read_csv(one_call.RESULTS).query('dataset=="california" and seed==0')
    trees = rows[rows.method.isin(['LightGBM quantile','CatBoost gaussian'])].winkler
    assert trees.min()*.9 < one_call.reference('california', 'winkler') < trees.max() and np.isnan(one_call.reference('none', 'winkler'))
