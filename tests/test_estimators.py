"""`DropConnectRegressor` and `DropConnectClassifier`: what scikit-learn asks of estimators, tables of all kinds, files"""
import copy, decimal, importlib.util, json, pickle, random, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
import numpy as np, pandas as pd, pytest, torch
import sklearn.utils.estimator_checks as checks
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss, make_scorer, mean_absolute_error, root_mean_squared_error
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
import odd_tables, sklearn_checks
from fastai_dropconnect import splits, table_estimator
from fastai_dropconnect.callback.calibrate import calibration_of
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
from fastai_dropconnect.fit_best import fit_best_on
from fastai_dropconnect.scoring import ScorerMetric
from fastai_dropconnect.serialize.learner import load_model
from fastai_dropconnect.serialize.predictor import load_predictor
from fastai_dropconnect.splits import splits_of
from fastai_dropconnect.tabular.copies import CopyReader

pytestmark = pytest.mark.filterwarnings('ignore')
has_lightgbm = importlib.util.find_spec('lightgbm') is not None

@pytest.fixture(autouse=True)
def small_networks(monkeypatch, request):
    "Train one small network instead of searching, unless the name of a test starts with test_search"
    if not request.function.__name__.startswith('test_search'): monkeypatch.setattr(table_estimator, 'fit_best_on', sklearn_checks.fit_small)

def table(n=120, seed=0):
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(x=r.normal(0, 1, n), size=r.choice(['S', 'M', 'L'], n), when=pd.Timestamp('2024-01-01') + pd.to_timedelta(np.arange(n), unit='D'),
                           noise=r.normal(0, 1, n), same=1, flag=r.random(n)<.5))
    return df,3*df.x*np.where(df['size']=='S', -1, 1)+10

# Three folds; where a test is about five or about training on all rows, it says budget='default'
def regressor(**kw): return DropConnectRegressor(**(dict(budget='quick', random_state=0, verbose=0) | kw))
def classifier(**kw): return DropConnectClassifier(**(dict(budget='quick', random_state=0, verbose=0) | kw))


# --- scikit-learn

# The others are run by `python tests/sklearn_checks.py`
CHOSEN = '''check_do_not_raise_errors_in_init_or_set_param check_estimator_cloneable check_estimators_unfitted check_no_attributes_set_in_init
check_parameters_default_constructible check_fit1d check_fit2d_predict1d check_requires_y_none check_n_features_in_after_fitting
check_fit2d_1feature check_estimators_nan_inf check_fit_idempotent check_classifiers_one_label check_complex_data check_dtype_object'''.split()

def chosen():
    "Return pairs of an estimator and a check"
    generator = getattr(checks, 'estimator_checks_generator', None)
    if generator is None: return []     # scikit-learn 1.5
    pairs = [(e, c) for e in sklearn_checks.estimators() for _,c in generator(e)]
    return [(e, c) for e,c in pairs if c.func.__name__ in CHOSEN]

@pytest.mark.parametrize('estimator,check', chosen(), ids=lambda v: type(v).__name__ if hasattr(v, 'fit') else v.func.__name__)
def test_checks_of_scikit_learn(estimator, check): check(estimator)

def test_expected_failures_have_reasons_and_exist():
    names = {c.func.__name__ for e in sklearn_checks.estimators() for _,c in checks.estimator_checks_generator(e)}
    assert set(sklearn_checks.EXPECTED) <= names and all(sklearn_checks.EXPECTED.values())

def test_tools_of_scikit_learn():
    df,y = table()
    search = GridSearchCV(regressor(), dict(budget=['quick', 'default']), cv=2).fit(df, y)
    assert search.best_params_['budget'] in ('quick', 'default') and np.isfinite(search.predict(df)).all()
    columns = make_column_transformer((StandardScaler(), ['x', 'noise']), ('passthrough', ['size']))
    assert cross_val_score(make_pipeline(columns, classifier()), df, y>10, cv=2, scoring='roc_auc').mean() > .5
    assert clone(classifier(metric='roc_auc')).get_params()==classifier(metric='roc_auc').get_params()


# --- columns

def test_columns_are_found_by_name_if_they_have_names():
    df,y = table()
    model = regressor().fit(df, y)
    want = model.predict(df)
    assert (model.predict(df[list(df)[::-1]].assign(more=1))==want).all()
    with pytest.raises(ValueError, match='noise'): model.predict(df.drop(columns='noise'))
    with pytest.warns(UserWarning, match='does not have valid feature names'): assert (model.predict(df.to_numpy())==want).all()
    numbers = df.set_axis(range(6), axis=1)
    model = regressor().fit(numbers, y)
    assert (model.predict(numbers[[5, 4, 3, 2, 1, 0]])==want).all()
    with pytest.raises(ValueError, match='5 features'): model.predict(df.iloc[:,:5])
    mixed = df.rename(columns={'x': 0})
    model = regressor().fit(mixed, y)
    assert (model.predict(mixed[list(mixed)[::-1]])==want).all() and list(model.feature_names_in_)==[str(c) for c in mixed]
    with pytest.raises(ValueError, match='more than once|unique column names'): regressor().fit(df.rename(columns={'noise': 'x'}), y)

def test_columns_of_any_name(tmp_path):
    "Also names of arguments and attributes of frames and of fastai's tables"
    df,y = table()
    names = ['self', 'items', 'cat_names', 'xs', 'é 🙂', '']
    want = regressor().fit(df, y)
    for i in range(6):
        odd = df.set_axis(names[i:] + names[:i], axis=1)
        model = regressor().fit(odd, y, eval_set=(odd, y))
        assert (model.predict(odd)==DropConnectRegressor.load(model.save(tmp_path)).predict(odd)).all() and len(model.predict_dist(odd))==120
    assert np.allclose(regressor().fit(odd, y).predict(odd), want.predict(df))

def test_index_does_not_matter():
    df,y = table()
    want = regressor().fit(df, y).predict(df)
    odd = df.set_axis(['a']*60 + ['b']*60)
    assert (regressor().fit(odd, y.set_axis(range(120, 0, -1))).predict(odd)==want).all()

def test_importances_belong_to_the_columns_of_the_table():
    df,y = table(400)
    shares = dict(zip(df, regressor().fit(df, y).feature_importances_))
    assert shares['x']>shares['noise'] and shares['same']==0 and abs(sum(shares.values())-1)<1e-9


# --- targets, weights and splits

@pytest.mark.parametrize('metric', ['roc_auc', 'accuracy', 'neg_log_loss', 'f1_macro', log_loss, make_scorer(log_loss, greater_is_better=False, response_method='predict_proba')])
def test_metrics_of_classes(metric):
    df,y = table()
    assert classifier(metric=metric).fit(df, np.where(y>10, 'high', 'low')).score(df, np.where(y>10, 'high', 'low'))>.5

@pytest.mark.parametrize('metric', ['r2', 'neg_root_mean_squared_error', 'mae', mean_absolute_error])
def test_metrics_of_numbers(metric): assert np.isfinite(regressor(metric=metric).fit(*table()).predict(table()[0])).all()

def test_metrics_of_positive_numbers():
    "A network may predict less than 0, where these metrics are not defined"
    df,y = table()
    y = np.exp(y-10)
    assert y.mean()-y.std()/2<-1
    for metric in ('neg_root_mean_squared_log_error', 'neg_mean_poisson_deviance'):
        assert np.isfinite(regressor(metric=metric).fit(df, y).predict(df)).all()
        score = ScorerMetric(metric)
        targs = torch.tensor([[0.], [2.], [4.]])
        assert score(torch.tensor([[-2.], [2.], [4.]]), targs)==pytest.approx(score(torch.tensor([[.002], [2.], [4.]]), targs), abs=1e-3)
    with pytest.raises(ValueError, match='Log'): ScorerMetric('neg_mean_squared_log_error')(targs, targs-3)

def test_predictions_that_are_no_numbers_have_the_worst_score():
    nan = torch.full((4, 2), torch.nan)
    assert ScorerMetric('r2')(nan[:,:1], torch.arange(4.)[:,None])==-np.inf
    assert ScorerMetric('roc_auc', np.array(['a', 'b']))(nan, torch.tensor([0, 1, 0, 1]))==-np.inf

@pytest.mark.parametrize('make,metric', [(classifier, 'r2'), (regressor, 'accuracy'), (regressor, 'nonsense'), (classifier, len)])
def test_metrics_that_do_not_fit(make, metric):
    df,y = table()
    with pytest.raises(ValueError, match='`metric`'): make(metric=metric).fit(df, np.where(y>10, 'high', 'low') if make is classifier else y)

def test_several_targets():
    df,y = table(300)
    both = np.stack([y, 1e6*y], 1)
    res = regressor().fit(df, both).predict(df)
    assert res.shape==(300, 2) and np.corrcoef(res[:,0], y)[0, 1]>.5 and np.allclose(res[:,1].std()/res[:,0].std(), 1e6, rtol=.3)

@pytest.mark.parametrize('dtype', [int, bool])
def test_labels_in_columns_of_any_type(dtype):
    "Nullable types, and columns of dtype `object` that once had gaps"
    df,y = table()
    y = (y>10).astype(dtype)
    for t in ('Int64' if dtype is int else 'boolean', object, 'category'):
        model = classifier().fit(df, y.astype(t), eval_set=(df, y.astype(t)))
        assert model.classes_.dtype==dtype and set(model.predict(df))<={*y} and model.score(df, y)>.5

def test_rows_without_weight_do_not_exist():
    df,y = table()
    wrong = np.where(np.arange(120)<60, y, 1e9)
    model = regressor().fit(df, wrong, sample_weight=(np.arange(120)<60)*2.)
    assert np.abs(model.predict(df)).max()<1e3
    assert len(calibration_of(model.learner_).scores)==60 and np.abs(model.predict_interval(df, .8)).max()<1e3
    with pytest.raises(ValueError, match='`sample_weight`'): regressor().fit(df, y, sample_weight=np.zeros(120))
    with pytest.raises(ValueError, match='each of the 120 rows'): regressor().fit(df, y, sample_weight=[1])

def spy(monkeypatch):
    "Return a list that receives the folds of each fit"
    seen = []
    def fit(folds, *args, **kw):
        seen.append([(set(d.train_ds.items.index), set(d.valid_ds.items.index)) for d in folds])
        return sklearn_checks.fit_small(folds)
    monkeypatch.setattr(table_estimator, 'fit_best_on', fit)
    return seen

def test_groups_times_and_validation_rows(monkeypatch):
    seen = spy(monkeypatch)
    df,y = table()
    regressor().fit(df, y, groups='size')
    assert len(seen[-1])==3 and all(len(df['size'][list(valid)].unique())==1 for _,valid in seen[-1])
    regressor().fit(df, y, time='when')
    assert seen[-1]==[(set(range(96)), set(range(96, 120)))]
    regressor().fit(df, y, time=-np.arange(120))
    assert seen[-1]==[(set(range(24, 120)), set(range(24)))]
    regressor().fit(df, y, eval_set=[(df[list(df)[::-1]].head(10), y.head(10))])
    assert seen[-1]==[(set(range(120)), set(range(120, 130)))]
    for kw,match in [(dict(time='month'), '`time`'), (dict(groups=[1]), '`groups`'), (dict(eval_set=df), '`eval_set`')]:
        with pytest.raises(ValueError, match=match): regressor().fit(df, y, **kw)
    with pytest.raises(ValueError, match='`eval_set` must have the classes'): classifier().fit(df, y>10, eval_set=(df, np.full(120, 2)))

def test_validation_rows_count_as_much_as_others_in_the_end(monkeypatch):
    df,y = table()
    seen = []
    train = sklearn_checks.train_small
    def again(dls, *args, **kw):
        seen.append(np.asarray(dls.train.wgts))
        return train(dls, *args, **kw)
    monkeypatch.setattr(sklearn_checks, 'train_small', again)
    regressor(refit=True).fit(df, y, sample_weight=np.full(120, 1000.), eval_set=(df[:30], y[:30]))
    assert len(seen[-1])==150 and np.allclose(seen[-1], 1/150)

def test_splits_of_large_tables_with_uneven_groups_and_many_classes():
    "The largest of five groups holds nearly all rows; a tenth of the rows is less than a row of each class"
    sizes = np.repeat(np.arange(5), [3000, 20, 20, 20, 20])
    assert all(len(train)>=3000 for seed in range(8) for train,_ in splits_of(3080, seed, groups=sizes))
    [(train,valid)] = splits_of(100_000, strata=np.arange(100_000)//8)
    assert len(np.unique(train//8))==12_500 and 12_500<=len(valid)<=12_501

def test_folds_of_uneven_groups():
    groups = np.where(np.arange(300)<280, 0, np.arange(300))
    assert [len(train)>280 for train,_ in splits_of(300, groups=groups)]==[True]*4
    assert len(splits_of(300, groups=np.arange(300)<200))==2

def test_times_of_all_types(monkeypatch):
    seen = spy(monkeypatch)
    df,y = table()
    day = np.arange(120)
    for time in (pd.period_range('2020-01', periods=120, freq='M'), pd.to_timedelta(day, unit='D'), pd.Series(day).astype('category'),
                 pd.date_range('2020', periods=120, tz='Europe/Berlin'), pd.Series(day).astype('Int64').mask(day==3)):
        for t in (time, pd.Series(time).set_axis(day[::-1])):
            regressor(refit=False).fit(df[['x']], y, time=t)
            assert seen[-1][0][1]<=set(range(90, 120)) and len(seen[-1])==1

def test_times_as_text_and_as_ordered_categories(monkeypatch):
    "The day may come first, and the order of a category is the one that it says"
    seen = spy(monkeypatch)
    df,y = table()
    last = [(set(range(96)), set(range(96, 120)))]
    words = [f'{w} week' for w in ('first', 'second', 'third', 'fourth', 'last')]
    for time in (df.when.dt.strftime('%d/%m/%Y'), df.when.dt.strftime('%d.%m.%Y').tolist(), [str(9+i) for i in range(120)],
                 pd.Categorical(np.repeat(words, 24), words, ordered=True), df[['when']]):
        regressor(refit=False).fit(df[['x']], y, time=time)
        assert seen[-1]==last
    regressor(refit=False).fit(df[['x', 'when']].set_axis([0, 2], axis=1), y, time=2)      # a column by its name
    assert seen[-1]==last
    with pytest.raises(ValueError, match=r'`sample_weight` must have a value for each of the 120 rows, got \(60, 2\)'):
        regressor().fit(df, y, sample_weight=np.ones((60, 2)))

@pytest.mark.parametrize('make', [regressor, classifier])
def test_no_validation_rows(make):
    df,y = table()
    with pytest.raises(ValueError, match='`eval_set` must have rows'): make().fit(df, y>10, eval_set=(df[:0], y[:0]>10))

def test_columns_that_run_on_are_left_out_only_where_that_helps():
    r = np.random.default_rng(0)
    n = 800
    day = np.arange(n)
    df = pd.DataFrame(dict(day=day, x=r.normal(0, 1, n)))
    y = df.x + np.where(day<640, day/100, 0) + r.normal(0, .1, n)      # the rise ends where the last fifth begins
    model = regressor().fit(df, y, time=day)
    assert model.reader_.dropped=={'day': 'it runs beyond its training range'} and model.predict(df.head(2)).shape==(2,)
    assert 'day' not in regressor().fit(df, y).reader_.dropped
    useful = df.x + (day>=400)
    assert 'day' not in regressor().fit(df, useful, time=day).reader_.dropped


def every_second(train, last):
    "Return a function that trains at each first call of two, and returns or raises `last` at each second"
    calls = []
    def again(*args, **kw):
        calls.append(1)
        if len(calls)%2: return train(*args, **kw)
        if last is not None: raise last
    return again

def test_all_rows_are_trained_on_at_the_end_of_a_split_by_time(monkeypatch):
    df,y = table(300)
    new = np.arange(300)>=240
    df['size'] = np.where(new, 'XL', df['size'])      # a level that only the latest rows have
    df['x'] = np.where(new, 0., df.x)
    y = np.where(new, 100., y)
    score = lambda **kw: np.abs(regressor(**kw).fit(df.drop(columns='when'), y, time=np.arange(300)).predict(df[new])-100).mean()
    without = score(refit=False)
    assert score() < without/2
    assert regressor(refit=True).fit(df, y).predict(df).shape==(300,)
    train = sklearn_checks.train_small
    for last in (None, KeyboardInterrupt):      # the time is over, or the user interrupts
        monkeypatch.setattr(sklearn_checks, 'train_small', every_second(train, last))
        assert score()==without
    with pytest.raises(ValueError, match='`refit`'): regressor(refit='always').fit(df, y)

def test_networks_that_see_all_rows_join_those_of_a_random_split(monkeypatch):
    df,y = table(300)
    model_of = lambda budget='default', **kw: regressor(budget=budget, **kw).fit(df, y).learner_.model
    assert len(model_of().models)==5      # folds leave nothing out
    torch.testing.assert_close(model_of(refit=True).weights, torch.tensor([1/7]*5+[2/7]))
    monkeypatch.setattr(splits, 'FOLDS_BELOW', 100)
    assert len(model_of(refit=False).models)==len(model_of(budget='quick').models)==1
    joined = model_of()
    torch.testing.assert_close(joined.weights, torch.tensor([1/3,2/3]))
    assert not torch.equal(*[next(m.parameters()) for m in joined.models])
    monkeypatch.setattr(sklearn_checks, 'train_small', every_second(sklearn_checks.train_small, KeyboardInterrupt))
    assert len(model_of().models)==1

@pytest.mark.parametrize('seconds,folder,n', [(1.2,False,1), (.05,False,5), (1.2,True,5)])
def test_a_table_that_takes_long_to_read_is_not_cut_into_folds(monkeypatch, tmp_path, seconds, folder, n):
    real = table_estimator.TableEstimator._folds
    def slow(self, *args):
        sleep(seconds)
        return real(self, *args)
    monkeypatch.setattr(table_estimator.TableEstimator, '_folds', slow)
    df,y = table(300)
    model = regressor(budget='default', time_limit=10, refit=False, folder=tmp_path if folder else None).fit(df, y)
    assert len(model.learner_.model.models)==n and np.isfinite(model.predict_interval(df)).all(axis=None)

def test_importances_after_training_on_all_rows():
    "The last rows bring levels and gaps, so that codes and columns are others than before"
    r = np.random.default_rng(0)
    n = 300
    df = pd.DataFrame(dict(k=r.choice(list('mnop'), n), x=r.normal(0, 1, n), z=r.normal(0, 1, n)))
    y = df.k.map(dict(m=0, n=1, o=2, p=3))*5
    new = df.head(100).assign(k=df.k.head(100).where(np.arange(100)%5>0, 'A'), x=df.x.head(100).where(np.arange(100)>5))
    model = regressor(refit=True).fit(df, y, eval_set=(new, y.head(100)))
    ids = model.learner_.dls.classes['k']
    assert 'A' in ids and set(model._valid_rows[0][:,0])=={ids.o2i[k] for k in 'Amnop'}
    assert model.feature_importances_.argmax()==0


def test_an_interrupt_leaves_nothing_behind(monkeypatch):
    df,y = table()
    model = regressor().fit(df, y)
    def interrupt(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(table_estimator, 'fit_best_on', interrupt)
    with pytest.raises(KeyboardInterrupt): model.fit(df[['x','noise']], y)
    assert '_all_rows' not in vars(model)
    with pytest.raises(NotFittedError): model.predict(df)

def test_what_is_wrong_with_validation_rows_is_said_of_them():
    df,y = table()
    for X,targets,named in ((df, y.mask(y>10), 'NaN'), (df.drop(columns='x'), y, 'missing:\n- x'), (df, y[:9], 'inconsistent'), (df, df['size'], 'finite')):
        with pytest.raises(ValueError, match=f'(?s)^`eval_set`: .*{named}'): regressor().fit(df, y, eval_set=(X, targets))
    with pytest.raises(TypeError, match='^`eval_set`: `y` must hold numbers'): regressor().fit(df, y, eval_set=(df, df.when))

def test_a_class_without_weight_that_the_evaluation_rows_have():
    df,_ = table()
    y = np.arange(120)%3
    with pytest.raises(ValueError, match='weight above 0.*got 2'): classifier().fit(df, y, (y<2).astype(float), eval_set=(df, y))

def test_lists_and_dictionaries_at_predict():
    df,y = table()
    model = regressor().fit(df, y)
    for c in ('size','x','when'):
        odd = df.head(4).astype({c: object}).copy()
        odd[c] = pd.Series([[1], {2: 3}, odd[c].iloc[2], np.array([1, 2])], index=odd.index, dtype=object)
        res,want = model.predict(odd),model.predict(df.head(4).assign(**{c: df[c].head(4).where(np.arange(4)==2)}))
        assert np.allclose(res, want), c

def test_columns_that_cannot_be_read_any_more():
    df,y = table()
    model = regressor().fit(df, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for fine in (df.head(0), df.assign(x=None, when=pd.NaT), df.assign(x='?', size='XL'), df.assign(when=df.when.astype(str))): model.predict(fine)
    written = df.when.dt.strftime('%d/%m/%Y')
    for name,values,kind in (('x', df.x+1j, 'number'), ('x', 'many', 'number'), ('when', written, 'date'), ('x', [[1]]*120, 'number')):
        odd,empty = [df.assign(**{name: v}) for v in (values, None)]
        for predict in (model.predict, model.predict_interval):
            with pytest.warns(UserWarning, match=f'nothing in {name!r} can be read as a {kind}'): assert (predict(odd)==predict(empty)).all()
    with pytest.warns(UserWarning, match="nothing in 'when' can be read as a date"): regressor().fit(df, y, eval_set=(odd.assign(when=written), y))

def test_text_with_bytes_that_no_encoding_knows(tmp_path):
    "As `open(errors='surrogateescape')` reads it; pandas with Arrow cannot hold it as `str`"
    df,y = table()
    odd = df.assign(size=pd.Series([dict(S='S\udcff', M='M', L='\udcfe L')[v] for v in df['size']], dtype=object))
    model = regressor().fit(odd, y)
    want = model.predict(odd)
    assert np.allclose(want, regressor().fit(df, y).predict(df)) and (DropConnectRegressor.load(model.save(tmp_path)).predict(odd)==want).all()

def test_records_and_flags_from_elsewhere():
    df,y = table()
    model = regressor().fit(df, y)
    want = model.predict(df)
    assert (model.predict(df.to_dict('records'))==want).all() and (regressor().fit(df.to_dict('records'), y).predict(df)==want).all()
    for flag in (df.flag.astype(int), df.flag.astype(str).str.lower(), df.flag.astype(float), df.flag.astype('boolean')):
        assert (model.predict(df.assign(flag=flag))==want).all()

def test_tables_of_all_makes():
    "What numpy, Arrow and dictionaries hold is read as a frame of the same values is"
    df,y = table()
    df = df[['x', 'noise', 'flag']]
    model = regressor().fit(df, y)
    want = model.predict(df)
    for X in (df.to_dict('list'), df.to_records(index=False), np.array(df.to_records(index=False))):
        again = regressor().fit(X, y)
        assert (again.predict(X)==want).all() and (model.predict(X)==want).all() and list(again.feature_names_in_)==list(df)
    gaps = df.assign(x=df.x.mask(df.x>1))[['x', 'noise']]
    masked = np.ma.masked_array(df[['x', 'noise']].to_numpy(), gaps.isna().to_numpy())
    assert (regressor().fit(masked, y).predict(masked)==regressor().fit(gaps.to_numpy(), y).predict(gaps.to_numpy())).all()
    sizes = table()[0][['size']].to_numpy()
    assert (regressor().fit(sizes.astype('S1'), y).predict(sizes)==regressor().fit(sizes, y).predict(sizes)).all()

def test_numbers_in_the_byte_order_of_other_machines():
    "As FITS, HDF5 and netCDF files have them"
    df,y = table()
    X = df[['x','noise']].to_numpy()
    expected = regressor().fit(X, y).predict(X)
    for other in X.astype('>f8'),pd.DataFrame(dict(a=X[:,0].astype('>f8'), b=X[:,1].astype('>f8'))),np.rec.fromarrays(X.T.astype('>f8'), names='a,b'):
        assert (regressor().fit(other, y.to_numpy('>f8')).predict(other)==expected).all()
    labels = (y>10).to_numpy('>i4')
    model = classifier().fit(X.astype('>f8'), labels, groups=np.arange(len(y)).astype('>i8')//4, eval_set=None)
    assert set(model.predict(X))=={0,1}
    regressor().fit(X, y, sample_weight=np.ones(len(y), '>f4'), time=np.arange(len(y), dtype='>f8'), eval_set=(X.astype('>f8'), y.to_numpy('>f8')))

def test_columns_of_arrow():
    pa = pytest.importorskip('pyarrow')
    df,y = table()
    day = pd.Series(pd.date_range('2020', periods=120))
    plain = df.assign(day=day, lasts=day-day[0], cents=df.x.round(2), made=df['size'])
    arrow = {'day': (day.dt.date, pa.date32()), 'lasts': (plain.lasts, pa.duration('s')), 'made': (df['size'], pa.dictionary(pa.int8(), pa.string())),
             'cents': (map(decimal.Decimal, plain.cents.map('{:.2f}'.format)), pa.decimal128(9, 2))}
    odd = plain.assign(**{k: pd.array(list(v), dtype=pd.ArrowDtype(t)) for k,(v,t) in arrow.items()})
    model = regressor().fit(plain, y)
    assert (model.predict(odd)==model.predict(plain)).all() and (regressor().fit(odd, y).predict(odd)==model.predict(plain)).all()
    lists = df.assign(lists=pd.array([[1]]*120, dtype=pd.ArrowDtype(pa.list_(pa.int8()))), day=odd.day.mask(day<day[9]))
    assert 'lists' in regressor().fit(lists, y).reader_.dropped

def test_targets_of_wrong_types():
    df,y = table()
    for wrong in (df.when, df.when-df.when[0], df[['when']]):
        with pytest.raises(TypeError, match='`y` must hold numbers'): regressor().fit(df, wrong)
    with pytest.raises(TypeError, match='one type, such as text, got int, text'): classifier().fit(df, pd.Series([1, 'a']*60))
    for wrong,kind in ((pd.cut(y, 3), 'Interval'), (df.when.dt.to_period('M'), 'Period'), (df.when-df.when[0], 'durations')):
        with pytest.raises(TypeError, match=rf'labels such as .* got {kind}: `astype\(str\)`'): classifier().fit(df, wrong)
    assert list(classifier().fit(df, pd.cut(y, 3).astype(str)).classes_)==sorted(pd.cut(y, 3).astype(str).unique())
    for make in (regressor, classifier):
        with pytest.raises(TypeError, match="a target for each row, got the text 'price'"): make().fit(df, 'price')

def test_targets_of_all_makes():
    df,y = table()
    gaps = np.ma.masked_array(y, y>10)
    for make,targets in ((regressor, gaps), (classifier, np.ma.masked_array(y>10, y>12))):
        with pytest.raises(ValueError, match='each row must have a target'): make().fit(df, targets)
    assert (regressor().fit(df, np.ma.masked_array(y)).predict(df)==regressor().fit(df, y).predict(df)).all()
    for wrong in (df['size'], y+1j, y.where(y<10, np.inf)):
        with pytest.raises(ValueError, match='`y` must hold finite numbers'): regressor().fit(df, wrong)
    half = (y>10).to_numpy('float16')
    assert classifier().fit(df, half, eval_set=(df, half)).predict(df).dtype=='float16'
    with pytest.raises(ValueError, match='2 classes, got one class: 1$'): classifier().fit(df, np.ones(120, int))
    if hasattr(np.dtypes, 'StringDType'):     # numpy 2
        assert set(classifier().fit(df, np.array(df['size'], np.dtypes.StringDType())).predict(df))<=set('SML')
    both = np.c_[y, y]
    for wrong in (y, np.c_[both, y]):
        with pytest.raises(ValueError, match='`eval_set` must have targets of the same shape'): regressor().fit(df, both, eval_set=(df, wrong))

def test_weights_of_any_size():
    df,y = table()
    weights = np.arange(120.)
    want = regressor().fit(df, y, sample_weight=weights).predict(df)
    for scale in (2.**1015, 2.**-1015): assert (regressor().fit(df, y, sample_weight=weights*scale).predict(df)==want).all()

def test_a_fit_that_fails_late_leaves_no_model(monkeypatch):
    df,y = table()
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(DropConnectRegressor, '_calibrate', interrupt)
    model = regressor()
    with pytest.raises(KeyboardInterrupt): model.fit(df, y)
    with pytest.raises(NotFittedError): model.predict(df)

def test_what_estimators_return_and_take(tmp_path):
    df,y = table()
    model = classifier().fit(df, y>10)
    assert np.allclose(np.exp(model.predict_log_proba(df)), model.predict_proba(df))
    model.feature_importances_[:] = 0
    assert model.feature_importances_.sum()>.99
    model.save(tmp_path)
    with pytest.raises(ValueError, match="`device` must be .*'warp'"): DropConnectClassifier.load(tmp_path, device='warp')
    with pytest.raises(TypeError, match='`folder` must be .* got folder=5'): regressor(folder=5).fit(df, y)

@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_metric_without_a_value(value):
    metric = make_scorer(lambda targs,preds: value)
    with pytest.raises(ValueError, match=f'`metric` must be able to measure numbers.*it returns {value}'): regressor(metric=metric).fit(*table())

def test_an_outlier_does_not_hide_the_other_targets():
    r = np.random.default_rng(0)
    x = r.normal(0, 1, (400, 2))
    y = x[:,0] + .1*r.normal(0, 1, 400)
    y[7] = 1e9
    model = regressor()
    model._learn_targets(y)
    assert model._encoded_targets(y)[np.arange(400)!=7].std()>.1      # 1e-8 without a limit

def test_targets_that_follow_a_column_far_out(monkeypatch, tmp_path):
    "Ranks and a sigmoid bend such a line"
    r = np.random.default_rng(0)
    X = pd.DataFrame(dict(delay=r.exponential(1, 1500)**3, hour=r.integers(0, 24, 1500), airline=r.choice(list('abc'), 1500)))
    X.loc[::50, 'delay'] = np.nan
    y = X.delay.fillna(0) + X.airline.map(dict(a=0, b=1, c=2)) + .3*r.normal(size=1500)
    fitted = lambda: regressor().fit(X[:1000], y[:1000])
    error = lambda model: root_mean_squared_error(y[1000:], model.predict(X[1000:]))
    model = fitted()
    with monkeypatch.context() as m:
        m.setattr(CopyReader, 'add_copies', lambda self,df,targets,rows: self)
        ranks = fitted()
    assert model.reader_.straight=={'delay (straight)': 'delay'} and not ranks.reader_.straight
    assert error(model)<.6*error(ranks)
    assert model.feature_importances_[0]>.9
    again = DropConnectRegressor.load(model.save(tmp_path/'model'))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.predict(X[:1].assign(delay=1e9)).item()<4*y.max()      # the line goes on for a while, not for ever

def test_numbers_that_are_names(tmp_path):
    "Each of 100 shops sells its own amount: nothing is to be learned from the order of their numbers"
    r = np.random.default_rng(0)
    X = pd.DataFrame(dict(shop=r.integers(1000, 1100, 1500), x=r.normal(size=1500)))
    amounts = 3*r.normal(size=100)
    y = amounts[X['shop']-1000] + X.x
    model = regressor().fit(X[:1000], y[:1000])
    assert model.reader_.coded=={'shop (levels)': 'shop'}
    assert root_mean_squared_error(y[1000:], model.predict(X[1000:]))<.6*y.std()       # with numbers only: .95
    assert model.feature_importances_[0]>.5
    again = DropConnectRegressor.load(model.save(tmp_path/'model'))
    unseen = X[:3].assign(shop=[7, 1001, None])
    np.testing.assert_array_equal(again.predict(unseen), model.predict(unseen))
    gaps = X.assign(shop=X['shop'].where(X.index%50>0))
    late = regressor().fit(gaps[:1000], y[:1000], eval_set=(gaps[1000:],y[1000:]))
    assert late.reader_.coded and np.isfinite(late.predict(gaps)).all()
    sold = classifier().fit(X[:1000], y[:1000]>0)
    assert sold.reader_.coded and not sold.reader_.straight and sold.score(X[1000:], y[1000:]>0)>.75

def test_words_of_text(tmp_path):
    "No title stands twice, but those with `sold` in them are worth more; what is written without sense is left out with a warning"
    r = np.random.default_rng(0)
    words = np.array('red blue old new sold house car boat with of'.split())
    n = 600
    X = pd.DataFrame(dict(x=r.normal(size=n), title=[' '.join([*r.choice(words, 3), f'no. {i}']) for i in range(n)]))
    X.loc[::50, 'title'] = None
    y = X.x + 3*X.title.str.contains('sold').fillna(False).astype(float)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = regressor(refit=True).fit(X[:500], y[:500])
    assert 'title: sold' in model.reader_.cat_names and not model.reader_.dropped and not any('left out' in str(w.message) for w in caught)
    assert root_mean_squared_error(y[500:], model.predict(X[500:]))<.4*y.std()
    assert model.feature_importances_.argmax()==1
    again = DropConnectRegressor.load(model.save(tmp_path/'model'))
    odd = pd.DataFrame(dict(x=0., title=pd.Series(['SOLD', 'never seen', None, 7, ['a']], dtype=object)))
    np.testing.assert_array_equal(again.predict(odd), model.predict(odd))
    assert model.predict(odd)[0]>model.predict(odd)[1:].max()+1
    only = classifier().fit(X[['title']], y>y.mean(), eval_set=(X[['title']][:100], y[:100]>y.mean()))
    assert only.reader_.words['title'] and only.score(X[['title']], y>y.mean())>.75
    with pytest.warns(UserWarning, match="left out 'title'"): useless = regressor().fit(X, r.normal(size=n))
    assert useless.reader_.names==['x_'] and list(useless.reader_.dropped)==['title'] and np.isfinite(useless.predict(odd)).all()

def test_targets_with_few_values_are_not_clipped():
    zeros = np.r_[np.zeros(996), [1e6]*4]
    model = regressor()
    model._learn_targets(zeros)
    assert model._encoded_targets(zeros).max()>10 and np.isclose(model._scale, zeros.std())


def test_saved_with_columns_of_several_levels_and_dates_as_classes(tmp_path):
    df,y = table()
    df = df[['x', 'size']].set_axis(pd.MultiIndex.from_tuples([('a', 1), ('b', 2)]), axis=1)
    days = pd.Series(pd.Timestamp('2024-01-01') + pd.to_timedelta(y.rank()//60, unit='D'))
    for labels in (days, days.astype(object), days.to_numpy().astype('datetime64[D]')):
        model = classifier().fit(df, labels)
        again = DropConnectClassifier.load(model.save(tmp_path/'model'))
        np.testing.assert_array_equal(again.predict(df), model.predict(df))
        assert again.classes_.dtype.kind=='M' and (again.classes_==model.classes_).all() and (again.predict(df)==days).mean()>.8
    with pytest.raises(TypeError, match='got durations'): classifier().fit(df, days - days.min())

# --- odd tables

test_odd_tables = odd_tables.tables(15)

def test_two_thousand_columns():
    r = np.random.default_rng(0)
    df = pd.DataFrame(r.normal(0, 1, (60, 2000))).astype({i: str for i in range(1000)})
    y = r.normal(0, 1, 60)
    assert np.isfinite(regressor().fit(df, y, eval_set=(df.head(9), y[:9])).predict(df.head(1))).all()


# --- files

NAMES = dict(text=list('abcdef'), numbers=[0, 1, 2, 3, 4, 5], both=[0, 'b', 2.5, True, np.nan, ''])

@pytest.mark.parametrize('names', NAMES.values(), ids=NAMES)
def test_saved_numbers(names, tmp_path):
    df,y = table()
    df = df.set_axis(names, axis=1)
    for targets in (y, np.stack([y, -y], 1)):
        model = regressor(metric='r2', time_limit=60.).fit(df, targets)
        importances = model.feature_importances_
        model.save(tmp_path)
        again = DropConnectRegressor.load(tmp_path)
        assert (again.predict(df)==model.predict(df)).all() and (again.feature_importances_==importances).all()
        assert again.get_params()==model.get_params() | dict(device='cpu')
        assert list(again.leaderboard_.name)==['small'] and again.n_features_in_==6

LABELS = dict(text=np.array(['b', 'a']), objects=np.array(['b', 'a'], object), bools=np.array([True, False]), numbers=np.array([7, 3]), floats=np.array([1., 0.]))

def test_saved_settings_of_numpy(tmp_path):
    model = regressor(random_state=np.int64(3), time_limit=np.float32(8)).fit(*table())
    again = DropConnectRegressor.load(model.save(tmp_path/'model'))
    assert (again.random_state,again.time_limit)==(3,8.) and type(again.random_state) is int


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_saved_classes(labels, tmp_path):
    df,y = table()
    model = classifier().fit(df, labels[(y>10).astype(int)])
    again = DropConnectClassifier.load(model.save(tmp_path))
    assert again.classes_.dtype==model.classes_.dtype and (again.predict(df)==model.predict(df)).all()
    with pytest.raises(AttributeError, match='before `save`'): again.feature_importances_
    learn = load_model(tmp_path)
    rows = model.reader_.transform(df)
    with learn.no_bar(): assert np.allclose(learn.get_preds(dl=learn.dls.test_dl(rows))[0], model.predict_proba(df), atol=1e-6)
    assert np.allclose(load_predictor(tmp_path).predict_rows(rows.to_dict('records')), model.predict_proba(df), atol=1e-5)

FIELDS = [ # of an estimator in a file: where, what, what the message names
    (['reader'], 1, None), (['columns'], {'kind': 'code', 'values': [1]}, None), (['named'], 1, None), (['targets'], {}, None), (['settings'], {}, None),
    (['leaderboard'], 1, None), (['importances'], ['a'], None), (['importances'], 'a', None), (['columns'], ['x'], None),
    (['targets','classes'], 'a', 'targets.classes'), (['targets','is_object'], 1, 'targets.is_object'), (['targets','hook'], 1, "targets` has an unknown field 'hook'"),
    (['settings','hook'], 1, "settings` has an unknown field 'hook'"), (['settings','metric'], ['a'], 'settings.metric'),
    (['reader','max_levels'], 0, 'reader.max_levels'), (['reader','sample_size'], 0, 'reader.sample_size'), (['reader','columns'], [1], 'reader.columns'),
    (['reader','columns',0,'name'], 6, r'reader.columns\[0\].name'), (['reader','columns',0,'name'], -1, r'reader.columns\[0\].name'), (['reader','columns',0,'name'], 'x', r'reader.columns\[0\].name'),
    (['reader','columns',0,'new_name'], 1, r'reader.columns\[0\].new_name'), (['reader','columns',0,'kind'], 'eval', r'reader.columns\[0\].kind'),
    (['reader','columns',0,'format'], 1, r'reader.columns\[0\].format'), (['reader','columns',0,'hook'], 1, r"reader.columns\[0\]` has an unknown field 'hook'"),
    (['reader','dropped'], {'a': 1}, 'reader.dropped'), (['reader','dropped'], ['a'], 'reader.dropped'), (['reader','levels'], {'a': [1]}, 'reader.levels'),
    (['reader','levels'], {'a': 'b'}, 'reader.levels'), (['reader','levels'], [['b']], 'reader.levels'), (['reader','cat_names'], ['nothing'], 'reader.cat_names'),
    (['reader','cont_names'], ['nothing'], 'reader.cont_names'), (['reader','cont_names'], [['x']], 'reader.cont_names'), (['reader','hook'], 1, "reader` has an unknown field 'hook'"),
    (['leaderboard',0], 1, r'leaderboard\[0\]'), (['leaderboard',0,'column'], 1, r'leaderboard\[0\].column'), (['leaderboard',0,'kind'], 'code', r'leaderboard\[0\]'),
    (['leaderboard',0,'values'], ['a','b'], 'leaderboard` must have columns of one length'), (['hook'], 1, ".*'hook'")]

def test_files_of_strangers(tmp_path):
    df,y = table()
    classifier().fit(df, y>10).save(tmp_path)
    with pytest.raises(ValueError, match='`estimator.class`'): DropConnectRegressor.load(tmp_path)
    file = tmp_path/'model.json'
    config = json.loads(file.read_text())
    for where,value,named in FIELDS:
        other = copy.deepcopy(config)
        *parents,last = 'estimator',*where
        place = other
        for k in parents: place = place[k]
        place[last] = value
        file.write_text(json.dumps(other))
        with pytest.raises(ValueError, match='estimator.'+(named or where[0])): DropConnectClassifier.load(tmp_path)
    file.write_text(json.dumps({k: v for k,v in config.items() if k!='estimator'}))
    with pytest.raises(ValueError, match='must hold an estimator'): DropConnectClassifier.load(tmp_path)

@pytest.mark.parametrize('change', [dict(classes=dict(kind='int', values=[0,1,2])), dict(classes=dict(kind='int', values=[0]))], ids=['more','fewer'])
def test_classes_of_strangers_are_as_many_as_the_network_predicts(change, tmp_path):
    df,y = table()
    file = classifier().fit(df, (y>10).astype(int)).save(tmp_path)/'model.json'
    config = json.loads(file.read_text())
    config['estimator']['targets'] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='classes` must be 2, as the network predicts'): DropConnectClassifier.load(tmp_path)

@pytest.mark.parametrize('noise', [None,'quantile'])
def test_targets_of_strangers_are_as_many_as_the_network_predicts(noise, tmp_path):
    df,y = table()
    file = regressor(noise=noise).fit(df, np.stack([y,-y], 1)).save(tmp_path)/'model.json'
    config = json.loads(file.read_text())
    for change,named in (dict(mean=[1.]), 'targets.mean'),(dict(scale=[1.]*3), 'targets.scale'),(dict(columns=False), 'targets.columns'):
        file.write_text(json.dumps(config | dict(estimator=config['estimator'] | dict(targets=config['estimator']['targets'] | change))))
        with pytest.raises(ValueError, match=named): DropConnectRegressor.load(tmp_path)

def test_a_save_while_another_process_loads_does_not_mix_two_models(tmp_path, monkeypatch):
    df,y = table()
    first,second = regressor().fit(df, y),regressor(random_state=1).fit(df, 100*y)
    first.save(tmp_path)
    def save_and_load(path, device):
        second.save(tmp_path)
        return load_model(path, device)
    monkeypatch.setattr('fastai_dropconnect.estimators.load_model', save_and_load)
    with pytest.raises(ValueError, match='must be readable'): DropConnectRegressor.load(tmp_path)
    monkeypatch.undo()
    assert (DropConnectRegressor.load(tmp_path).predict(df)==second.predict(df)).all()

def test_random_numbers_gradients_and_dtypes_of_others(tmp_path):
    "Whoever calls an estimator draws the same numbers as without it, and may have switched gradients off or double precision on"
    df,y = table()
    def state(): return random.getstate(),str(np.random.get_state()),torch.get_rng_state().tolist(),torch.get_default_dtype(),torch.is_grad_enabled()
    def checked(action):
        before = state()
        res = action()
        assert state()==before
        return res
    model = checked(lambda: regressor(noise='quantile').fit(df, y))
    expected = checked(lambda: model.predict(df))
    for action in model.predict_interval,model.predict_dist,model.predict_quantiles: checked(lambda: action(df))
    assert (checked(lambda: DropConnectRegressor.load(model.save(tmp_path))).predict(df)==expected).all()
    labels = checked(lambda: classifier().fit(df, y>10))
    checked(lambda: labels.predict_proba(df))
    for switched in torch.no_grad(),torch.inference_mode():
        with switched: assert (checked(lambda: regressor(noise='quantile').fit(df, y)).predict(df)==expected).all()
    torch.set_default_dtype(torch.float64)
    try:
        assert (checked(lambda: regressor(noise='quantile').fit(df, y)).predict(df)==expected).all()
        assert (checked(lambda: DropConnectRegressor.load(tmp_path)).predict(df)==expected).all()
    finally: torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('noise', [None,'quantile'])
def test_threads_predict_with_one_model(noise):
    "As in a server: each thread gets the predictions of its own rows"
    df,y = table()
    model = regressor(noise=noise).fit(df, y)
    parts = [df[i*20:i*20+15+i] for i in range(4)]
    expected = [(model.predict(p), model.predict_interval(p), model.predict_dist(p)) for p in parts]
    def same(part, want):
        try: return all(np.allclose(a, b) for a,b in zip((model.predict(part), model.predict_interval(part)), want[:2], strict=True)) and model.predict_dist(part).equals(want[2])
        except Exception as e: return e
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool: res = list(pool.map(same, parts*4, expected*4))
    finally: sys.setswitchinterval(interval)
    assert res==[True]*16

def test_pickles_hold_few_rows():
    df,y = table(6000)
    model = regressor().fit(df, y)
    data = pickle.dumps(model)
    assert len(data)<1_000_000 and (pickle.loads(data).predict(df)==model.predict(df)).all()


# --- the search

@pytest.mark.skipif(not has_lightgbm, reason='LightGBM is not installed')
@pytest.mark.parametrize('make', [regressor, classifier])
def test_search_with_boosted_trees(make, tmp_path):
    df,y = table(200)
    model = make(with_gbm=True, budget='quick', time_limit=2.).fit(df, y>10 if make is classifier else y)
    assert 'boosted trees' in set(model.leaderboard_.name)
    again = type(model).load(model.save(tmp_path))
    assert (again.predict(df)==model.predict(df)).all() and again.with_gbm

def test_boosted_trees_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    with pytest.raises(ImportError, match=r'fastai_dropconnect\[gbm\]'): regressor(with_gbm=True).fit(*table())

def test_search_without_time_says_so():
    df,y = table(2000)
    with pytest.warns(UserWarning, match='`time_limit`=0.01 ended the search before a network had seen each row once'):
        regressor(time_limit=.01, budget='quick').fit(df, y)

def test_search_itself(tmp_path):
    assert table_estimator.fit_best_on is fit_best_on
    df,y = table(60)
    model = classifier(budget='quick', time_limit=2., metric='roc_auc').fit(df, y>10)
    assert len(model.leaderboard_) and np.allclose(model.predict_proba(df).sum(1), 1)
    assert (DropConnectClassifier.load(model.save(tmp_path)).predict(df)==model.predict(df)).all()

def test_a_first_fit_warns_of_nothing_inside():
    "In a process of its own: torch warns only once"
    code = """
import warnings, numpy as np, pandas as pd
from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
from fastai_dropconnect.fit_best import BUDGETS
BUDGETS['quick'] = 1e7,()
df = pd.DataFrame(dict(k=list('abc')*20, x=np.arange(60.), when=pd.date_range('2020', periods=60)))
df.loc[50:,'k'] = 'new'
warnings.simplefilter('error')
warnings.filterwarnings('ignore', category=DeprecationWarning)
for make,time in ((DropConnectRegressor,'when'), (DropConnectClassifier,None)):
    make(budget='quick', time_limit=60, random_state=0, verbose=0).fit(df, np.arange(60)%2, time=time).predict(df)
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parent.parent)
