import os, torch
os.environ.setdefault('MPLBACKEND', 'Agg')
torch.set_num_threads(1)     # small models: two threads on a busy machine wait for each other
import numpy as np, pandas as pd, pytest
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, set_seed


def make_table(n=600, seed=0):
    "A table of mixed types with gaps, and a target that depends on it"
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(color=r.choice(['red','green','blue'], n), code=r.integers(0, 6, n), flag=r.random(n)>.5,
                           a=r.normal(size=n), b=r.normal(size=n)))
    df['y'] = (df.a*df.b + (df.color=='red') + .1*df.code + r.normal(0, .1, n)).astype('float32')
    df.loc[df.index%7==3, 'a'] = np.nan
    df.loc[df.index%11==3, 'color'] = None
    return df


def make_dls(df=None, target='y', bs=32):
    df = make_table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code','flag'], cont_names=['a','b'],
                                      y_names=target, valid_idx=list(range(len(df)*4//5, len(df))), bs=bs)


@pytest.fixture
def dls(): 
    set_seed(0)
    return make_dls()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
