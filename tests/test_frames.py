"""`FrameReader` on tables that nobody chose: every kind of column, gaps and scale, at every size"""
import datetime, json, warnings
import numpy as np, pandas as pd, pytest
from fastai_dropconnect.tabular.frames import FrameReader

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
    durations=lambda r, n: pd.to_timedelta(r.integers(0, 900, n), unit='s'),
    periods=lambda r, n: pd.period_range('2000-01', periods=n, freq='M'))


def odd_table(seed):
    "Return a table of random columns"
    r = np.random.default_rng(seed)
    n = int(r.choice([1, 2, 3, 30, 300]))
    kinds = r.choice(list(KINDS), r.integers(1, 9))
    df = pd.DataFrame({f'{i} {k}': KINDS[k](r, n) for i,k in enumerate(kinds)})
    for c in df:
        if r.random()<.3: df[c] = df[c].where(r.random(n)<.8)
    return df


@pytest.mark.parametrize('seed', range(100))
def test_odd_tables(seed):
    df = odd_table(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: reader = FrameReader().fit(df)
        except ValueError as e:
            assert '`X` must have a column to learn from' in str(e)
            return
    rows = reader.transform(df)
    assert len(rows)==len(df) and list(rows)==reader.names
    conts = rows[reader.cont_names].to_numpy(float)
    assert not np.isinf(conts).any() and np.isfinite(conts[~np.isnan(conts)].astype('float32')).all()
    assert all(v!=v or type(v) is str for c in reader.cat_names for v in rows[c])
    assert all(rows[c].nunique(dropna=False)>1 for c in rows)
    again = FrameReader.from_dict(json.loads(json.dumps(reader.to_dict())))
    later = df.sample(frac=1, random_state=0)[reversed(list(df))]
    pd.testing.assert_frame_equal(again.transform(later), rows.loc[later.index])


def test_rows_of_other_types():
    "Rows to predict that hold none of the training's types give missing values, not errors"
    df = pd.DataFrame(dict(number=[1., 2.], flag=[True, False], when=pd.to_datetime(['2020-01-01', '2021-06-05']), size=['a', 'b']))
    reader = FrameReader().fit(df)
    odd = pd.DataFrame({c: pd.Series(['?', None], dtype=object) for c in df})
    assert reader.transform(odd).isna().all(axis=None)
    numbers = reader.transform(pd.DataFrame({c: [7] for c in df}))
    assert numbers.number[0]==7 and numbers['size'][0]=='7'


def test_sample_does_not_decide_alone():
    "A text far behind the sample of a column of numbers is a missing value"
    values = pd.Series([*map(str, range(50)), 'x'], dtype=object)
    reader = FrameReader(sample_size=10).fit(pd.DataFrame(dict(a=values)))
    assert reader.cont_names==['a'] and reader.transform(pd.DataFrame(dict(a=values))).a.isna().sum()==1
