"Data for tables: a split by time, and loaders for tables of any size"
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import Categorify, Normalize, TabularPandas, set_seed
from hypothesis import given, strategies as st

from fastai_dropconnect.all import *
from fastai_dropconnect.tabular.data import valid_start


def days(*text): return pd.Series(pd.to_datetime(list(text), format='ISO8601').astype('datetime64[ns]'))

TEN = pd.Series(pd.date_range('2020-01-01', periods=10))

# A split by time

@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(.01, .99))
def test_no_row_trains_later_than_one_validates(numbers, share):
    dates = pd.Series(pd.Timestamp('2020-01-01')+pd.to_timedelta(numbers, 'D'))
    if dates.nunique()==1:
        with pytest.raises(DataError, match='rows are of one day, 20'): time_split(dates, share)
        return
    train,valid = time_split(dates, share)
    assert sorted(train+valid) == list(range(len(dates))) and train and valid
    assert dates[train].max() < dates[valid].min()


@pytest.mark.parametrize('share', [.1, .2, .5, .9])
def test_the_share_is_kept(share):
    dates = pd.Series(pd.date_range('2020-01-01', periods=1000)).sample(frac=1, random_state=0)
    train,valid = time_split(dates, share)
    assert len(valid) == pytest.approx(1000*share, abs=1)
    assert dates.iloc[train].max() < dates.iloc[valid].min()


def test_rows_of_one_day_stay_together():
    dates = days('2011-01-01 09:00', '2011-01-02 08:00', '2011-01-02 12:00', '2011-01-02 20:00')
    assert time_split(dates, valid_share=.3) == ([0], [1,2,3])
    for start in ('2011-01-02', '2011-01-02 10:00', pd.Timestamp('2011-01-02 10:00')):      # a day, whatever its hour
        assert time_split(dates, valid_from=start) == ([0], [1,2,3])


def test_tiny_and_huge_shares_leave_rows_on_both_sides():
    assert time_split(TEN, 1e-300) == (list(range(9)), [9])
    assert time_split(TEN, 1-1e-12) == ([0], list(range(1, 10)))


@pytest.mark.parametrize('zone', ['UTC', 'America/Chicago'])
def test_dates_with_a_time_zone_count_in_their_own_time(zone):
    dates = days('2011-01-01 23:30', '2011-01-02 00:30').dt.tz_localize(zone)
    assert time_split(dates) == time_split(dates, valid_from='2011-01-02') == ([0], [1])
    assert valid_start(dates) == pd.Timestamp('2011-01-02')


@pytest.mark.parametrize('dates,exc,match', [
    (TEN[:0], DataError, '`dates` must have rows'),
    (days('2011-01-01', None, '2011-01-02', None), DataError, '2 of 4 rows have none'),
    (pd.Series(['2011-01-01','2011-01-02']), TypeError, '`dates` must be a Series of dates'),
    (['2011-01-01'], TypeError, 'got list'),
    (pd.Series([2011, 2012]), TypeError, 'got int64')], ids=['empty','missing','text','list','numbers'])
def test_dates_are_checked(dates, exc, match):
    with pytest.raises(exc, match=match): time_split(dates)


@pytest.mark.parametrize('kw,exc,match', [
    (dict(valid_share=0), ValueError, 'valid_share=0'),
    (dict(valid_share=1), ValueError, 'valid_share=1'),
    (dict(valid_share=np.nan), ValueError, 'valid_share=nan'),
    (dict(valid_share='half'), TypeError, "valid_share='half'"),
    (dict(valid_from='soon'), ValueError, "valid_from='soon'"),
    (dict(valid_from=5), ValueError, 'valid_from=5'),
    (dict(valid_from='2031-01-01'), DataError,
     'validation period from 2031-01-01 has no rows: the rows go from 2020-01-01 to 2020-01-10'),
    (dict(valid_from='2020-01-01'), DataError, 'training period before 2020-01-01 has no rows: the rows go from')])
def test_shares_and_days_are_checked(kw, exc, match):
    with pytest.raises(exc, match=match): time_split(TEN, **kw)


def test_messages_speak_of_rows():
    for kw in (dict(dates=TEN[:1]), dict(dates=TEN, valid_from='2031-01-01')):
        with pytest.raises(DataError) as e: time_split(**kw)
        assert 'sale' not in str(e.value) and 'rows' in str(e.value)

# Loaders

def pandas(n=30, n_train=20):
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=r.choice(['a','b'], n), x=r.normal(size=n), y=r.random(n)))
    splits = list(range(n_train)),list(range(n_train, n))
    return TabularPandas(df, [Categorify,Normalize], ['kind'], ['x'], 'y', splits=splits)


@pytest.mark.parametrize('bs,used', [(2,2), (19,19), (20,20), (21,20), (10**6,20)])
def test_a_batch_is_never_larger_than_the_training_set(bs, used):
    dls = tabular_dls(pandas(), bs)
    assert dls.bs == used and len(dls.train) == 20//used
    assert [len(b[0]) for b in dls.train] == [used]*(20//used)


def test_a_small_table_is_trained_on():
    set_seed(0)
    learn = tabular_learner(tabular_dls(pandas()), layers=[8])
    before = learn.model.layers[0][0].weight.detach().clone()
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert not torch.equal(learn.model.layers[0][0].weight, before)


def test_options_are_passed_on():
    assert tabular_dls(pandas(), 4, device=torch.device('cpu'), val_bs=3).valid.bs == 3


@pytest.mark.parametrize('bs,exc', [(1,ValueError), (0,ValueError), (2.5,TypeError), (True,TypeError)])
def test_batch_sizes_are_checked(bs, exc):
    with pytest.raises(exc, match=f'bs={bs}'): tabular_dls(pandas(), bs)


def test_no_training_rows_are_named():
    to = pandas()
    with pytest.raises(DataError, match='`to` must have training rows'): tabular_dls(to.new(to.items[:0]))
