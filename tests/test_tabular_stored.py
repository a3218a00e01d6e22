"Tables in files: what is encoded and trained is what TabularPandas gives, for every kind of column and split"
import json, pickle
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
pa = pytest.importorskip('pyarrow', reason='pyarrow reads Parquet and Arrow files')
import pyarrow.dataset, pyarrow.feather, pyarrow.parquet as pq # noqa: F401
from fastai.learner import load_learner
from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, FillStrategy, MultiCategoryBlock, Normalize, RegressionBlock, TabDataLoader,
                                TabularPandas, add_datepart, rmse, set_seed)
from hypothesis import given, settings, strategies as st
from fastai_dropconnect.all import *
from fastai_dropconnect.tabular.fitting import medians
from fastai_dropconnect.tabular.stored import shuffled_pieces
from conftest import make_table

pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')
PROCS = [Categorify,FillMissing,Normalize]
NAMES = dict(cat_names=['color','code','flag','size'], cont_names=['a','b','count'], y_names='y')


def table(n=300):
    "Text, whole numbers, flags, an ordered category, gaps in categories and numbers, a date"
    r = np.random.default_rng(3)
    return make_table(n).assign(size=pd.Categorical(r.choice(['s','m','l'], n), categories=['s','m','l','xl'], ordered=True),
                                count=r.integers(-5, 5, n), day=pd.date_range('2024-01-01', periods=n), kind=r.choice(['low','high'], n))

def save(df, path, rows=64):
    "Write a Parquet file of several row groups"
    pq.write_table(pa.Table.from_pandas(df, preserve_index=False), path, row_group_size=rows)
    return path

@pytest.fixture
def file(tmp_path): return save(table(), tmp_path/'table.parquet')

def in_memory(df, n_train, procs=PROCS, y_block=None, **names):
    names = {**NAMES, **names}
    names = {k: list(v) if isinstance(v, list) else v for k,v in names.items()}
    return TabularPandas(df, procs, y_block=y_block, splits=(list(range(n_train)),list(range(n_train,len(df)))), reduce_memory=False, **names)

def stored(path, n_train, n, procs=PROCS, **kwargs):
    return store_table(path, procs=procs, valid=list(range(n_train, n)), **{**NAMES, 'piece': 50, **kwargs})

def same(ours, theirs):
    assert list(ours.x_names)==list(theirs.x_names)
    assert (ours.cats.to_numpy()==theirs.cats.to_numpy()).all()
    np.testing.assert_allclose(ours.conts.to_numpy(), theirs.conts.to_numpy(float), rtol=1e-5, atol=1e-6)
    y = theirs.ys.to_numpy()
    assert np.array_equal(ours.ys.to_numpy(), y.astype('float32') if y.dtype.kind=='f' else y)


@pytest.mark.parametrize('procs', [PROCS, [Categorify,FillMissingAnywhere,Normalize], [Categorify,FillMissing,QuantileNormalize],
                                   [Categorify,FillMissing(FillStrategy.constant, add_col=False, fill_vals=dict(a=7.)),Normalize()],
                                   [Categorify,FillMissing], [Categorify,Normalize], [Categorify]])
def test_encoded_as_in_memory(file, procs):
    df = table()
    ours,to = stored(file, 200, 300, procs),in_memory(df, 200, deepcopy(procs))
    for a,b in zip(ours, (to.train,to.valid)): same(a, b)
    assert ours[0].classes==to.classes
    for name in ('means','stds','na_dict'):
        if hasattr(to, name): assert list(getattr(ours[0], name).values())==pytest.approx(list(getattr(to, name).values()), rel=1e-6)
    new = df[:40].drop(columns='y')
    one,other = ours[0].new(new),to.new(new)
    one.process(), other.process()
    assert (one.cats.to_numpy()==other.cats.to_numpy()).all()


@pytest.mark.parametrize('target', [dict(y_names='kind', cat_names=['color']), dict(y_names=['a2','b'], cont_names=['count'], y_block=RegressionBlock()),
                                    dict(y_names='flag', cat_names=['color'], y_block=CategoryBlock), dict(y_names='count', cont_names=['b']),
                                    dict(y_names='size', cat_names=['color'], y_block=CategoryBlock()), dict(y_names='code', cat_names=[], y_block=CategoryBlock()),
                                    dict(y_names=['flag','other'], cat_names=['color'], y_block=MultiCategoryBlock(encoded=True, vocab=['flag','other']))])
def test_targets(tmp_path, target):
    df = table().assign(a2=lambda d: d.b*2, other=lambda d: ~d.flag)
    ours,to = stored(save(df, tmp_path/'t.parquet'), 200, 300, **target),in_memory(df, 200, **deepcopy(target))
    for a,b in zip(ours, (to.train,to.valid)): same(a, b)
    assert ours[0].c==to.c and type(ours[0].loss_func)==type(to.loss_func) and getattr(ours[0], 'vocab', 0)==getattr(to, 'vocab', 0)


def test_several_files_with_other_orders_types_and_empty_groups(tmp_path):
    df = table()
    df['code'] = df.code.astype('Int64').mask(df.index%13==5)
    save(df[:90], tmp_path/'1.parquet')
    save(df[:0], tmp_path/'2.parquet')
    save(df.iloc[90:300, ::-1], tmp_path/'3.pq')
    plain = df.assign(code=df.code.astype(float))
    for path in (tmp_path, str(tmp_path/'*.p*'), [tmp_path/'1.parquet', tmp_path/'3.pq']):
        for a,b in zip(stored(path, 200, 300, folder=tmp_path/'out'), (in_memory(plain, 200).train, in_memory(plain, 200).valid)): same(a, b)

def test_arrow_files_and_tables_in_memory(tmp_path):
    df = table()
    pa.feather.write_feather(df, tmp_path/'t.feather', chunksize=70)
    same(stored(tmp_path/'t.feather', 200, 300)[0], in_memory(df, 200).train)
    dataset = pa.dataset.dataset(pa.Table.from_pandas(df))
    same(stored(dataset, 200, 300, folder=tmp_path/'out')[0], in_memory(df, 200).train)
    with pytest.raises(ValueError, match='`folder` must be given'): stored(dataset, 200, 300)

def test_columns_of_other_types(tmp_path):
    df = table()
    t = pa.Table.from_pandas(df, preserve_index=False)
    t = t.set_column(t.column_names.index('b'), 'b', t['b'].cast(pa.float32())).append_column('price', t['count'].cast(pa.decimal128(21, 2)))
    t = t.append_column('half', pa.array([None if i%5==0 else i%3==0 for i in range(300)])).append_column('none', pa.nulls(300))
    pq.write_table(t, tmp_path/'t.parquet', row_group_size=64)
    train,_ = stored(tmp_path/'t.parquet', 200, 300, cat_names=['half','none'], cont_names=['b','price','flag'])
    assert train.classes['half']==['#na#',False,True] and train.classes['none']==['#na#']
    assert train.cats.to_numpy()[:4].tolist()==[[0,0],[1,0],[1,0],[2,0]]
    np.testing.assert_allclose(train.conts.std(ddof=0), 1, atol=1e-5)

def test_unseen_categories_become_missing(tmp_path):
    df = table()
    df['color'] = df.color.mask(df.index==250, 'pink')
    _,valid = stored(save(df, tmp_path/'t.parquet'), 200, 300)
    assert valid.cats.iloc[50].color==0 and 'pink' not in valid.classes['color']

def test_gaps_that_training_rows_do_not_have(tmp_path):
    df = table()
    df.loc[250, 'b'] = np.nan
    with pytest.raises(DataError, match='nan values in `b`.*FillMissingAnywhere'): stored(save(df, tmp_path/'t.parquet'), 200, 300)
    assert not [f for f in tmp_path.iterdir() if f.name!='t.parquet']           # nothing half done
    _,valid = stored(tmp_path/'t.parquet', 200, 300, [Categorify,FillMissingAnywhere,Normalize])
    assert np.isfinite(valid.conts.to_numpy()).all()

def test_dates(tmp_path):
    df = table()
    parts = add_datepart(df.copy().astype(dict(day='datetime64[ns]')), 'day')
    names = dict(cat_names=['color','dayDayofweek','dayIs_month_end'], cont_names=['b','dayElapsed'])
    ours = stored(save(df, tmp_path/'t.parquet'), 200, 300, date_names=['day'], **names)
    same(ours[1], in_memory(parts, 200, **names).valid)
    with pytest.raises(DataError, match='column day: dates are no numbers'): stored(tmp_path/'t.parquet', 200, 300, cont_names=['day'], folder=tmp_path/'o')


def change(col, value, rows):
    def f(df):
        df = df.astype({col: object})
        df.loc[rows, col] = value
        return df.astype({col: float})
    return f

@pytest.mark.parametrize('changed,kwargs,error', [
    (change('y', None, [7,290]), {}, 'table.parquet: column y: no target in 2 of 300 rows: 7, 290'),
    (change('b', np.inf, [70]), {}, 'column b: infinite values in 1 of 300 rows: 70'),
    (change('a', None, range(200)), {}, 'column a: no training row has a value'),
    (lambda d: d, dict(cont_names=['b','c']), "table.parquet: no column 'c'; it has color, code"),
    (lambda d: d, dict(cat_names=[], cont_names=['b','color']), 'column color: must be numbers, got'),
    (lambda d: d, dict(valid=list(range(300))), 'all of its 300 rows validate'),
    (lambda d: d[:0], dict(valid=.5), 'no rows'),
    (lambda d: d.assign(kind=np.where(d.index<200, 'a', 'b')), dict(y_names='kind'), "column kind: 'b' is no class of the training rows")])
def test_data_that_cannot_be_used(tmp_path, changed, kwargs, error):
    path = save(changed(table()), tmp_path/'table.parquet')
    with pytest.raises(DataError, match=error): store_table(path, **{**NAMES, 'procs': PROCS, 'valid': list(range(200,300)), **kwargs})

@pytest.mark.parametrize('kwargs,error', [(dict(cat_names=['y']), "got 'y' twice"), (dict(valid=[300]), '`valid` must hold positions from 0 to 299'),
                                          (dict(valid=0), '`valid` must be a positive number'), (dict(piece=0), 'piece=0'), (dict(bs=0), 'bs=0'),
                                          (dict(rank=2, world_size=2), 'rank=2'), (dict(buffer=0), 'buffer=0'),
                                          (dict(procs=[Categorify,FillMissing(FillStrategy.mode)]), 'fill_strategy=mode'), (dict(procs=[]), 'must have Categorify')])
def test_wrong_arguments(file, kwargs, error):
    with pytest.raises(ValueError, match=error): stored_dataloaders(file, **{**NAMES, 'procs': PROCS, **kwargs})

def test_without_pyarrow(file, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'pyarrow.dataset', None)
    with pytest.raises(ImportError, match='pip install pyarrow'): store_table(file, procs=PROCS, **NAMES)


# --- the folder

def test_the_folder_is_used_again_only_if_nothing_has_changed(file, tmp_path):
    folder = tmp_path/'table.parquet.stored'
    def when(): return (folder/'train_cats.npy').stat().st_mtime_ns
    first = stored(file, 200, 300)[0]
    made = when()
    again = stored(file, 200, 300)[0]
    assert when()==made and again.classes==first.classes and (again.means,again.stds,again.na_dict)==(first.means,first.stds,first.na_dict)
    for kwargs in (dict(n_train=199), dict(procs=[Categorify,FillMissing(add_col=False)]), dict(cont_names=['b'])):
        stored(file, **{**dict(n_train=200, n=300), **kwargs})
        assert when()!=made
        made = when()
    save(table().assign(b=1.), file)
    stored(file, 200, 300, cont_names=['b'])
    assert when()!=made

@pytest.mark.parametrize('proc', [QuantileNormalize, FillMissingAnywhere])
def test_procs_that_are_read_back_encode_the_same(file, proc):
    df = table()[:20]
    def encoded():
        new = stored(file, 200, 300, [Categorify,FillMissing,proc] if proc is QuantileNormalize else [Categorify,proc])[0].new(df)
        new.process()
        return new.items
    pd.testing.assert_frame_equal(encoded(), encoded())

def test_a_damaged_or_unfinished_folder_is_made_anew(file, tmp_path):
    folder = tmp_path/'table.parquet.stored'
    stored(file, 200, 300)
    size = (folder/'train_conts.npy').stat().st_size
    with open(folder/'train_conts.npy', 'ab') as f: f.write(b'x')
    same(stored(file, 200, 300)[0], in_memory(table(), 200).train)
    assert (folder/'train_conts.npy').stat().st_size==size
    text = (folder/'manifest.json').read_text()
    (folder/'manifest.json').write_text(json.dumps(json.loads(text) | dict(files={'../../evil': 1})))
    with pytest.raises(ValueError, match='`folder` must be new'): stored(file, 200, 300)
    assert (folder/'train_cats.npy').exists()

def test_foreign_folders_are_left_alone(file, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='`folder` must be new'): stored(file, 200, 300, folder=tmp_path/'mine')
    assert [f.name for f in (tmp_path/'mine').iterdir()]==['thesis.txt']

def test_a_full_disk_is_noticed_before_writing(file, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OSError, match='but 9 are free'): stored(file, 200, 300)
    assert list(file.parent.iterdir())==[file]


# --- loaders and training

def loaders(file, **kwargs): return stored_dataloaders(file, **{**NAMES, **dict(procs=PROCS, valid=list(range(200,300)), bs=16, device='cpu'), **kwargs})

def rows(dl): return torch.cat([b[-1] for b in dl]).flatten()

def losses(dls, learner=tabular_learner, **kwargs):
    set_seed(0)
    learn = learner(dls, layers=[20,10], metrics=rmse, **kwargs)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return torch.stack(learn.recorder.losses),learn

def test_losses_are_those_of_a_table_in_memory(file):
    both = loaders(file),fast_dataloaders(in_memory(table(), 200), bs=16, device='cpu')
    for dls in both: dls.loaders[0] = dls.train.new(shuffle=False, drop_last=False, bs=16)
    (a,one),(b,other) = map(losses, both)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert list(one.recorder.values[-1])==pytest.approx(list(other.recorder.values[-1]), rel=1e-3)

@pytest.mark.parametrize('buffer,block', [(1000,1000), (64,16), (10,3), (1,1)])
def test_each_row_once_in_an_order_that_the_seed_gives(file, buffer, block):
    dls = loaders(file, buffer=buffer, block=block, drop_last=False)
    want = torch.tensor(table().y[:200].to_numpy())
    set_seed(1); a = rows(dls.train)
    set_seed(1); b = rows(dls.train)
    c = rows(dls.train)
    assert torch.equal(a, b) and not torch.equal(a, c)
    for got in (a, c): assert torch.equal(got.sort()[0], want.sort()[0])
    assert [len(x[0]) for x in dls.train]==[16]*12+[8] and len(dls.train)==13
    assert [len(x[0]) for x in dls.train.new(drop_last=True)]==[16]*12
    assert sorted(dls.train.get_idxs())==list(range(200))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 120), st.integers(0, 99))
def test_pieces_are_a_permutation(n, block, buffer, seed):
    pieces = list(shuffled_pieces(n, block, buffer, seed))
    assert sorted(i for p in pieces for i in p.tolist())==list(range(n))
    assert all(len(p)<=max(buffer, block) for p in pieces)

def test_every_row_may_come_anywhere():
    # the place of row 0 among 96 rows, in quarters: chi-square with 3 degrees of freedom, 16.3 at p=0.001
    places = [int((torch.cat(list(shuffled_pieces(96, 4, 24, s)))==0).nonzero()) for s in range(400)]
    found = np.bincount(np.array(places)//24, minlength=4)
    assert ((found-100)**2/100).sum() < 16.3

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(1, 7))
def test_medians_are_exact(values, size):
    x = np.array(values)[:,None]
    with np.errstate(over='ignore'): want = np.median(x)
    with np.errstate(over='ignore'): got = medians(lambda: (x[i:i+size] for i in range(0, len(x), size)), np.array([len(x)]))[0]
    assert got==want

def test_parts_of_a_distributed_run(file):
    kwargs = dict(drop_last=False, valid=list(range(201,300)))
    parts = [loaders(file, rank=r, world_size=2, **kwargs) for r in range(2)]
    assert [len(rows(p.train)) for p in parts]==[100,100] and [len(p.train) for p in parts]==[7,7]
    assert len(torch.cat([rows(p.train) for p in parts]).unique())==200
    assert torch.equal(torch.cat([rows(p.valid) for p in parts]), torch.tensor(table().y[201:].to_numpy()))
    whole = loaders(file, **kwargs).train
    assert torch.equal(rows(whole.new(rank=1, world_size=2)).sort()[0], rows(parts[1].train).sort()[0])
    with pytest.raises(ValueError, match='`wgts` must be None'): whole.new(rank=1, world_size=2, wgts=np.ones(201))

def test_what_a_user_does_with_loaders(file, tmp_path, capsys):
    dls,df = loaders(file),table()
    dls.show_batch(max_n=2)
    dls.train.show_batch(unique=True, max_n=2)
    assert len(rows(dls.train).unique())>150
    _,learn = losses(dls, config=tabular_dropconnect_config(weight_p=.1, mode='example'), fast=True)
    assert type(learn.dls.train) is StoredTabDL and learn.recorder.values[-1][-1] < df.y.std()*1.2
    with learn.no_bar():
        preds = learn.get_preds(dl=learn.dls.test_dl(df[:30].drop(columns='y')))[0]
        assert torch.allclose(preds, learn.get_preds(dl=dls.train.new(shuffle=False, drop_last=False))[0][:30], atol=1e-6)
        assert learn.predict(df.iloc[4])[2]==pytest.approx(preds[4], abs=1e-5)
        assert len(learn.get_preds()[0])==100 and len(learn.validate())==2
        learn.show_results(max_n=2)
    learn.export(tmp_path/'e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    with loaded.no_bar(): assert torch.equal(loaded.get_preds(dl=loaded.dls.test_dl(df[:30]))[0], preds)
    assert (tmp_path/'e.pkl').stat().st_size < 10**6

def test_test_loaders_are_those_of_a_table_in_memory(file):
    dls,df = loaders(file),table()
    theirs = in_memory(df, 200).dataloaders(bs=16, device='cpu')
    for part in (df[:0], df[:1], df[:50], df[:50].drop(columns='y')):
        for a,b in zip(dls.test_dl(part, bs=16), theirs.test_dl(part, bs=16), strict=True):
            for x,y in zip(a, b, strict=True): torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)

def test_fastais_own_loader_and_hooks_work_on_a_stored_table(file):
    dls = loaders(file)
    slow = dls.train.new(cls=TabDataLoader, shuffle=False, drop_last=False, bs=50)
    for a,b in zip(slow, dls.train.new(shuffle=False, drop_last=False, bs=50), strict=True):
        for x,y in zip(a, b, strict=True): assert torch.equal(x, y) and x.dtype==y.dtype
    with pytest.warns(UserWarning, match='`before_iter`'): assert len(rows(dls.train.new(before_iter=lambda: None, drop_last=False)))==200
    w = np.arange(200.)
    drawn = rows(dls.train.new(wgts=w, drop_last=False))
    assert len(drawn)==200 and table().y[0] not in drawn
    assert len(rows(dls.train.new(n=20, drop_last=False)))==20
    given = dls.train.new(get_idxs=lambda: [9,3,9,150,0], drop_last=False)
    assert rows(given).tolist()==table().y[[9,3,9,150,0]].tolist()

@pytest.mark.parametrize('copied', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_map_the_same_files(file, copied):
    dls = loaders(file)
    twin = copied(dls)
    assert torch.equal(rows(twin.valid), rows(dls.valid)) and twin.train_ds.arrays['cats'].filename==dls.train_ds.arrays['cats'].filename
    assert len(pickle.dumps(dls)) < 200_000

def test_validation_rows_from_another_file_or_none(file, tmp_path):
    other = save(table(90)[40:], tmp_path/'later.parquet')
    dls = loaders(file, valid=other)
    assert [dls.train.n,dls.valid.n]==[300,50] and dls.classes==in_memory(table(), 300).classes
    assert loaders(file, valid=[], folder=tmp_path/'o').valid.n==0

def test_a_table_of_conts_or_of_cats_alone(file, tmp_path):
    for names in (dict(cat_names=[], cont_names=['b','count']), dict(cont_names=[]), dict(y_names=[])):
        dls = loaders(file, folder=tmp_path/'o', **names)
        assert dls.one_batch()[0].shape[1]==len(dls.cat_names) and dls.one_batch()[1].shape[1]==len(dls.cont_names)

def test_vectors_for_numbers_find_their_bins(file):
    losses(loaders(file), config=tabular_dropconnect_config(num_embeddings='ple'))
