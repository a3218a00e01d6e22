"""`FrameReader` on tables that nobody chose: every kind of column, gaps and scale, at every size"""
import json, re, warnings
import numpy as np, pandas as pd, pytest
from odd_tables import KINDS, make_table
from fastai_dropconnect.serialize.reader import build_reader, describe_reader
from fastai_dropconnect.tabular.copies import CopyReader
from fastai_dropconnect.tabular.dates import date_format
from fastai_dropconnect.tabular.frames import FrameReader

def odd_table(seed):
    "Return a table of random columns"
    r = np.random.default_rng(seed)
    return make_table(r.choice(list(KINDS), r.integers(1, 9)), int(r.choice([1, 2, 3, 30, 300])), seed)


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


def test_few_long_levels_are_a_category_and_spaces_around_them_count():
    values = ['Tensed', 'Tensed'+' '*70, 'commission of a crime by a stranger'] + [f'a long name of kind number {i}' for i in range(20)]
    df = pd.DataFrame(dict(a=values*40, b=range(len(values)*40)))
    reader = FrameReader().fit(df)
    assert reader.cat_names==['a'] and reader.transform(df).a.nunique()==len(values)
    assert reader.transform(pd.DataFrame(dict(a=[' ', 'n/a '], b=[1,2]))).a.isna().all()

def test_names_of_parts_do_not_hide_columns():
    "The hours of `sold`, which are all 0, would replace `sold_hour`; fastai notes the gaps of `area` in `area_na`"
    r = np.random.default_rng(0)
    n = 60
    df = pd.DataFrame(dict(sold_hour=r.integers(0, 24, n), sold=pd.date_range('2024', periods=n), area_na=r.choice(['u', 'v'], n),
                           area=np.where(r.random(n)<.3, np.nan, r.normal(0, 1, n))))
    reader = FrameReader().fit(df)
    rows = reader.transform(df)
    assert [reader.parts[c] for c in ('sold_hour', 'area_na', 'area')]==[['sold_hour_'], ['area_na_'], ['area']] and not reader.dropped
    assert (rows.sold_hour_==df.sold_hour).all() and (rows.area_na_==df.area_na).all()

def test_times_of_day_and_durations_however_they_are_written():
    "From databases they come as objects, from files as text; either is read as the seconds that pandas has"
    at = pd.Series(pd.to_timedelta(np.arange(0, 86400, 997), unit='s'))
    text = at.astype(str).str.removeprefix('0 days ')
    forms = dict(pandas=at, objects=at.astype(object), times=[(pd.Timestamp(0)+t).time() for t in at], text=text, short=text.str.slice(0, 5), python=at.map(lambda t: str(t.to_pytimedelta())))
    for name,values in forms.items():
        reader = FrameReader().fit(pd.DataFrame(dict(at=values)))
        assert reader.cont_names==['at'] and not reader.dropped
        for later in forms.values():
            apart = reader.transform(pd.DataFrame(dict(at=later)))['at'] - at.dt.total_seconds()
            assert apart.between(-60, 0).all() and (later is forms['short'] or (apart==0).all()), name
    scores = pd.DataFrame(dict(a=['4:3', '16:9']*9, b=['1:75', '2:80']*9))
    with warnings.catch_warnings(action='ignore'): assert FrameReader().fit(scores).cat_names==['a', 'b']

def test_amounts_are_numbers_and_codes_are_not():
    "At predict, what is written otherwise is a missing value"
    r = np.random.default_rng(0)
    n = 200
    money,rows = np.round(r.lognormal(6, 2, n), 2),range(n)
    written = dict(price=[f'${v:,.2f}' for v in money], euros=[f'€ {v+i:.2f}' for i,v in enumerate(money)], share=[f'{i/7:.1f} %' for i in rows],
                   count=[f'{i**3:,}'.replace(',', ' ') for i in rows], way=[f'{i*3.5} km' for i in rows],
                   german=[f'{i/7:.2f}'.replace('.', ',') for i in rows])
    codes = dict(zip=[f'{i*37%100_000:05}' for i in rows], phone=[f'0{170+i%9} {1_000_000+i*791}' for i in rows], version=[f'{i%3}.{i%7}.{i}' for i in rows],
                 span=[f'{i}-{i+5}' for i in rows], answers=[f'{1+i%3},{4+i%3}' for i in rows], place=[f'{i} {"Main" if i%2 else "High"} Street' for i in rows],
                 shoes=[f'{i%13}{"abc"[i%3]}' for i in rows], thousandths=[f'{1+i//100},{i%100:03} €' for i in rows])
    with warnings.catch_warnings(action='ignore'): reader = FrameReader().fit(pd.DataFrame(written | codes))
    assert reader.cont_names==list(written) and set(reader.cat_names + list(reader.dropped))==set(codes)
    assert (reader.transform(pd.DataFrame(written | codes)).price==money).all()
    later = pd.DataFrame(dict.fromkeys(written | codes, ['n/a','7','7 miles','£7',None]))
    assert reader.transform(later)[['price','euros','share','way']].isna().all(axis=None)

def test_amounts_with_decimal_commas():
    "The format is kept in files; at predict, `1,234` has decimals and `1.234` has thousands"
    money = np.round(np.random.default_rng(0).lognormal(6, 2, 200), 2)
    swap = str.maketrans(',.', '.,')
    written = dict(price=[f'{v:,.2f} €'.translate(swap) for v in money], plain=[f'{v+i:,.2f}'.translate(swap) for i,v in enumerate(money)],
                   spaces=[f'{2*v:,.2f} zł'.translate(str.maketrans(',.', ' ,')) for v in money], share=[f'{i/7:.1f}%'.translate(swap) for i in range(200)],
                   points=[f'{v:.1f} kg' for v in money], either=[f'{1+i//100},{i%100:03}' for i in range(200)])
    with warnings.catch_warnings(action='ignore'): reader = FrameReader().fit(pd.DataFrame(written))
    assert reader.cont_names==['price','plain','spaces','share','points']
    again = build_reader(json.loads(json.dumps(describe_reader(CopyReader().fit(pd.DataFrame(written).drop(columns='either')), list(written)))), list(written))
    for r in (reader,again):
        rows = r.transform(pd.DataFrame(written))
        assert (rows.price==money).all() and np.allclose(rows.spaces, 2*money) and np.allclose(rows.points, money, atol=.051)
    later = pd.DataFrame(dict(price=['1,234 €', '1.234 €', '12.5 €'], plain=1., spaces='1 zł', share='1%', points=['1.234 kg', '1,234 kg', '1,2 kg'], either='a'))
    rows = reader.transform(later)
    assert rows.price[:2].tolist()==[1.234,1234] and rows.points[0]==1.234 and rows.isna().sum().sum()==3 and (rows.plain==1).all()

def test_plain_decimal_commas_and_lists_of_codes():
    "A column without unit and thousands; of answers such as `1,2` nobody knows that they are numbers"
    r = np.random.default_rng(0)
    def comma(values): return [f'{v:.6g}'.replace('.', ',') for v in values]
    n = 200
    numbers = dict(tenths=r.integers(1, 80, n)/10, signed=np.round(r.normal(0, 3, n), 1), halves=r.integers(0, 41, n)/2, quarters=r.integers(0, 49, n)/4,
                   few=np.resize([12.5, .75, -3.25, 7], n), gaps=np.where(r.random(n)<.2, np.nan, r.integers(10, 99, n)/10))
    two = np.sort(np.array([r.permutation(9)[:2]+1 for _ in range(n)]))
    codes = dict(answers=np.resize(['1,2', '2,3', '1'], n), sorted=[f'{a},{b}' for a,b in two], clicked=[f'{b},{a}' if i%2 else f'{a},{b}' for i,(a,b) in enumerate(two)],
                 up_to_three=[*comma(r.integers(1, 80, n-4)/10), *['1,2,3']*4], stars=np.resize(comma(np.arange(0, 5.5, .5)), n),
                 thousandths=[f'{i%7+1},{i%3+1}00' for i in range(n)])
    df = pd.DataFrame({k: pd.Series(comma(v)).replace('nan', None) for k,v in numbers.items()} | codes)
    with warnings.catch_warnings(action='ignore'): reader = FrameReader().fit(df)
    assert reader.cont_names==list(numbers) and set(reader.cat_names)==set(codes)
    plain = pd.DataFrame(numbers)
    again = FrameReader.from_dict(json.loads(json.dumps(reader.to_dict())))
    for rows in (reader.transform(df),again.transform(df),again.transform(df.assign(**plain))): assert np.array_equal(rows[list(numbers)], plain, equal_nan=True)
    later = again.transform(pd.DataFrame(dict.fromkeys(df, ['12,5', '7', 7, 1.5, '1.5', '1,234', '1.234,5', '1,2,3', None])))
    assert later.tenths.fillna(-1).tolist()==[12.5, 7, 7, 1.5, -1, 1.234, -1, -1, -1]

DAYS = pd.Series(pd.date_range('1999-11-03', '2021-06-30', freq='37D'))
MONTHS = DAYS.dt.to_period('M').dt.to_timestamp()
TIMES = pd.Series(pd.date_range('2019-12-30', '2021-06-30', freq='90h37min').floor('min'))
DATES = [(DAYS, '%b %d, %Y|%B %d, %Y|%d %b %Y|%d %B %Y|%A, %B %d, %Y|%d-%b-%Y|%d-%b-%y|%m/%d/%y|%d/%m/%y|%m/%d/%Y %I:%M:%S %p|%d/%m/%Y %I:%M %p|%d%b%Y'), (MONTHS, '%b-%Y|%b %Y|%B %Y|%m/%Y'),
         (TIMES, '%m/%d/%y %H:%M|%d/%m/%y %H:%M|%m/%d/%y %I:%M %p|%d-%b-%y %H:%M|%b %d, %Y %I:%M %p|%Y-%m-%d %I:%M %p|%m/%d/%Y %I:%M %p|%d/%m/%Y %I:%M %p')]

@pytest.mark.parametrize('zeros', [True, False])
@pytest.mark.parametrize('dates,format', [(dates, f) for dates,formats in DATES for f in formats.split('|')])
def test_dates_however_they_are_written(dates, format, zeros):
    "With zeros before days and hours or without; what is written in another way at predict is missing"
    written = dates.dt.strftime(format if zeros else re.sub('%([mdHI])', r'%-\1', format)).tolist()
    reader = FrameReader().fit(pd.DataFrame(dict(at=written)))
    rows = reader.transform(pd.DataFrame(dict(at=[*written, 'soon', '7', '1.2.2020', None])))
    plain = pd.DataFrame(dict(at=dates))
    pd.testing.assert_frame_equal(rows[:len(dates)], FrameReader().fit(plain).transform(plain))
    assert rows[len(dates):].isna().all(axis=None)

@pytest.mark.parametrize('dates,write', [
    (DAYS, lambda d: d.strftime('%d.%m.%y')), (DAYS, lambda d: d.strftime('%d%b%Y').upper()), (TIMES, lambda d: d.strftime('%d%b%Y:%H:%M:%S').upper()),
    (TIMES, lambda d: d.strftime('%d.%m.%y %H:%M')), (DAYS, lambda d: d.strftime('%b %d, %Y').replace('Sep', 'Sept').replace(' ', '. ', 1).replace('May.', 'May')),
    (DAYS.dt.to_period('Q').dt.to_timestamp(), lambda d: f'{d.year}Q{d.quarter}'), (DAYS.dt.to_period('W').dt.start_time, lambda d: '{}W{:02}'.format(*d.isocalendar()))])
def test_dates_of_other_programs(dates, write):
    written = pd.DataFrame(dict(at=dates.map(write)))
    plain = pd.DataFrame(dict(at=dates))
    reader = FrameReader().fit(written)
    again = FrameReader.from_dict(json.loads(json.dumps(reader.to_dict())))
    pd.testing.assert_frame_equal(again.transform(written), FrameReader().fit(plain).transform(plain))

def test_dates_that_are_all_in_may_read_other_months():
    days = pd.Series(pd.date_range('2020-05-01', '2020-05-31'))
    year = pd.Series(pd.date_range('2021-01-01', '2021-12-31', freq='5D'))
    for format in ('%B %d, %Y', '%b %d, %Y', '%d %B %Y', '%d-%b-%y'):
        reader = FrameReader().fit(pd.DataFrame(dict(at=days.dt.strftime(format))))
        for later in (format, format.replace('%B', '%b'), format.replace('%b', '%B')):
            assert (reader.transform(pd.DataFrame(dict(at=year.dt.strftime(later)))).at_day_of_year==year.dt.day_of_year).all()

def test_dates_of_a_file_that_was_saved_earlier():
    "Their formats may have names of months in full, or a point behind short ones"
    days = pd.Series(pd.date_range('2020-01-01', '2020-12-31', freq='9D'))
    state = FrameReader().fit(pd.DataFrame(dict(at=days))).to_dict()
    for format in ('%B %d, %Y', '%b. %d, %Y', '%d %B %Y', '%m/%d/%y', '%d.%b.%Y'):
        old = FrameReader.from_dict(state | dict(columns=[state['columns'][0] | dict(format=format)]))
        assert (old.transform(pd.DataFrame(dict(at=days.dt.strftime(format)))).at_day_of_year==days.dt.day_of_year).all()


@pytest.mark.parametrize('write', [
    lambda i: f'{i%12+1:02}.{i%12+1:02}.{i%90+10}', lambda i: f'3.{i%12+1}.{i%20}', lambda i: f'{i}/{1000+i}', lambda i: f'{i%5+1}Q{2000+i%20}',
    lambda i: f'555-{i:04d}', lambda i: f'{200+i}-555-{i:04d}', lambda i: f'{i%30}.{i%12}.{i}', lambda i: f'10.0.{i%9}.{i}', lambda i: f'A-{i}', lambda i: f'MAR-{1000+i}',
    lambda i: f'{i%12+1:02d}:{i%60:02d} PM', lambda i: ('May','march','Sunday','Mayor')[i%4], lambda i: f'May {i} people', lambda i: f'{i} Main St.', lambda i: f'{i%28+1}-{i%12+1}-{i%99:02d}'])
def test_what_looks_like_dates_and_is_none(write):
    "Phone numbers, versions, codes, times of day, words, addresses"
    assert date_format([write(i) for i in range(200)]) is None
