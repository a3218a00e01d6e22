"Reading Kaggle's file, features, the split by time, and encoding"
import io, subprocess, sys, warnings, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback import progress, schedule # noqa: F401
from fastai.learner import load_learner
from fastai.tabular.core import TabularPandas
from fastai.tabular.learner import tabular_learner
from fastai_dropconnect.bulldozers.data import *
from fastai_dropconnect.tabular import source
from fastai_dropconnect.tabular.data import DataError, time_split
from fastai_dropconnect.tabular.procs import FillMissingAnywhere
from fastai_dropconnect.bulldozers.synthetic import *

REAL = Path(__file__).parents[2]/'shared'/'data'/'bulldozers'
needs_real = pytest.mark.skipif(not (REAL/'TrainAndValid.csv').exists(), reason=f'Kaggle\'s file is not at {REAL}')


@pytest.fixture(scope='module')
def sales(): return synthetic_bulldozers(1500, seed=3)


@pytest.fixture
def small(): return synthetic_bulldozers(40, seed=4)


def save(df, path, **kw):
    df.to_csv(path, index=False, **kw)
    return path


# --- reading

def kaggle_style(df):
    "`df` as Kaggle writes it, and as pandas would read its codes: 3 becomes 3.0"
    return df.assign(saledate=[f'{d.month}/{d.day}/{d.year} 0:00' for d in df.saledate], auctioneerID=df.auctioneerID+'.0',
                     SalePrice=df.SalePrice.astype(int), YearMade=df.YearMade.astype(int))

@pytest.mark.parametrize('kw', [{}, dict(encoding='utf-8-sig'), dict(lineterminator='\r\n')])
def test_kaggles_dates_and_codes(small, tmp_path, kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = read_bulldozers(save(kaggle_style(small), tmp_path/'Train.csv', **kw))
    pd.testing.assert_frame_equal(got, small)

def test_zip_with_other_files(small, tmp_path):
    path = tmp_path/'all.zip'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('__MACOSX/TrainAndValid.csv', b'\0\5\26'); z.writestr('readme.txt', 'hello'); z.writestr('Appendix.csv', 'a,b\n1,2\n')
        z.writestr('x/Train.csv', small.to_csv(index=False)); z.writestr('x/TrainAndValid.csv', small[:9].to_csv(index=False))
    assert len(read_bulldozers(path)) == 9

def test_columns_that_nothing_uses_may_be_absent_or_added(small, tmp_path):
    got = read_bulldozers(save(small.drop(columns=['SalesID','MachineID']).assign(note='x'), tmp_path/'a.csv'))
    pd.testing.assert_frame_equal(got, small.drop(columns=['SalesID','MachineID']))

def test_rows_without_a_price_are_left_out_and_counted(small, tmp_path):
    path = save(small.assign(SalePrice=small.SalePrice.mask(small.index < 3)), tmp_path/'a.csv')
    with pytest.warns(UserWarning, match='3 of 40 rows have no SalePrice'): got = read_bulldozers(path)
    pd.testing.assert_frame_equal(got, small[3:].reset_index(drop=True))

def test_a_file_to_predict_needs_ids_and_no_prices(small, tmp_path):
    expect = small.drop(columns='SalePrice')
    pd.testing.assert_frame_equal(read_bulldozers(save(expect, tmp_path/'a.csv'), test=True), expect)
    pd.testing.assert_frame_equal(read_bulldozers(save(small.assign(SalePrice='?'), tmp_path/'b.csv'), test=True), expect)
    with pytest.raises(DataError, match='missing: SalesID'): read_bulldozers(save(small.drop(columns='SalesID'), tmp_path/'c.csv'), test=True)
    with pytest.raises(DataError, match='SalesID: no id in 1 of 40 rows; the first is an empty cell in data row 3'):
        read_bulldozers(save(small.assign(SalesID=small.SalesID.mask(small.index==2)), tmp_path/'d.csv'), test=True)

def cell(col, value, row=6):
    def change(df):
        df = df.astype({col: object})
        df.loc[row, col] = value
        return df
    return change

def zip_of(**files):
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, 'w', zipfile.ZIP_DEFLATED) as z:
        for k,v in files.items(): z.writestr(k.replace('_', '.'), v)
    return buf.getvalue()

def csv_bytes(df): return df.to_csv(index=False).encode()

row7 = r'data row 7 \(SalesID 1000007\)'
BAD = { # name: (what stands in the file: bytes, or a change to a good frame; what the message says)
    'empty': (b'', 'is empty'),
    'white space': (b' \n\n', 'is empty'),
    'png': (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'not a CSV file: no commas'),
    'binary with commas': (b'a,b\0,c\n1,2,3\n', 'not a CSV file'),
    'undecodable': (b'SalesID,state\n1,caf\xe9\n', "not a CSV file that can be read: 'utf-8' codec can't decode"),
    'prose': (b'Dear Kaggle\nthanks\n', 'not a CSV file: no commas in its first line'),
    'ragged': (lambda d: csv_bytes(d) + b','*60 + b'\n', 'not a CSV file that can be read: .*line 42'),
    'longer rows': (lambda d: b'\n'.join(l+b',x' if i else l for i,l in enumerate(csv_bytes(d).strip().split(b'\n'))), 'not a CSV file that can be read'),
    'header only': (lambda d: d[:0], 'a header, but no rows'),
    'other csv': (b'a,b\n1,2\n', '51 needed columns missing: SalePrice, ModelID, .*Steering_Controls'),
    'two columns missing': (lambda d: d.drop(columns=['Thumb','state']), '2 needed columns missing: state, Thumb'),
    'one column missing': (lambda d: d.drop(columns='saledate'), '1 needed column missing: saledate$'),
    'text in a number': (cell('YearMade', 'old'), f"column YearMade: not a number in 1 of 40 rows; the first is 'old' in {row7}"),
    'infinite hours': (cell('MachineHoursCurrentMeter', 'inf'), f"column MachineHoursCurrentMeter: not a number.*'inf' in {row7}"),
    'text as a price': (cell('SalePrice', '$9,500'), fr"column SalePrice: not a number.*'\$9,500' in {row7}"),
    'price 0': (cell('SalePrice', 0), f"column SalePrice: a price that is not above 0 in 1 of 40 rows; the first is '0' in {row7}"),
    'price -1': (cell('SalePrice', -1), f"not above 0.*'-1' in {row7}"),
    'price inf': (cell('SalePrice', 'inf'), f"column SalePrice: not a number.*'inf' in {row7}"),
    'no prices': (lambda d: d.assign(SalePrice=np.nan), 'column SalePrice: no row has a price'),
    'bad date': (lambda d: cell('saledate', '31/31/2011 0:00', 8)(cell('saledate', 'soon')(d)),
                 f"column saledate: not a date .* in 2 of 40 rows; the first is 'soon' in {row7}"),
    'empty date': (cell('saledate', None), f'column saledate: not a date .* in 1 of 40 rows; the first is an empty cell in {row7}'),
    'date of no calendar we use': (cell('saledate', '0001-01-01'), "the first is '0001-01-01'"),
    'zip without csv': (zip_of(readme_txt='a,b'), 'none of TrainAndValid.csv and Train.csv in it.*it holds readme.txt'),
    'zip of many': (zip_of(a_csv='a,b', b_csv='a,b'), 'it holds a.csv, b.csv'),
    'empty zip': (zip_of(), 'it holds nothing'),
    'cut zip': (lambda d: zip_of(Train_csv=csv_bytes(d))[:-40], 'not a zip archive that can be read'),
    'zip with wrong content': (lambda d: zip_of(Train_csv=csv_bytes(d)).replace(b'Train.csv', b'Train.csv', 1)[:200]+b'\0'*50+zip_of(Train_csv=csv_bytes(d))[250:],
                               'not a zip archive that can be read'),
}

def write_bad(name, df, tmp_path):
    what = BAD[name][0]
    if callable(what): what = what(df)
    path = tmp_path/('bad.zip' if 'zip' in name else 'bad.csv')
    if isinstance(what, bytes): path.write_bytes(what)
    else: save(what, path)
    return path

@pytest.mark.parametrize('name', BAD)
def test_every_error_names_file_and_place(name, small, tmp_path):
    path = write_bad(name, small, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(DataError, match=f'^{path}.*{BAD[name][1]}') as e: read_bulldozers(path)
    assert len(str(e.value)) < 1500 and '\n' not in str(e.value)

def test_no_such_file_and_a_directory(tmp_path):
    with pytest.raises(DataError, match='nowhere.csv: no such file'): read_bulldozers(tmp_path/'nowhere.csv')
    with pytest.raises(DataError, match='is a directory'): read_bulldozers(tmp_path)
    assert issubclass(DataError, ValueError)


def test_parquet_and_arrow_as_csv(small, tmp_path):
    pytest.importorskip('pyarrow')
    kaggle = kaggle_style(small).assign(saledate=small.saledate, SalesID=small.SalesID.astype(int), MachineID=small.MachineID.astype('Int64'), note='x',
                                        auctioneerID=small.auctioneerID.astype(float), state=small.state.astype('category'))
    kaggle.to_parquet(tmp_path/'Train.parquet')
    kaggle.to_feather(tmp_path/'Train.arrow')
    for name in ('Train.parquet','Train.arrow'): pd.testing.assert_frame_equal(read_bulldozers(tmp_path/name), small)
    pd.testing.assert_frame_equal(read_bulldozers(tmp_path/'Train.parquet', test=True), small.drop(columns='SalePrice'))
    kaggle.assign(SalePrice=kaggle.SalePrice.mask(kaggle.index==6, -1)).to_parquet(tmp_path/'a.parquet')
    with pytest.raises(DataError, match=rf"a.parquet: column SalePrice: a price that is not above 0 .* '-1.*' in {row7}"): read_bulldozers(tmp_path/'a.parquet')
    (tmp_path/'b.parquet').write_bytes(b'a,b')
    with pytest.raises(DataError, match='b.parquet: cannot be read'): read_bulldozers(tmp_path/'b.parquet')
    with pytest.raises(DataError, match='c.parquet: no such file'): read_bulldozers(tmp_path/'c.parquet')


@pytest.mark.parametrize('name,limit,unit', [('Train.parquet', 'MAX_CELLS', 'cells'), ('Train.parquet', 'MAX_BYTES', 'bytes unpacked'), ('Train.arrow', 'MAX_BYTES', 'bytes unpacked')])
def test_large_tables_are_refused_by_what_they_say_and_by_what_is_read(small, tmp_path, monkeypatch, name, limit, unit):
    small.to_parquet(tmp_path/'Train.parquet')
    small.to_feather(tmp_path/'Train.arrow')
    monkeypatch.setattr(source, limit, 1000)
    with pytest.raises(DataError, match=f'{name}: [0-9,]+ {unit}; more than 1,000 are refused without `allow_large`'): read_bulldozers(tmp_path/name)
    assert len(read_bulldozers(tmp_path/name, allow_large=True))==len(small)
    if limit=='MAX_BYTES':          # a file that understates its size
        monkeypatch.setattr(source, '_unpacked_size', lambda dataset: 0)
        with pytest.raises(DataError, match=f'{name}: [0-9,]+ {unit}'): read_bulldozers(tmp_path/name)


# --- features, split, encoding

def test_features(sales):
    before = sales.copy()
    f = price_features(sales)
    pd.testing.assert_frame_equal(sales, before)
    np.testing.assert_allclose(f[LOG_PRICE], np.log(sales.SalePrice))
    assert f.YearMade.isna().equals(sales.YearMade < 1900) and f.saleAge.isna().equals(f.YearMade.isna())
    assert f.logHours.isna().equals(sales.MachineHoursCurrentMeter.fillna(0) == 0)
    assert not {'SalesID', 'MachineID', 'SalePrice', 'saledate'} & set(f.columns)
    assert f.saleElapsed.iloc[0] == sales.saledate.iloc[0].timestamp()
    cats, conts = feature_names(f)
    assert {'saleYear', 'saleElapsed'} <= set(conts) and {'saleMonth', 'ModelID', 'auctioneerID'} <= set(cats)

def test_split_is_between_days(sales):
    for share in (.05, .2, .5):
        train, valid = time_split(sales.saledate, share)
        assert sorted(train+valid) == list(range(len(sales)))
        assert sales.saledate[train].max() < sales.saledate[valid].min()
        assert len(valid)/len(sales) == pytest.approx(share, abs=.01)
    train, valid = time_split(sales.saledate, valid_from='2011-06-01')
    assert (sales.saledate[valid] >= '2011-06-01').all() and (sales.saledate[train] < '2011-06-01').all()

def test_sales_of_one_day_stay_together_whatever_their_hour():
    days = pd.Series(pd.to_datetime(['2011-01-01 09:00', '2011-01-02 08:00', '2011-01-02 12:00', '2011-01-02 20:00']).astype('datetime64[ns]'))
    assert time_split(days, valid_share=.3) == ([0], [1, 2, 3])

def test_split_of_few_days():
    two = pd.Series(pd.to_datetime(['2011-01-01 10:00']*9 + ['2011-01-02 09:00']).astype('datetime64[ns]'))
    assert time_split(two) == (list(range(9)), [9])
    assert time_split(two, valid_share=.99) == (list(range(9)), [9])
    with pytest.raises(DataError, match='all 9 (sales|rows) are of one day, 2011-01-01'): time_split(two[:9])

@pytest.mark.parametrize('day,error,text', [('2031-01-01', DataError, 'validation period from 2031-01-01 has no rows: the (sales|rows) go from 2004'),
    ('1999-01-01', DataError, 'training period before 1999-01-01 has no rows'), ('soon', ValueError, "valid_from='soon'"), ('5', ValueError, "valid_from='5'"),
    (5, ValueError, 'valid_from=5'), (['2011-01-01'], ValueError, 'valid_from')])
def test_split_checks_its_date(sales, day, error, text):
    with pytest.raises(error, match=text): time_split(sales.saledate, valid_from=day)

@pytest.mark.parametrize('share', [0, 1, -1, float('nan')])
def test_split_checks_its_share(sales, share):
    with pytest.raises(ValueError, match='valid_share='): time_split(sales.saledate, share)

def test_encoding_knows_the_training_rows_only(sales):
    to = bulldozers_pandas(sales)
    train, valid = time_split(sales.saledate)
    changed = sales.copy()
    changed.loc[valid, 'YearMade'] = 2010.
    changed.loc[valid, 'MachineHoursCurrentMeter'] = np.nan
    changed.loc[valid, ['state', 'Enclosure']] = 'unheard of'
    other = bulldozers_pandas(changed)
    pd.testing.assert_frame_equal(other.train.items, to.train.items)
    assert {k: list(v) for k,v in other.classes.items()} == {k: list(v) for k,v in to.classes.items()}
    assert (other.valid.xs.state == 0).all() and not (to.valid.xs.state == 0).any()
    for c in to.cat_names:
        if c in sales and c != 'ProductSize': assert set(to.classes[c]) - {'#na#'} == set(sales[c][train].dropna())
    assert (to.train.items.index == train).all() and (to.valid.items.index == valid).all()

def test_sizes_are_encoded_in_their_order(sales):
    to = bulldozers_pandas(sales)
    codes = pd.Series(to.train.xs.ProductSize.to_numpy(), index=to.train.items.index)
    assert codes.equals((sales.ProductSize.cat.codes[codes.index] + 1).astype(codes.dtype))

def test_features_that_never_vary_in_training_are_left_out(sales):
    one_year = sales.assign(state='Texas')
    train, valid = time_split(one_year.saledate)
    one_year.loc[train, 'saledate'] = one_year.saledate[train].map(lambda d: pd.Timestamp(2003, d.month, min(d.day, 28)))
    to = bulldozers_pandas(one_year, valid_from='2004-01-01')
    assert 'saleYear' not in to.cont_names and 'state' not in to.cat_names
    assert to.valid.xs.abs().to_numpy()[:, len(to.cat_names):].max() < 100

def test_a_gap_anywhere_is_filled_with_the_training_median(sales):
    to = bulldozers_pandas(sales)
    new = sales.head(2).drop(columns='SalePrice').assign(YearMade=np.nan, MachineHoursCurrentMeter=np.nan, ProductSize=pd.NA, state=None)
    assert encode_sales(to.train, new).xs.notna().all().all()
    proc, frame = FillMissingAnywhere(), pd.DataFrame(dict(a=[1., 2., 9.], b=[np.nan, 4., 6.], c=[np.nan]*3))
    t = TabularPandas(frame, [proc], cont_names=['a', 'b', 'c'])
    assert proc.na_dict == dict(a=2., b=5., c=0.) and t.cat_names == ['b_na', 'c_na']
    later = t.new(pd.DataFrame(dict(a=[np.nan], b=[1.], c=[1.])))
    later.process()
    assert later.items.a.tolist() == [2.] and later.items.b_na.tolist() == [False] and 'a_na' not in later.items

def test_a_gap_where_training_had_none():
    full = synthetic_bulldozers(300, seed=5)
    full = full.assign(YearMade=full.YearMade.where(full.YearMade > 1900, 1999.), MachineHoursCurrentMeter=full.MachineHoursCurrentMeter.fillna(0)+1)
    to = bulldozers_pandas(full)
    assert not any(c.endswith('_na') for c in to.cat_names)
    assert encode_sales(to.train, full.head(3).assign(YearMade=np.nan, MachineHoursCurrentMeter=0.)).xs.notna().all().all()

def test_tiny_data_has_a_batch(small):
    for n in (3, 5, 40):
        dls = bulldozers_dls(small[:n], bs=256)
        assert len(dls.train) == 1 and len(dls.train.one_batch()[0]) == len(dls.train_ds)
    with pytest.raises(DataError, match='training period has 1 row'): bulldozers_dls(small[:2])
    with pytest.raises(ValueError, match='bs=1'): bulldozers_dls(small, bs=1)

def test_an_exported_learner_predicts_new_sales_and_holds_no_rows(sales, tmp_path):
    def exported(df, name):
        learn = tabular_learner(bulldozers_dls(df), layers=[10])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        learn.export(tmp_path/name)
        return learn, (tmp_path/name).stat().st_size
    learn, size = exported(sales, 'a.pkl')
    new = sales.tail(30).drop(columns='SalePrice').assign(YearMade=np.nan, state='Atlantis', ModelID='0')
    again = load_learner(tmp_path/'a.pkl')
    with learn.no_bar(), again.no_bar():
        want, got = (l.get_preds(dl=l.dls.test_dl(price_features(new)))[0] for l in (learn, again))
    assert torch.equal(want, got) and got.isfinite().all()
    _, twice = exported(pd.concat([sales]*3, ignore_index=True), 'b.pkl')
    assert abs(twice-size) < 2000


# --- Kaggle's own file, where it is at hand

@needs_real
def test_the_real_file():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df, new = read_bulldozers(REAL/'TrainAndValid.csv'), read_bulldozers(REAL/'Test.csv', test=True)
    assert list(df.columns) == list(KAGGLE_COLUMNS.index) and list(new.columns) == [c for c in df if c != 'SalePrice']
    plain = pd.read_csv(REAL/'TrainAndValid.csv', low_memory=False)
    assert df.SalePrice.tolist() == plain.SalePrice.tolist() and df.isna().sum().equals(plain.isna().sum())
    assert df.saledate.tolist() == pd.to_datetime(plain.saledate).tolist()
    assert df.auctioneerID.nunique() == plain.auctioneerID.nunique() < 20
    assert encode_sales(bulldozers_pandas(df).train, new).xs.notna().all().all()

def test_the_module_alone_makes_dataloaders_for_tables():
    code = '''
from fastai_dropconnect.bulldozers.data import *
from fastai_dropconnect.bulldozers.synthetic import *
df = synthetic_bulldozers(100)
dls = bulldozers_dls(df)
from fastai_dropconnect.tabular.learner import tabular_learner
learn = tabular_learner(dls, layers=[5])
print(type(dls).__name__, learn.predict(price_features(df).iloc[3])[2].shape)
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert 'TabularDataLoaders torch.Size([1])' in out.stdout, out.stderr


@pytest.mark.parametrize('make', [bulldozers_pandas, bulldozers_dls])
def test_sales_without_prices_are_refused(make):
    with pytest.raises(DataError, match='`df` must have the column SalePrice'): make(synthetic_bulldozers(50).drop(columns='SalePrice'))


def test_a_path_is_no_frame():
    with pytest.raises(TypeError, match=r"`df` must be a frame from `read_bulldozers`, got df='Train.csv'"): bulldozers_pandas('Train.csv')
