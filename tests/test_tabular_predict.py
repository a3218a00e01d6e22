"A row is predicted as fastai predicts it, bit for bit, or by fastai"
import pickle, warnings
from copy import deepcopy
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular import learner as fastai_tabular
from fastai.tabular.all import (Callback, Categorify, FillMissing, Normalize, RegressionBlock, TabularPandas, TabularProc, load_learner,
                                set_seed)
from fastai_dropconnect.all import *
from fastai_dropconnect.tabular.predict import DecodedRow, FastPredict, RowProcs, Unknown
from conftest import make_dls, make_table

warnings.filterwarnings('ignore', message='The given NumPy array is not writable')

def pandas_of(df, procs, reduce_memory=True, y_block=RegressionBlock):
    procs = [p() for p in procs]
    splits = list(range(100)),list(range(100, 120))
    return TabularPandas(df.head(120), procs, ['color','code','flag'], ['a','b'], 'y', y_block(), splits, reduce_memory=reduce_memory)

def by_fastai(dls, row):
    dl = dls.test_dl(row.to_frame().T)
    dl.dataset.conts = dl.dataset.conts.astype(np.float32)
    return dl.one_batch()

def as_numbers(df): return df.assign(color=df.index%3, flag=df.index%2).astype('float64')

TABLES = dict(plain=lambda df: df, objects=lambda df: df.astype(object), float32=lambda df: df.astype(dict(a='float32', b='float32')),
              category=lambda df: df.assign(color=df.color.astype('category')), far=lambda df: df.assign(a=1e8*df.a, b=1e-6*df.b+3),
              more=lambda df: df.assign(when=pd.Timestamp('2020-01-01')), numbers=as_numbers, numbers32=lambda df: as_numbers(df).astype('float32'))
PROCS = dict(fastai=[Categorify,FillMissing,Normalize], raw=[Categorify,FillMissing], no_flags=[Categorify,partial(FillMissing, add_col=False),Normalize],
             ranks=[Categorify,FillMissingAnywhere,QuantileNormalize])

@pytest.mark.parametrize('procs', PROCS)
@pytest.mark.parametrize('train', ['plain','numbers32'])
def test_rows_are_encoded_bit_for_bit(procs, train):
    df = make_table(120)
    dls = pandas_of(TABLES[train](df), PROCS[procs], reduce_memory=train!='plain').dataloaders(bs=32, device='cpu')
    encode = RowProcs(dls)
    for change in TABLES.values():
        for _,row in change(df.drop(columns='y')).iloc[2:4].iterrows():      # row 3 has gaps
            for a,b in zip(encode(row), by_fastai(dls, row), strict=True):
                assert a.dtype==b.dtype
                torch.testing.assert_close(a, torch.Tensor(b) if b.is_floating_point() else b, atol=0, rtol=0, equal_nan=True)


ODD = [dict(color='new'), dict(code=99), dict(code=3.0), dict(code='3'), dict(flag=1), dict(flag='True'), dict(color=2), dict(color=pd.NA),
       dict(code=np.int8(2)), dict(code=True), dict(a=None), dict(a=np.float32(.1)), dict(a=10**17+1), dict(a=np.int64(3)), dict(b=np.float64(.1))]

@pytest.mark.parametrize('odd', ODD)
def test_odd_values(odd):
    dls = pandas_of(make_table(120), PROCS['fastai']).dataloaders(bs=32, device='cpu')
    encode,row = RowProcs(dls),make_table().drop(columns='y').iloc[1].copy()
    for k,v in odd.items(): row[k] = v
    for _ in range(2):
        for a,b in zip(encode(row), by_fastai(dls, row), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('odd', [dict(a='x'), dict(b=None), dict(color=[1])])
def test_what_fastai_refuses_is_left_to_fastai(odd):
    dls = pandas_of(make_table(120), PROCS['fastai']).dataloaders(bs=32, device='cpu')
    row = make_table().drop(columns='y').iloc[1].copy()
    for k,v in odd.items(): row.at[k] = v
    with pytest.raises(Unknown): RowProcs(dls)(row)
    learn = learner().accelerate()
    with pytest.raises(Exception) as ours: learn.predict(row)
    with pytest.raises(type(ours.value)): learn.decelerate().predict(row)


def learner(y='y', df=None, n=1, **kwargs):
    set_seed(0)
    learn = tabular_learner(make_dls(df, y), layers=[20,10], **kwargs)
    with learn.no_bar(),learn.no_logging(): learn.fit(n)
    return learn

def assert_same(got, want):
    pd.testing.assert_frame_equal(got[0].items, want[0].items)
    assert type(got[0]) is TabularPandas and got[0].y_names == want[0].y_names
    for a,b in zip(got[1:], want[1:], strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(a, b, atol=0, rtol=0)

class Doubles(Callback):
    def after_pred(self): self.learn.pred = 2*self.pred

LEARNERS = dict(plain=dict(), callback=dict(cbs=Doubles), frozen=dict(cbs=lambda: FrozenZeroInit(.5)), restarts=dict(),
                members=dict(config=lambda: tabular_dropconnect_config(members=3)), classes=dict(df=lambda: make_table().assign(y=lambda d: d.y>.5).astype(dict(y=str))), range=dict(y_range=(0,2)))

@pytest.mark.parametrize('name', LEARNERS)
def test_predictions_are_those_of_fastai(name):
    learn = learner(**{k: v() if callable(v) else v for k,v in LEARNERS[name].items()})
    if name=='restarts':
        with learn.no_bar(),learn.no_logging(): learn.fit_zero_restarts(2, 1, 1e-2, seed=1)
    rows = [r for _,r in make_table(6).iterrows()]
    want = [learn.predict(r) for r in rows]
    learn.accelerate()
    learn.model.train()
    for r,w in zip(rows, want):
        assert_same(learn.predict(r), w)
        assert_same(learn.predict(r.to_dict()), w)
    assert not learn.model.training and isinstance(vars(learn)['predict'], FastPredict)
    assert_same(learn.decelerate().predict(rows[0]), want[0])
    assert 'predict' not in vars(learn)
    assert_same(learn.predict(rows[0].to_dict()), want[0])


def test_learners_of_fastai():
    learn = fastai_tabular.tabular_learner(make_dls(), layers=[8])
    row = make_table(3).iloc[0].drop('y')
    with learn.no_bar(): want = learn.predict(row)
    assert_same(learn.accelerate().predict(row), want)
    class Mine(fastai_tabular.TabularLearner):
        def predict(self, row): return 'mine'
    mine = Mine(make_dls(), learn.model).accelerate()
    assert mine.predict(row) == 'mine' and mine.decelerate().predict(row) == 'mine'


def test_other_loaders_and_procs_are_left_to_fastai():
    class Adds(TabularProc):
        def encodes(self, to): to['b'] = to['b']+1
    assert not RowProcs(pandas_of(make_table(120), [Categorify,FillMissing,Adds]).dataloaders(bs=32)).is_exact
    learn = learner().accelerate()
    row = make_table(3).iloc[0]
    before = learn.predict(row)[2]
    learn.dls = make_dls(make_table(seed=1))            # other means: the encoder follows
    after = learn.predict(row)[2]
    learn.decelerate()
    assert not torch.equal(before, after) and torch.equal(after, learn.predict(row)[2])


def test_answers_of_pandas_are_kept_up_to_a_limit(monkeypatch):
    encode = RowProcs(make_dls())
    row = make_table(3).iloc[0].drop('y').copy()
    code = encode(row) and encode.codes['code']
    monkeypatch.setattr(code, 'most', 3)
    for i in range(10):
        row['code'] = i+.5
        encode(row)
    assert 0 < len(code.answers) <= 3


def test_copies_and_exports(tmp_path):
    learn = learner(path=tmp_path).accelerate()
    row = make_table(3).iloc[0]
    want = learn.predict(row)
    for twin in (deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        assert vars(twin)['predict'].learn is twin
        assert_same(twin.predict(row), want)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(again.predict(row)[2], want[2])


def test_the_decoded_row_waits():
    learn = learner().accelerate()
    seen = learn.predict(make_table(3).iloc[0])[0]
    assert type(seen) is DecodedRow and isinstance(seen, TabularPandas) and len(seen) == 1
    assert type(seen) is TabularPandas and list(seen.items.columns) == ['color','code','flag','a_na','a','b','y']
