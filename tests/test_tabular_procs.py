"Procs for tables: QuantileNormalize and FillMissingAnywhere"
import copy, pickle
import numpy as np, pandas as pd, pytest, torch
from conftest import make_table
from fastai.tabular.all import Categorify, FillMissing, FillStrategy, Normalize, TabularDataLoaders, TabularPandas, load_learner, set_seed
from scipy import stats

from fastai_dropconnect.all import *


def skewed(n=1000, seed=0):
    r = np.random.default_rng(seed)
    spike = np.where(r.random(n)<.9, 0, r.random(n))
    return pd.DataFrame(dict(long=r.lognormal(0, 2, n), few=r.integers(0, 4, n), spike=spike,
                             huge=1.3e9+r.integers(0, 10**7, n), same=5, y=r.random(n)))

def pandas(df, *procs, conts=None, splits=None, **kw):
    n_train = len(df)*4//5
    splits = splits or (list(range(n_train)), list(range(n_train, len(df))))
    return TabularPandas(df, procs=list(procs), cont_names=conts or [c for c in df if c!='y'], y_names='y', splits=splits, **kw)

def make(df=None):
    df = make_table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,QuantileNormalize], cat_names=['color','code','flag'],
                                      cont_names=['a','b'], y_names='y', valid_idx=list(range(len(df)*4//5, len(df))), bs=32)

def learner(dls, path):
    set_seed(0)
    return tabular_learner(dls, layers=[20,10], config=tabular_dropconnect_config(), path=path)

def fit(learn):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn

def preds(learn, dl=None):
    with learn.no_bar(): return learn.get_preds(dl=dl)[0]

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


def test_missing_values_are_refused_in_training_rows_unless_they_are_filled_before():
    df = skewed()
    df.loc[::3, ['long','few']] = np.nan
    with pytest.raises(ValueError, match='QuantileNormalize needs .* but there are some in long, few: put FillMissing or FillMissingAnywhere into `procs`'):
        pandas(df, QuantileNormalize)
    later = skewed()
    later.loc[900:, 'long'] = np.nan        # rows to predict: the prediction is NaN, but training is not
    assert pandas(later, QuantileNormalize).conts.long.isna().sum()==100
    df['few'] = later.few
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
    no_numbers = TabularPandas(make_table()[['color','y']], [Categorify,QuantileNormalize], cat_names=['color'], y_names='y', splits=([0,1,2,3],[4]))
    assert not len(no_numbers.cont_names)
    df = skewed().convert_dtypes()
    df.loc[999, 'few'] = pd.NA
    odd = pandas(df, QuantileNormalize, reduce_memory=False)
    assert odd.conts.few.isna().sum()==1 and np.isfinite(odd.conts.drop(columns='few').to_numpy()).all()


def test_subsample_and_seed():
    df = skewed(5000)
    a,b,c = [pandas(df, QuantileNormalize(subsample=1000, seed=s)).conts for s in (0,0,1)]
    assert a.equals(b) and not a.equals(c)
    assert stats.kstest(c.long, 'norm').statistic < 0.08


@pytest.mark.parametrize('kw,exc,match', [
    (dict(n_quantiles=1), ValueError, 'n_quantiles=1'), (dict(n_quantiles=2.5), TypeError, 'n_quantiles=2.5'),
    (dict(subsample=99), ValueError, 'subsample=99'), (dict(seed=-1), ValueError, 'seed=-1'), (dict(seed=True), TypeError, 'seed=True')])
def test_quantile_errors(kw, exc, match):
    with pytest.raises(exc, match=match): QuantileNormalize(**kw)


def test_show_batch_and_export(tmp_path, capsys):
    dls = make()
    dls.show_batch()
    learn = fit(learner(dls, tmp_path))
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = make_table(40, seed=5).drop(columns='y')
    assert torch.equal(preds(again, again.dls.test_dl(test)), preds(learn, learn.dls.test_dl(test)))
    assert torch.allclose(again.predict(test.iloc[3])[2], preds(learn, learn.dls.test_dl(test))[3], atol=1e-5)
    sizes = []
    for n in (300, 3000, 30000):
        learner(make(make_table(n)), tmp_path).export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert sizes[-1] < sizes[0] + 2*2*1000*8 + 2000     # 1,000 quantiles of two columns

# FillMissingAnywhere

TRAIN = pd.DataFrame(dict(a=[1.,np.nan,3.,4.], b=[5.,6.,7.,7.], c=[np.nan]*4))

LATER = pd.DataFrame(dict(a=[1.,np.nan], b=[np.nan,6.], c=[2.,np.nan]))

def filled(proc, later=LATER):
    to = TabularPandas(TRAIN, [proc], cont_names=['a','b','c'])
    new = to.new(later)
    new.process()
    return to,new.items


def test_gaps_are_filled_also_in_columns_complete_in_training():
    with pytest.raises(AssertionError, match='not in setup training set'): filled(FillMissing)      # fastai's
    to,new = filled(FillMissingAnywhere)
    assert new.a.tolist() == [1,3] and new.b.tolist() == [6.5,6] and new.c.tolist() == [2,0]
    assert to.items.a.tolist() == [1,3,3,4] and to.items.c.tolist() == [0]*4


def test_only_gaps_in_training_make_a_category():
    to,new = filled(FillMissingAnywhere)
    assert to.cat_names == ['a_na','c_na'] and 'b_na' not in new
    assert new.a_na.tolist() == [False,True] and new.c_na.tolist() == [False,True]
    to,new = filled(FillMissingAnywhere(add_col=False))
    assert to.cat_names == [] and set(new) == {'a','b','c'}


def test_fill_strategies():
    frame = dict(a=[np.nan], b=[np.nan], c=[np.nan])
    constant = FillMissingAnywhere(FillStrategy.constant, fill_vals=dict(a=-1., b=-2., c=-3.))
    assert filled(constant, pd.DataFrame(frame))[1].iloc[0,:3].tolist() == [-1,-2,-3]
    to = TabularPandas(TRAIN[['b']], [FillMissingAnywhere(FillStrategy.mode)], cont_names=['b'])
    new = to.new(pd.DataFrame(dict(b=[np.nan])))
    new.process()
    assert new.items.b.tolist() == [7]


def test_missing_columns_are_named():
    for later,says in ((dict(a=[1.], c=[2.]), r"\['b'\]"), ({}, r"\['a', 'b', 'c'\]")):
        with pytest.raises(ValueError, match=f'`rows` must have the columns of the training frame, but {says} are missing$'): filled(FillMissingAnywhere, pd.DataFrame(later, index=[0]))


@pytest.mark.parametrize('vectors', ['ple','periodic'])
def test_vectors_of_missing_values_are_refused(vectors):
    df = make_table().assign(b=lambda d: d.b.where(d.index!=5))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cont_names=['a','b'], cat_names=['color'], y_names='y', valid_idx=[0,1], bs=32)
    with pytest.raises(ValueError, match='(PLE|Periodic) needs .* but there are some in a, b: put FillMissing'): tabular_learner(dls, config=tabular_dropconnect_config(num_embeddings=vectors))


def test_a_filled_proc_can_be_copied():
    to,_ = filled(FillMissingAnywhere)
    proc = to.procs.fill_missing_anywhere
    for other in (copy.deepcopy(proc), pickle.loads(pickle.dumps(proc))):
        assert other.na_dict == proc.na_dict == dict(a=3., b=6.5, c=0.) and other.with_gaps == ['a','c']
