"Vectors for continuous columns: bins, settings and layers, alone and in the learner"
import copy, pickle, re, warnings
from functools import partial
import numpy as np, pytest, torch
from conftest import make_table
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, TabularModel, load_learner, set_seed
from hypothesis import given, strategies as st
from torch import nn

from fastai_dropconnect.all import *
from fastai_dropconnect.nn_utils import hidden_linears
from fastai_dropconnect.tabular.embeddings import quantile_bins

TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])
KINDS = ['ple', 'periodic']
kinds = pytest.mark.parametrize('kind', KINDS)


def make(df=None, conts=('a','b')):
    df = make_table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,QuantileNormalize], cat_names=['color','code','flag'],
                                      cont_names=list(conts), y_names='y', valid_idx=list(range(len(df)*4//5, len(df))), bs=32)

def fit(learn, n=1):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, 1e-2)
    return learn

def preds(learn, dl=None):
    with learn.no_bar(): return learn.get_preds(dl=dl)[0]

def learner(dls, path=None, **kw):
    set_seed(0)
    return tabular_learner(dls, layers=[20,10], config=tabular_dropconnect_config(**kw), path=path)

# Bins

def test_bins_have_equally_many_rows():
    x = torch.randn(4800, 2)
    for b,c in zip(quantile_bins(x, 48), x.T, strict=True):
        assert len(b) == 49 and b[0] == c.min() and b[-1] == c.max()
        assert (torch.histogram(c, b)[0]-100).abs().max() <= 1


def test_bins_of_columns_with_few_values_or_none():
    rows = np.arange(90)
    x = np.stack([rows%3, np.full(90, -4.), np.full(90, np.nan), np.where(rows%2, np.nan, rows), np.r_[np.zeros(89), 1]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bins = quantile_bins(x, 16)
        res = PLE(4, bins).layer(5)
    assert [len(b) for b in bins] == [3,2,2,17,2]
    for b in bins: assert (b.diff() > 0).all() and b.isfinite().all()
    assert res(torch.randn(7, 5)*100).isfinite().all()
    assert [len(b) for b in quantile_bins(torch.ones(1, 2))] == [2,2]
    with pytest.raises(ValueError, match='at least one row'): quantile_bins(torch.ones(0, 2))
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

# Vectors in the model

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
    only_numbers = TabularDropConnectModel([], 3, 2, [20], num_embeddings=settings(kind))
    assert only_numbers(torch.empty(4, 0).long(), torch.randn(4, 3)).shape == (4,2)
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
    def new(): return learner(make(df, conts=('a','b','same')), num_embeddings=settings(kind), path=tmp_path)
    learn = fit(new(), 2)
    p = preds(learn)
    assert p.isfinite().all() and p.shape == (120, 2 if target=='class' else 1)
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = df.drop(columns='y')[:20]
    assert torch.equal(preds(again, again.dls.test_dl(test)), preds(learn, learn.dls.test_dl(test)))
    assert torch.allclose(again.predict(test.iloc[3])[2], preds(learn, learn.dls.test_dl(test))[3], atol=1e-5)
    learn.save('w')
    assert torch.equal(preds(new().load('w')), p)


@pytest.mark.parametrize('bad', ['spline', 1, True, PLE])
def test_unknown_vectors_are_named(bad):
    for f in (tabular_dropconnect_config, partial(TabularDropConnectModel, **TAB)):
        with pytest.raises(ValueError, match=re.escape(f'num_embeddings={bad!r}')): f(num_embeddings=bad)


@pytest.mark.parametrize('settings,kw,exc,match', [
    (PLE, dict(dim=0), ValueError, 'dim=0'), (PLE, dict(dim=1.5), TypeError, 'dim=1.5'), (PLE, dict(weight_p=1), ValueError, 'weight_p=1'),
    (Periodic, dict(dim='8'), TypeError, "dim='8'"), (Periodic, dict(frequency_scale=0), ValueError, 'frequency_scale=0'),
    (Periodic, dict(frequency_scale=float('inf')), ValueError, 'frequency_scale=inf'), (Periodic, dict(weight_p=1), ValueError, 'weight_p=1')])
def test_settings_check_themselves(settings, kw, exc, match):
    with pytest.raises(exc, match=match): settings(**kw)


def test_errors_of_bins():
    for bad,exc in ((1,ValueError), ('a',TypeError)):
        with pytest.raises(exc, match='bins='): PLE(bins=bad)
    for bins in (48, quantile_bins(torch.randn(50, 2))):
        with pytest.raises(ValueError, match='edges of each of the 3'): TabularDropConnectModel(**TAB, num_embeddings=PLE(bins=bins))


@pytest.mark.parametrize('bad,exc', [([[0.,1.],[1.,0.]], ValueError), ([[0.,1.],[0.]], ValueError), ([[0.,1.],[0.,np.nan]], ValueError),
                                     ([[0.,1.],[0.,0.]], ValueError), ([[0.,1.],torch.zeros(2, 2)], ValueError), ([[0.,1.],'ab'], TypeError)])
def test_edges_are_checked_where_they_come_in(bad, exc):
    with pytest.raises(exc, match=r'`bins` must be .* ascending numbers, got bins\[1\]='): PLE(bins=bad)


def test_edges_may_be_lists_arrays_or_tensors():
    edges = [[0,1,2.5], [-1.,3.]]
    same = PLE(bins=edges)
    for other in ([torch.tensor(e) for e in edges], tuple(np.array(e) for e in edges)): assert PLE(bins=other) == same
    assert same.layer(2)(torch.zeros(5, 2)).shape == (5,32)


def test_settings_keep_their_own_edges():
    edges = torch.tensor([0.,1,2])
    settings = PLE(bins=[edges])
    edges += 5
    assert settings == PLE(bins=[[0,1,2]])


def test_settings_compare_by_value():
    x = torch.randn(100, 2)
    a,b = [PLE(8, 5).fitted(x) for _ in range(2)]
    assert a == b and hash(a) == hash(b) and a.fitted(x+1) is a
    assert a != PLE(8, 5) and a != PLE(8, 5).fitted(x+1) and a != PLE(4, 5).fitted(x) and a != PLE(8, 5, weight_p=.1).fitted(x) and a != 5
    assert len({a, b, PLE(), PLE(), Periodic(), Periodic()}) == 3
    assert Periodic(8) == Periodic(8) != Periodic(4) and MaskedMembers(4) == MaskedMembers(4) != MaskedMembers(5)


def test_settings_show_their_values_briefly():
    assert repr(PLE(8)) == 'PLE(dim=8, bins=48, weight_p=0.0)'
    assert repr(PLE(8).fitted(torch.randn(1000, 20))) == 'PLE(dim=8, bins=<edges of 20 columns>, weight_p=0.0)'


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['copy','deepcopy','pickle'])
def test_settings_can_be_copied(copied):
    fitted = PLE(6, 8).fitted(torch.randn(100, 3))
    for s in (PLE(), fitted, Periodic(4, .5), MaskedMembers(3, average='mean')): assert copied(s) == s
    for a,b in zip(copied(fitted).layer(3).buffers(), fitted.layer(3).buffers(), strict=True): assert torch.equal(a, b)


def test_settings_cannot_be_changed():
    for s,name in ((PLE(),'dim'), (Periodic(),'dim'), (MaskedMembers(),'n')):
        with pytest.raises(AttributeError): setattr(s, name, 3)
