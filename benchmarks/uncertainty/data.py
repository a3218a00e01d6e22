"Tables of the comparison, each split into rows to train, to calibrate and to test with"
from dataclasses import dataclass
import numpy as np, pandas as pd
from fastai_dropconnect.bulldozers.data import LOG_PRICE, feature_names, price_features, read_bulldozers
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from ..accuracy.tables import Options, _sample, adult, california, random_splits, time_splits

DAY = '_day'       # of a sale, for periods


@dataclass(frozen=True)
class Data:
    "A table in three parts, with the settings of its networks"
    name:str
    source:str         # Where it came from
    cats:list          # Names of the categorical columns
    conts:list         # Names of the continuous columns
    target:str
    parts:tuple        # Frames that train, calibrate, test
    epochs:int
    bs:int
    ple:bool           # Vectors for numbers, after `QuantileNormalize`?
    classes:bool=False # Are targets 0 and 1?

    @property
    def columns(self): return [*self.cats, *self.conts]
    def days(self, i): return self.parts[i][DAY] if DAY in self.parts[i] else None


def _columns(df, target):
    names = [c for c in df if c not in (target,DAY) and df[c].nunique(dropna=False)>1]
    cats = [c for c in names if not pd.api.types.is_numeric_dtype(df[c]) or df[c].dtype==bool]
    return cats,[c for c in names if c not in cats]

def _random(source, name, **settings):
    cats,conts = _columns(source.part(0), source.target)
    return Data(name, source.name, cats, conts, source.target, tuple(map(source.part, range(3))), **settings)

def _sales(o):
    sales = _sample(synthetic_bulldozers() if o.data is None else read_bulldozers(o.data), o)
    return sales.saledate,price_features(sales).assign(**{DAY: sales.saledate}),'synthetic' if o.data is None else 'auctions'

def _drift_splits(dates): # Train and calibrate before the last two fifths of the time, test from then on
    old = np.flatnonzero(dates < (pd.Timestamp('2010-01-01') if dates.max().year>2010 else dates.quantile(.6)))
    order = np.random.default_rng(0).permutation(old)
    cut = int(len(order)*.8)
    return np.sort(order[:cut]),np.sort(order[cut:]),np.setdiff1d(np.arange(len(dates)), old)

def _auctions(name, split):
    def make(o):
        dates,df,source = _sales(o)
        parts = tuple(df.iloc[np.asarray(rows)].reset_index(drop=True) for rows in split(dates, o))
        cats,conts = feature_names(parts[0].drop(columns=DAY))
        return Data(name, source, cats, conts, LOG_PRICE, parts, epochs=5, bs=128, ple=False)
    return make

TABLES = dict(
    california=lambda o: _random(california(o), 'california', epochs=20, bs=256, ple=True),
    auctions=_auctions('auctions', lambda dates, o: time_splits(dates)),
    auctions_random=_auctions('auctions_random', lambda dates, o: random_splits(len(dates), o.split_seed)),
    auctions_drift=_auctions('auctions_drift', lambda dates, o: _drift_splits(dates)),
    adult=lambda o: _random(adult(o), 'adult', epochs=5, bs=256, ple=True, classes=True))

def load(
    name:str, # One of `TABLES`
    options:Options
) -> Data:
    "Read a table"
    return TABLES[name](options)
