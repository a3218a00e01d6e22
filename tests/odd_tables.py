"""Tables that nobody chose: every kind of column, gaps, scale and target, at every size. `python tests/odd_tables.py` fits 200 of them"""
import datetime, sys, warnings
import numpy as np, pandas as pd
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

KINDS = dict(
    floats=lambda r, n: r.normal(0, 1, n), huge=lambda r, n: r.normal(0, 1e300, n), tiny=lambda r, n: r.normal(0, 1e-300, n),
    infinite=lambda r, n: r.choice([1., np.inf, -np.inf, np.nan], n), ints=lambda r, n: r.integers(-5, 5, n),
    big_ints=lambda r, n: r.integers(-2**62, 2**62, n), bools=lambda r, n: r.random(n)<.5, constant=lambda r, n: np.ones(n),
    empty=lambda r, n: np.full(n, np.nan), nullable=lambda r, n: pd.array(r.choice([1, 2, None], n), dtype='Int64'),
    nullable_bools=lambda r, n: pd.array(r.choice([True, False, None], n), dtype='boolean'),
    sizes=lambda r, n: r.choice(['S', 'M', 'L'], n), marks=lambda r, n: r.choice(['a', '?', ''], n),
    numbers_as_text=lambda r, n: r.normal(0, 1, n).astype(str), category=lambda r, n: pd.Categorical(r.integers(0, 9, n)),
    ids=lambda r, n: [f'id-{i}' for i in r.permutation(n)], mixed=lambda r, n: r.choice(np.array([1, 'a', None, 2.5], object), n),
    lists=lambda r, n: pd.Series([[1]]*n, dtype=object), text=lambda r, n: [f'some words that say {i} little' for i in range(n)],
    dates=lambda r, n: pd.Timestamp('2020-01-01') + pd.to_timedelta(r.integers(0, 900, n), unit='D'),
    zoned=lambda r, n: pd.date_range('2020-01-01', periods=n, freq='h', tz='Europe/Berlin'),
    dates_as_text=lambda r, n: pd.date_range('2020-01-01', periods=n).strftime('%d/%m/%Y'),
    days=lambda r, n: pd.Series([datetime.date(2020, 1, 1 + i%28) for i in range(n)], dtype=object),
    amounts=lambda r, n: [f'${v:,.2f}' for v in r.lognormal(5, 3, n)], units=lambda r, n: [f'{v} km' for v in r.integers(0, 90, n)],
    durations=lambda r, n: pd.to_timedelta(r.integers(0, 900, n), unit='s'),
    periods=lambda r, n: pd.period_range('2000-01', periods=n, freq='M'))
NUMBERS = dict(
    numbers=lambda r, n: r.normal(3, 2, n), counts=lambda r, n: r.poisson(1, n), constant=lambda r, n: np.full(n, 7),
    prices=lambda r, n: r.lognormal(3, 3, n), huge=lambda r, n: r.normal(0, 1e300, n), tiny=lambda r, n: r.normal(1, 1e-12, n),
    several=lambda r, n: r.normal(0, [1, 1e6, 1e-6], (n, 3)), outlier=lambda r, n: np.r_[1e12, r.normal(0, 1, n-1)],
    nullable=lambda r, n: pd.Series(r.integers(0, 9, n), dtype='Int64'), frame=lambda r, n: pd.DataFrame(dict(a=r.normal(0, 1, n))))
CLASSES = dict(
    two=lambda r, n: np.arange(n)%2, text=lambda r, n: np.array(['yes', 'no'])[np.arange(n)%2], bools=lambda r, n: np.arange(n)%2==0,
    rare=lambda r, n: np.r_[1, np.zeros(n-1, int)], many=lambda r, n: r.integers(0, max(2, n//3), n), all=lambda r, n: np.arange(n),
    category=lambda r, n: pd.Series(np.arange(n)%3, dtype='category'), one=lambda r, n: np.zeros(n, int))


def make_table(kinds, n, seed, gaps=.3):
    "Return a table with a column of each kind, some of them with gaps"
    r = np.random.default_rng(seed)
    df = pd.DataFrame({f'{i} {k}': KINDS[k](r, n) for i,k in enumerate(kinds)})
    for c in df:
        if r.random()<gaps: df[c] = df[c].where(r.random(n)<.8)
    return df

def later_rows(df, seed):
    "Return rows in another order, with a column more, and with values that the table does not have"
    later = df.sample(frac=1, random_state=seed)[list(df)[::-1]].head(50).assign(more=1)
    first = later.columns[0]
    later[first] = later[first].astype(object)
    later.loc[later.index[0], first] = 'never seen'
    return later

def fits_or_explains(estimator, df, y, seed, **kwargs):
    "Fit and predict; return the message of the error if there is one"
    try: estimator.fit(df, y, **kwargs)
    except (ValueError,TypeError) as e:
        assert '`' in str(e) or 'NaN' in str(e), e
        return str(e)
    for rows in (df, df.head(1), df.head(0), later_rows(df, seed)):
        res = estimator.predict(rows)
        assert len(res)==len(rows)
        if hasattr(estimator, 'predict_proba'):
            probs = estimator.predict_proba(rows)
            assert np.isfinite(probs).all() and (probs>=0).all() and np.allclose(probs.sum(1), 1)
            assert np.isin(res, estimator.classes_).all()
        else: assert np.isfinite(res).all()

odd = st.fixed_dictionaries(dict(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=12), n=st.sampled_from([3, 4, 5, 10, 30, 100, 300, 1000, 5000]),
    target=st.sampled_from([*NUMBERS, *(f'class {c}' for c in CLASSES)]), seed=st.integers(0, 2**16), gaps=st.sampled_from([0., .3, 1.]),
    more=st.sets(st.sampled_from(['weights', 'groups', 'time', 'eval_set', 'objects', 'metric']), max_size=2)))

def try_table(case, time_limit=.3):
    "Fit an estimator to a table; return the message of the error if there is one"
    from fastai_dropconnect.estimators import DropConnectClassifier, DropConnectRegressor
    n,seed,more = case['n'],case['seed'],case['more']
    r = np.random.default_rng(seed)
    df = make_table(case['kinds'], n, seed, case['gaps'])
    if 'objects' in more: df = df.astype(object)
    name = case['target'].removeprefix('class ')
    is_class = name!=case['target']
    y = (CLASSES if is_class else NUMBERS)[name](r, n)
    kwargs = dict(sample_weight=r.choice([0., 1, 5], n)) if 'weights' in more else {}
    if 'groups' in more: kwargs['groups'] = r.integers(0, 5, n)
    if 'time' in more: kwargs['time'] = r.integers(2000, 2010, n)
    if 'eval_set' in more: kwargs['eval_set'] = df.head(40),y[:40]
    metric = ('roc_auc' if is_class else 'r2') if 'metric' in more else None
    estimator = (DropConnectClassifier if is_class else DropConnectRegressor)(
        metric=metric, budget='quick', time_limit=time_limit, random_state=0, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return fits_or_explains(estimator, df, y, seed, **kwargs)

def tables(n, seen=None):
    "Return a test that tries `n` tables"
    @settings(max_examples=n, derandomize=True, deadline=None, database=None, phases=[Phase.explicit,Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(odd)
    def test(case):
        message = try_table(case)
        if seen is not None: seen.append(message)
    return test

if __name__=='__main__':
    import torch
    torch.set_num_threads(1)
    seen = []
    tables(int(sys.argv[1]) if len(sys.argv)>1 else 200, seen)()
    errors = pd.Series([m for m in seen if m], dtype=object).str.slice(0, 110)
    print(f'{len(seen)} tables: {len(seen)-len(errors)} predicted finite values, {len(errors)} raised an error')
    print(errors.value_counts().to_string())
