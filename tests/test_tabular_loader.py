"FastTabDL gives fastai's batches for every kind of table, loader and option"
import pickle
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, MultiCategoryBlock, Normalize, RegressionBlock, TabDataLoader,
                                TabularPandas, Transform, set_seed)
from fastai.tabular.core import ReadTabBatch, TabWeightedDL
from fastai_dropconnect.accelerate import fast_loaders
from fastai_dropconnect.tabular.loader import FastTabDL, fast_dataloaders, why_slow
from conftest import make_table

pytestmark = pytest.mark.filterwarnings('error:fastai makes the batches')

TARGETS = dict(
    regression=dict(y_names='y'), several=dict(y_names=['y','z'], y_block=RegressionBlock(n_out=2)),
    category=dict(y_names='kind', y_block=CategoryBlock()), flag=dict(y_names='flag', y_block=CategoryBlock()),
    multi=dict(y_names=['is_a','is_b'], y_block=MultiCategoryBlock(encoded=True, vocab=['is_a','is_b'])),
    none=dict(), whole_numbers=dict(y_names='count'))
COLUMNS = dict(both=(['color','code'], ['a','b']), cats=(['color','code'], []), conts=([], ['a','b']), one_cat=(['color'], []),
               one_cont=([], ['a']))

def table(n=150):
    df = make_table(n)
    df['flag'] = df.flag.map({True: 'yes', False: 'no'})
    return df.assign(z=-df.y, kind=np.where(df.y>0, 'high', 'low'), is_a=df.y>0, is_b=df.y<.5, count=np.arange(n)%9)

def pandas_of(df=None, target='regression', columns='both', n_valid=40):
    df = table() if df is None else df
    cats,conts = COLUMNS[columns]
    splits = list(range(len(df)-n_valid)),list(range(len(df)-n_valid, len(df)))
    return TabularPandas(df, [Categorify,FillMissing,Normalize] if conts else [Categorify], list(cats), list(conts), splits=splits,
                         **TARGETS[target])

def same_batches(ones, others):
    for one,other in zip(list(ones), list(others), strict=True):
        assert type(one) is type(other)
        for a,b in zip(one, other, strict=True):
            assert type(a) is type(b) and a.dtype==b.dtype and a.shape==b.shape and torch.equal(a, b)

def both(to, **kwargs): return FastTabDL(to, **kwargs),TabDataLoader(to, **kwargs)

def rows(dl): return torch.cat([b[-1] for b in dl]).flatten()


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('columns', COLUMNS)
def test_batches_are_those_of_fastai(target, columns):
    to = pandas_of(target=target, columns=columns)
    for part in (to.train, to.valid): same_batches(*both(part, bs=32, device='cpu'))
    fast,slow = both(to.train, bs=32, device='cpu')
    assert fast.n_inp == slow.n_inp


@pytest.mark.parametrize('n', [0,1,2,31,32,33,64])
@pytest.mark.parametrize('drop_last', [False,True])
@pytest.mark.parametrize('bs', [1,32,100])
def test_any_number_of_rows(n, drop_last, bs):
    to = pandas_of()
    fast,slow = both(to.train.new(to.train.items[:n]), bs=bs, drop_last=drop_last, device='cpu')
    same_batches(fast, slow)
    assert len(list(fast)) == len(fast) == len(slow)


@pytest.mark.parametrize('by_rows', [True,False])
def test_layout_of_a_frame_made_from_one_array(by_rows):
    x = np.random.default_rng(0).random((90, 5)).astype('float32')
    df = pd.DataFrame(x if by_rows else np.asfortranarray(x), columns=list('abcde'))
    to = TabularPandas(df, cont_names=list('abcd'), y_names='e', splits=(list(range(60)),list(range(60,90))), reduce_memory=False)
    fast,slow = both(to.train, bs=32, device='cpu')
    same_batches(fast, slow)
    for (_,a,_),(_,b,_) in zip(fast, slow): assert (a.stride(1)==1) == (b.stride(1)==1)


def test_weighted_draws_are_those_of_fastai():
    to,wgts = pandas_of(),np.arange(110.)
    fast,slow = FastTabDL(to.train, bs=16, shuffle=True, wgts=wgts),TabWeightedDL(to.train, bs=16, shuffle=True, wgts=wgts)
    for seed in (0,1):
        set_seed(seed); a = list(fast)
        set_seed(seed); b = list(slow)
        same_batches(a, b)
    assert to.train.items.y.iloc[0] not in rows(fast)           # its weight is 0
    same_batches(fast.new(shuffle=False, bs=16), TabDataLoader(to.train, bs=16))


def test_each_row_once_in_an_order_that_the_seed_gives():
    to = pandas_of()
    dl = FastTabDL(to.train, bs=16, shuffle=True, device='cpu')
    want = torch.tensor(to.train.items.y.to_numpy())
    first,second = rows(dl),rows(dl)
    assert not torch.equal(first, second) and torch.equal(first.sort()[0], want.sort()[0])
    set_seed(5); a = rows(dl)
    set_seed(5); b = rows(dl)               # the same loader, later
    set_seed(5); c = rows(dl.new())
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize('part', ['train','valid'])
def test_what_is_drawn_afterwards_is_the_same_as_with_fastai(part):
    to,wgts = getattr(pandas_of(), part),dict(shuffle=True) if part=='train' else {}
    after = []
    for cls in (FastTabDL,TabWeightedDL):
        dl = cls(to, bs=16, wgts=np.ones(len(to)), **wgts)
        set_seed(2)
        list(dl)
        after.append((torch.rand(1), np.random.rand()))
    assert after[0] == after[1]


def test_n_get_idxs_and_shuffle_fn_choose_the_rows():
    to = pandas_of()
    for kwargs in (dict(n=10), dict(n=10, drop_last=True), dict(get_idxs=lambda: [5,5,2]), dict(get_idxs=lambda: iter(range(7, 50))),
                   dict(shuffle=True, shuffle_fn=lambda idxs, *_: idxs[::-1])):
        same_batches(*both(to.train, bs=8, device='cpu', **kwargs))
    assert FastTabDL(to.train, bs=8, n=10, shuffle=True, wgts=np.arange(110.)).get_idxs().shape == (10,)


@pytest.mark.parametrize('unique', [True,False])
def test_show_batch_leaves_no_trace(unique, capsys):
    dl = FastTabDL(pandas_of().train, bs=16, shuffle=True)
    dl.show_batch(unique=unique, max_n=2)
    assert why_slow(dl) == '' and len(rows(dl).unique()) > 100
    b = dl.one_batch()
    assert [t.shape for t in b] == [(16,3),(16,2),(16,1)]
    dl.show_batch(b, max_n=1)


def test_hooks_and_subclasses_are_left_to_fastai():
    to,calls = pandas_of(),[]
    class Doubled(FastTabDL):
        def create_batch(self, b): return super().create_batch([*b, *b])
    class Shifted(ReadTabBatch):
        def encodes(self, to): return tuple(t+1 for t in super().encodes(to))
    hooked = [(FastTabDL(to.train, bs=8, before_iter=lambda *_: calls.append(1)), '`before_iter`'), (Doubled(to.train, bs=8), '`create_batch`'),
              (FastTabDL(to.train, bs=8, after_batch=[Shifted(to)]), 'Shifted'), (FastTabDL(to.train, bs=None), 'bs=None'),
              (FastTabDL(to.train, bs=8, after_item=lambda o: o), '`after_item`')]
    for dl,why in hooked[:3]:
        with pytest.warns(UserWarning, match=why): n = sum(len(b[0]) for b in dl)
        assert n == (220 if type(dl) is Doubled else 110)
        list(dl)                    # it warns once
    assert calls == [1,1]
    for dl,why in hooked: assert why in why_slow(dl)
    dl = FastTabDL(to.train, bs=8)
    dl.do_batch = lambda b: None
    assert '`do_batch`' in why_slow(dl)


def test_transforms_that_are_added_later_are_seen():
    dl = FastTabDL(pandas_of().train, bs=8)
    list(dl)
    dl.after_batch.add(Transform(lambda o: o))
    with pytest.warns(UserWarning, match='after_batch'): list(dl)


@pytest.mark.slow
def test_worker_processes():
    dl = FastTabDL(pandas_of().train, bs=32, num_workers=1)
    with pytest.warns(UserWarning, match='num_workers=1'): assert sum(len(b[0]) for b in dl) == 110


def test_new_keeps_settings_and_rows():
    to = pandas_of()
    dl = FastTabDL(to.train, bs=16, shuffle=True, wgts=np.arange(110.), eval_bs=50, chunk=64, drop_last=True)
    same = dl.new()
    assert (same.bs, same.eval_bs, same.chunk, same.drop_last) == (16, 50, 64, True) and (same.wgts==dl.wgts).all()
    assert dl.new(shuffle=False).bs == 50 and dl.new(shuffle=False, bs=7).bs == 7 and dl.new(shuffle=True).bs == 16
    assert dl.new(to.valid).wgts is None
    assert type(dl.new(cls=TabDataLoader)) is TabDataLoader and type(dl.new(cls=TabWeightedDL)) is TabWeightedDL


@pytest.mark.parametrize('wgts', [[1.,2.], np.full(110, -1.), np.zeros(110), np.full(110, np.nan), np.full(110, np.inf)])
def test_wrong_weights(wgts):
    with pytest.raises(ValueError, match='`wgts` must'): FastTabDL(pandas_of().train, wgts=wgts)


@pytest.mark.parametrize('copied', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(copied):
    dl = fast_dataloaders(pandas_of(), bs=16, device='cpu')
    twin = copied(dl)
    same_batches(dl.valid, twin.valid)
    set_seed(1); a = rows(dl.train)
    set_seed(1); b = rows(twin.train)
    assert torch.equal(a, b)


def test_device():
    dls = fast_dataloaders(pandas_of(), bs=16, device='cpu')
    dls.to('meta')
    assert {t.device.type for t in dls.one_batch()} == {'meta'}
    dls.cpu()
    assert {t.device.type for t in dls.one_batch()} == {'cpu'}


def test_test_loaders():
    to,df = pandas_of(),table(170)
    fast,slow = fast_dataloaders(to, bs=16, device='cpu'),to.dataloaders(bs=16, device='cpu')
    for n in (0,1,20,170):
        for part in (df[:n], df[:n].drop(columns='y')):
            same_batches(fast.test_dl(part, bs=32), slow.test_dl(part, bs=32))
    assert fast.test_dl(df).bs == 4096


def test_chunks_bound_what_is_gathered(monkeypatch):
    to = pandas_of()
    seen = []
    import fastai_dropconnect.tabular.loader as module
    monkeypatch.setattr(module, '_rows', lambda t, idxs, _rows=module._rows: (seen.append(len(idxs)), _rows(t, idxs))[1])
    list(FastTabDL(to.train, bs=16, chunk=40))
    assert max(seen) == 32 and sum(seen) == 3*110


def test_collaborative_filtering():
    r = np.random.default_rng(0)
    ratings = pd.DataFrame(dict(user=r.integers(0, 9, 200), item=r.integers(0, 9, 200), rating=r.integers(1, 6, 200)))
    dls = CollabDataLoaders.from_df(ratings, bs=32, seed=0, device='cpu')
    fast = fast_loaders(dls, replacement=True, valid_bs=32)
    same_batches(fast.valid, dls.valid)
    def losses(accelerated):
        set_seed(0)
        learn = collab_learner(dls, n_factors=4, y_range=(0,6))
        if accelerated: learn.accelerate(replacement=True)
        set_seed(1)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 5e-3)
        return torch.stack(learn.recorder.losses)
    torch.testing.assert_close(losses(True), losses(False), atol=1e-5, rtol=0)
