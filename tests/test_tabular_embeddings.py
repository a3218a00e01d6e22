"Continuous columns on their way in: QuantileNormalize, and vectors for numbers"
import re, warnings
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from conftest import make_table
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, TabularModel, TabularPandas, load_learner, set_seed
from hypothesis import given, strategies as st
from scipy import stats
from torch import nn

from fastai_dropconnect.all import *
from fastai_dropconnect.nn_utils import hidden_linears
from fastai_dropconnect.tabular.embeddings import quantile_bins

TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])
KINDS = ['ple', 'periodic']
kinds = pytest.mark.parametrize('kind', KINDS)


def skewed(n=1000, seed=0):
    r = np.random.default_rng(seed)
    return pd.DataFrame(dict(long=r.lognormal(0, 2, n), few=r.integers(0, 4, n), spike=np.where(r.random(n)<.9, 0, r.random(n)), huge=1.3e9+r.integers(0, 10**7, n), same=5,
                             y=r.random(n)))

def pandas(df, *procs, conts=None, splits=None, **kw):
    splits = splits or (list(range(len(df)*4//5)),list(range(len(df)*4//5, len(df))))
    return TabularPandas(df, procs=list(procs), cont_names=conts or [c for c in df if c!='y'], y_names='y', splits=splits, **kw)

def make(df=None, procs=(Categorify,FillMissing,QuantileNormalize), cats=('color','code','flag'), conts=('a','b'), **kw):
    df = make_table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=list(procs), cat_names=list(cats), cont_names=list(conts), y_names='y', valid_idx=list(range(len(df)*4//5, len(df))), bs=32, **kw)

def fit(learn, n=1):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, 1e-2)
    return learn
def preds(learn, dl=None):
    with learn.no_bar(): return learn.get_preds(dl=dl)[0]
def learner(dls, path=None, **kw):
    set_seed(0)
    return tabular_learner(dls, layers=[20,10], config=tabular_dropconnect_config(**kw), path=path)

# QuantileNormalize

NORMAL = QuantileNormalize(output_distribution='normal')

@pytest.mark.parametrize('proc,dist', [(QuantileNormalize, stats.uniform(-3**.5, 12**.5)), (NORMAL, stats.norm())])
def test_training_rows_get_the_distribution(proc, dist):
    to = pandas(skewed(5000), proc)
    for c in ('long','huge'): assert stats.kstest(to.train.conts[c], dist.cdf).statistic < 0.01
    assert (to.conts.dtypes == 'float32').all()


def test_only_training_rows_count():
    df = skewed()
    other = df.copy()
    other.loc[800:, ['long','few','spike','huge']] += 100
    a,b = pandas(df, QuantileNormalize),pandas(other, QuantileNormalize)
    assert a.train.conts.equals(b.train.conts) and not a.valid.conts.equals(b.valid.conts)


def test_equal_values_get_the_middle_of_their_ranks():
    df = pd.DataFrame(dict(x=np.repeat([-7.,0,1,30], [300,400,200,100]), y=0.))
    ranks = np.array([.15,.5,.8,.95])
    for proc,want in ((QuantileNormalize, (ranks-.5)*12**.5), (NORMAL, stats.norm.ppf(ranks))):
        to = pandas(df, proc, splits=(list(range(1000)),[]))
        got = to.conts.x.groupby(df.x.loc[to.items.index]).unique()
        assert all(len(v)==1 for v in got)
        np.testing.assert_allclose([v[0] for v in got], want, atol=0.05)


@pytest.mark.parametrize('proc,end', [(QuantileNormalize, 3**.5), (NORMAL, 5.2)])
def test_order_is_kept_and_unseen_ranges_are_clipped(proc, end):
    to = pandas(skewed(), proc)
    new = to.new(pd.DataFrame({c: np.linspace(-1e10, 1e10, 101) for c in to.cont_names}))
    new.process()
    z = new.conts.to_numpy()
    assert (np.diff(z, axis=0) >= 0).all()
    np.testing.assert_allclose(z[[0,-1]], np.repeat([[-end],[end]], z.shape[1], 1), rtol=.001)


@pytest.mark.parametrize('proc', [QuantileNormalize, NORMAL])
def test_decode_gives_the_values_back(proc):
    df = skewed()
    to = pandas(df, proc)
    back = to.decode().items.sort_index()
    for c,tol in dict(long=.05, few=1e-3, spike=.05, huge=1e-3, same=1e-6).items():
        scale = np.maximum(df[c].abs(), .05)
        assert ((back[c]-df[c]).abs()/scale).quantile(.99) < tol, c


def test_missing_values_stay_missing_or_are_filled_before():
    df = skewed()
    df.loc[::3, 'long'] = np.nan
    to = pandas(df, QuantileNormalize)
    assert to.conts.long.isna().eq(df.long.loc[to.items.index].isna()).all()
    assert abs(to.train.conts.long.mean()) < .05       # the others are ranked among themselves
    for procs in ((FillMissing,QuantileNormalize,Categorify), (QuantileNormalize,Categorify,FillMissing)):
        filled = pandas(df, *procs)
        assert filled.conts.notna().all(axis=None) and filled.cat_names == ['long_na']
        assert [type(f) for f in filled.procs.fs if type(f) in procs] == [FillMissing,Categorify,QuantileNormalize]


def test_few_rows_no_rows_no_columns_and_odd_types():
    for n in (1, 2, 5): assert np.isfinite(pandas(skewed(n+1), QuantileNormalize, splits=(list(range(n)),[n])).conts.to_numpy()).all()
    to = pandas(skewed(), QuantileNormalize)
    empty = to.new(skewed()[:0])
    empty.process()
    assert empty.conts.shape == (0,5)
    assert not len(TabularPandas(make_table()[['color','y']], [Categorify,QuantileNormalize], cat_names=['color'], y_names='y', splits=([0,1,2,3],[4])).cont_names)
    df = skewed().convert_dtypes()
    df.loc[3, 'few'] = pd.NA
    odd = pandas(df, QuantileNormalize, reduce_memory=False)
    assert odd.conts.few.isna().sum()==1 and np.isfinite(odd.conts.drop(columns='few').to_numpy()).all()


def test_subsample_and_seed():
    df = skewed(5000)
    a,b,c = [pandas(df, QuantileNormalize(subsample=1000, seed=s)).conts for s in (0,0,1)]
    assert a.equals(b) and not a.equals(c)
    assert stats.kstest(c.long, 'norm').statistic < 0.08


@pytest.mark.parametrize('kw,exc,match', [(dict(n_quantiles=1), ValueError, 'n_quantiles=1'), (dict(n_quantiles=2.5), TypeError, 'n_quantiles=2.5'), (dict(subsample=99), ValueError, 'subsample=99'),
                                          (dict(seed=-1), ValueError, 'seed=-1'), (dict(seed=True), TypeError, 'seed=True')])
def test_quantile_errors(kw, exc, match):
    with pytest.raises(exc, match=match): QuantileNormalize(**kw)


def test_show_batch_and_export(tmp_path, capsys):
    dls = make()
    dls.show_batch()
    learn = fit(learner(dls, path=tmp_path))
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = make_table(40, seed=5).drop(columns='y')
    assert torch.equal(preds(again, again.dls.test_dl(test)), preds(learn, learn.dls.test_dl(test)))
    assert torch.allclose(again.predict(test.iloc[3])[2], preds(learn, learn.dls.test_dl(test))[3], atol=1e-5)
    sizes = []
    for n in (300, 3000, 30000):
        learner(make(make_table(n)), path=tmp_path).export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert sizes[-1] < sizes[0] + 2*2*1000*8 + 2000     # 1,000 quantiles of two columns

# Bins

def test_bins_have_equally_many_rows():
    x = torch.randn(4800, 2)
    for b,c in zip(quantile_bins(x, 48), x.T):
        assert len(b) == 49 and b[0] == c.min() and b[-1] == c.max()
        assert (torch.histogram(c, b)[0]-100).abs().max() <= 1


def test_bins_of_columns_with_few_values_or_none():
    x = np.stack([np.arange(90)%3, np.full(90, -4.), np.full(90, np.nan), np.where(np.arange(90)%2, np.nan, np.arange(90)), np.r_[np.zeros(89), 1]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bins = quantile_bins(x, 16)
        res = PLE(4, bins).layer(5)
    assert [len(b) for b in bins] == [3,2,2,17,2]
    for b in bins: assert (b.diff() > 0).all() and b.isfinite().all()
    assert res(torch.randn(7, 5)*100).isfinite().all()
    assert [len(b) for b in quantile_bins(torch.ones(1, 2))] == [2,2]
    with pytest.raises(ValueError, match='with rows to find'): quantile_bins(torch.ones(0, 2))
    for bad,exc in ((1,ValueError), (2.5,TypeError), (True,TypeError)):
        with pytest.raises(exc, match=f'n_bins={bad}'): quantile_bins(x, bad)


def test_a_spike_takes_one_bin_and_the_rest_shares_the_others():
    r = np.random.default_rng(0)
    for spikes,others in (((0.,), 7), ((0., 5.), 6), ((0., 1.5, 5.), 5)):
        rest = r.lognormal(0, 1, 700)
        x = np.concatenate([np.full(2000, s) for s in spikes]+[rest]).astype('float32')
        b = quantile_bins(r.permutation(x)[:,None], 8)[0]
        assert len(b) == 9 and set(spikes) <= set(b.tolist())
        counts = np.histogram(rest.astype('float32'), np.setdiff1d(b.numpy(), spikes))[0]
        assert len(counts) == others and np.ptp(counts) <= 1


@given(st.lists(st.floats(-1e6, 1e6, width=32)|st.integers(0, 5).map(float), min_size=1, max_size=80), st.integers(2, 20))
def test_bins_rise_from_the_least_to_the_greatest_number(numbers, n_bins):
    b = quantile_bins(np.array(numbers)[:,None], n_bins)[0]
    values = np.unique(np.float32(numbers))
    assert 2 <= len(b) <= n_bins+1 and (b.diff() > 0).all()
    assert b[0] == values[0] and (len(values) == 1 or b[-1] == values[-1])
    if len(values) <= n_bins: assert set(values.tolist()) <= set(b.tolist())


def test_the_learner_finds_bins_in_the_processed_training_rows():
    df = make_table()
    df.loc[480:, ['a','b']] = 1e6       # validation rows
    dls = make(df)
    impl = learner(dls, num_embeddings=PLE(bins=8)).model.num_embeds[-2].module.impl
    want = PLE(bins=8).fitted(dls.train_ds.conts.to_numpy('float32')).layer(2)[-2].module.impl
    assert torch.equal(impl.weight, want.weight) and torch.equal(impl.bias, want.bias)
    assert impl.weight.shape == (2,8)


def test_bins_may_be_given():
    bins = [torch.linspace(-3, 3, 5), torch.linspace(-1, 1, 3)]
    assert learner(make(), num_embeddings=PLE(bins=bins)).model.num_embeds[-2].module.impl.weight.shape == (2,4)

# Numeric embeddings in the model

def settings(kind, dim=6, **kw): return PLE(dim, 8, **kw).fitted(torch.randn(100, 3)) if kind=='ple' else Periodic(dim, **kw)
def model(kind, weight_p=0., **kw): return TabularDropConnectModel(**TAB, num_embeddings=settings(kind, weight_p=weight_p), **kw)
def args(n=16): return torch.randint(0, 5, (n,2)),torch.randn(n, 3)


def test_without_numeric_embeddings_nothing_changes():
    torch.manual_seed(0); a = TabularDropConnectModel(**TAB, weight_p=0)
    torch.manual_seed(0); b = TabularModel(**TAB)
    assert list(a.state_dict()) == list(b.state_dict()) and a.n_cont == b.n_cont
    assert torch.equal(a(*(x := args())), b(*x))


@kinds
def test_shapes_and_gradients(kind):
    m = model(kind)
    assert m.n_cont == 3 and m.bn_cont.num_features == 18 and m.layers[0][0].in_features == 7+18
    for n in (0, 1, 2): assert m.eval()(*args(n)).shape == (n,2)
    cats,conts = args()
    conts.requires_grad_()
    m.train()(cats, conts).square().sum().backward()
    assert (conts.grad.abs().sum(0) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.num_embeds.parameters())
    assert TabularDropConnectModel([], 3, 2, [20], num_embeddings=settings(kind))(torch.empty(4, 0).long(), torch.randn(4, 3)).shape == (4,2)
    none = TabularDropConnectModel([(10,4)], 0, 2, [20], num_embeddings=kind)
    assert none.num_embeds is None and none(torch.zeros(4, 1).long(), torch.empty(4, 0)).shape == (4,2)


@kinds
def test_only_the_hidden_layers_are_selected_unless_asked(kind):
    m = model(kind)
    assert list(hidden_linears(m)) == ['layers.0.0', 'layers.1.0']
    learn = learner(make(), num_embeddings=kind, weight_p=0)
    name = next(n for n,_ in learn.model.named_modules() if n.startswith('num_embeds') and n.endswith('module.linear'))
    with torch.no_grad(): learn.model.num_embeds[-2].module.linear.weight.fill_(1.)
    learn.add_cb(FrozenZeroInit(0.5, layers=name))
    w = fit(learn).model.num_embeds[-2].module.linear.weight
    assert (w==0).float().mean() == round(.5*w.numel())/w.numel()


@kinds
def test_dropconnect_of_the_vectors(kind):
    x = args()
    a,b = [model(kind, weight_p=p) for p in (0.,.5)]
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        for m in (a, b): nn.init.normal_(m.num_embeds[-2].module.linear.weight, generator=torch.Generator().manual_seed(0))
        assert torch.equal(a.eval()(*x), b.eval()(*x))
        b.train()
        assert (b.num_embeds(x[1]) != b.num_embeds(x[1])).any() and torch.equal(a.train().num_embeds(x[1]), a.num_embeds(x[1]))


def test_piecewise_linear_vectors_bend_at_the_edges_only():
    bins = [torch.tensor([-2.,-.5,.25,3])]
    m,x = PLE(4, bins).layer(1),torch.linspace(-4, 5, 901, dtype=torch.float64)[:,None]
    m.double()
    inside = m(x[(x>=-2)&(x<=3)][:,None]).detach()
    assert inside.diff(n=2, dim=0).abs().max() < 1e-6       # straight lines at the start
    nn.init.normal_(m[-2].module.linear.weight)
    bend = m(x).detach().diff(n=2, dim=0).abs().sum(1)
    edges = x[1:-1,0][bend > 1e-6]
    for e in edges: assert min(abs(e-b) for b in bins[0].double()) < 0.011
    for b in bins[0]: assert (edges-b).abs().min() < 0.011
    ends = m(torch.tensor([[-1e9],[-2.],[3.],[1e9]], dtype=torch.float64))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[3])      # no line goes on where no row was


@kinds
@pytest.mark.parametrize('target', ['number', 'class'])
def test_learners(kind, target, tmp_path):
    df = make_table()
    if target=='class': df['y'] = np.where(df.y > df.y.median(), 'high', 'low')
    df['same'] = 3.
    learn = fit(learner(make(df, conts=('a','b','same')), num_embeddings=settings(kind), path=tmp_path), 2)
    p = preds(learn)
    assert p.isfinite().all() and p.shape == (120, 2 if target=='class' else 1)
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = df.drop(columns='y')[:20]
    assert torch.equal(preds(again, again.dls.test_dl(test)), preds(learn, learn.dls.test_dl(test)))
    assert torch.allclose(again.predict(test.iloc[3])[2], preds(learn, learn.dls.test_dl(test))[3], atol=1e-5)
    learn.save('w')
    assert torch.equal(preds(learner(make(df, conts=('a','b','same')), num_embeddings=settings(kind), path=tmp_path).load('w')), p)


@pytest.mark.parametrize('bad', ['spline', 1, True, PLE])
def test_unknown_vectors_are_named(bad):
    for f in (tabular_dropconnect_config, partial(TabularDropConnectModel, **TAB)):
        with pytest.raises(ValueError, match=re.escape(f'num_embeddings={bad!r}')): f(num_embeddings=bad)


@pytest.mark.parametrize('settings,kw,exc,match', [(PLE, dict(dim=0), ValueError, 'dim=0'), (PLE, dict(dim=1.5), TypeError, 'dim=1.5'), (Periodic, dict(frequency_scale=0), ValueError, 'frequency_scale=0'),
                                                   (PLE, dict(weight_p=1), ValueError, 'weight_p=1'), (Periodic, dict(weight_p=1), ValueError, 'weight_p=1')])
def test_settings_check_themselves(settings, kw, exc, match):
    with pytest.raises(exc, match=match): settings(**kw)


def test_errors_of_bins():
    for bad,exc in ((1,ValueError), ('a',TypeError)):
        with pytest.raises(exc, match='bins='): PLE(bins=bad)
    for bins in (48, quantile_bins(torch.randn(50, 2))):
        with pytest.raises(ValueError, match='one for each of the 3'): TabularDropConnectModel(**TAB, num_embeddings=PLE(bins=bins))
