"InputGuard: rows unlike the training rows"
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, load_learner
from sklearn.metrics import roc_auc_score
from conftest import make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.tabular.guard import InputGuard

pytestmark = pytest.mark.filterwarnings('ignore')
CATS,CONTS = ['color','code','flag'],['a','b']
def loaders(df, procs=(InputGuard,Categorify,FillMissing,Normalize)):
    return TabularDataLoaders.from_df(df, procs=list(procs), cat_names=list(CATS), cont_names=list(CONTS), y_names='y', valid_idx=range(100, 120), bs=20)

@pytest.fixture(scope='module')
def table(): return make_table(120)

def changed(df, column, value): return df.assign(**{column: pd.Series([value]*len(df), df.index, dtype=object if isinstance(value, str) else None)})

@pytest.mark.parametrize('made', ['in procs','afterwards','afterwards from the frame'])
def test_unseen_levels_and_numbers_beyond_the_range(table, made):
    dls = loaders(table, (InputGuard,Categorify,FillMissing,Normalize)) if made=='in procs' else loaders(table, (Categorify,FillMissing,Normalize))
    if made!='in procs': dls.guard_inputs(table.iloc[:100] if 'frame' in made else None)
    guard,train = dls.input_guard,table.iloc[:100]
    assert guard.warnings(train).eq('').all()
    new = pd.concat([train, changed(train, 'color', 'never seen')])
    score = guard.check(new).new_levels
    assert roc_auc_score([0]*100+[1]*100, score)>=.99
    assert guard.check(changed(train, 'b', 1e6)).beyond_range.eq(1).all()
    assert guard.warnings(changed(train, 'b', -1e6)).str.startswith('b: -1e+06 is below').all()

def test_missing_is_not_unseen(table):
    df = table.assign(color=table.color.astype(object).where(np.arange(120)%3>0, None))
    guard = InputGuard().fit(df, CATS, CONTS)
    assert guard.check(df).to_numpy().sum()==0
    full = InputGuard().fit(df[df.color.notna()], CATS, CONTS)
    assert full.check(df).new_gaps.sum()==df.color.isna().sum() and full.check(df).new_levels.sum()==0

@pytest.mark.parametrize('dtype', ['object','category','string'])
def test_types_of_columns(dtype):
    df = pd.DataFrame(dict(c=pd.Series(['x','y','x'], dtype=dtype), n=pd.Series([1,2,3], dtype='Int64')))
    guard = InputGuard().fit(df, ['c'], ['n'])
    new = pd.DataFrame(dict(c=['x','z',None], n=[1.5,np.inf,np.nan]), index=[5,5,2])
    assert guard.check(new).to_numpy().tolist()==[[0,0,0],[1,1,0],[0,0,2]]
    assert guard.warnings(new).index.tolist()==[5,5,2]

def test_the_encoded_rows_are_the_same(table):
    a,b = loaders(table),loaders(table, (Categorify,FillMissing,Normalize))
    pd.testing.assert_frame_equal(a.train_ds.items, b.train_ds.items)
    pd.testing.assert_frame_equal(a.test_dl(table.copy()).items, b.test_dl(table.copy()).items)

def test_it_travels(table, tmp_path):
    learn = tabular_learner(loaders(table), layers=[5], path=tmp_path)
    new = changed(table.iloc[:3], 'color', 'never seen')
    want = learn.dls.input_guard.warnings(new).tolist()
    learn.export()
    assert load_learner(tmp_path/'export.pkl').dls.input_guard.warnings(new).tolist()==want
    save_model(learn, tmp_path/'model')
    loaded = load_model(tmp_path/'model')
    assert loaded.dls.input_guard.warnings(new).tolist()==want and all(want)
    row = table.iloc[0]
    with learn.no_bar(): assert torch.allclose(loaded.predict(row)[2], learn.predict(row)[2])
    learn.dls.guard_inputs(table.iloc[:100], n_neighbors=3)
    with pytest.raises(TypeError, match='n_neighbors=0'): save_model(learn, tmp_path/'model')

def test_predict_of_one_row_stays_fast(table):
    learn = tabular_learner(loaders(table), layers=[5])
    from fastai_dropconnect.tabular.predict import RowProcs
    procs = RowProcs(learn.dls)
    assert all(type(p).__name__ in ('InputGuard','Categorify','FillMissing','Normalize','RegressionSetup') for p in procs.procs)
    cats,conts = procs(table.iloc[3])
    dl = learn.dls.test_dl(table.iloc[3:4].copy())
    assert torch.equal(cats, dl.one_batch()[0]) and torch.allclose(conts, dl.one_batch()[1])

@pytest.mark.parametrize('kw,match', [(dict(n_neighbors=-1), 'n_neighbors=-1'), (dict(far=1.), 'far=1.0'), (dict(max_rows=1), 'max_rows=1')])
def test_arguments(kw, match):
    with pytest.raises(ValueError, match=match): InputGuard(**kw)
    with pytest.raises(ValueError, match='n_neighbors=0'): InputGuard().fit(pd.DataFrame(dict(a=[1.])), [], ['a']).distances(pd.DataFrame(dict(a=[1.])))

def test_neighbors_of_a_column_without_values():
    guard = InputGuard(n_neighbors=2).fit(pd.DataFrame(dict(a=[1.,2,3,4], b=[np.nan]*4)), [], ['a','b'])
    assert np.isfinite(guard.distances(pd.DataFrame(dict(a=[1.,np.nan], b=[np.nan,3.])))).all()

def test_a_category_whose_name_ends_like_a_flag(table):
    "`FillMissing` adds a_na for a column a, and nothing else that ends so"
    df = table.assign(shop_na=np.where(table.index%2, 'x', 'y'))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','shop_na'], cont_names=list(CONTS), y_names='y', valid_idx=range(100, 120), bs=20)
    learn,odd = tabular_learner(dls, layers=[5]),df[:2].assign(shop_na=['z','y'])
    for guard in (None,dls.guard_inputs,lambda: dls.guard_inputs(df[:100])):
        if guard is not None: guard()
        with learn.no_bar(): assert learn.predict_distribution(odd).warnings.tolist()==["shop_na: 'z' is new",'']

def test_too_many_neighbors_are_named(table):
    for n in (100, 500):
        with pytest.raises(ValueError, match=f'`n_neighbors` must be below the number of training rows .* 100, got n_neighbors={n}'): InputGuard(n_neighbors=n).fit(table[:100], CATS, CONTS)
    with pytest.raises(ValueError, match='columns of numbers, 0, got n_neighbors=3'): InputGuard(n_neighbors=3).fit(table, CATS, [])
    assert InputGuard(n_neighbors=99).fit(table[:100], CATS, CONTS).distances(table).shape==(120,)
