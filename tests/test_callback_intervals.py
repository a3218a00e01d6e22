"Intervals beside predictions: `predict` of a row, `show_results`, with and without the fast path"
import numpy as np, pandas as pd, pytest, torch, warnings
from fastai.tabular.all import Callback, Categorify, FillMissing, Normalize, TabularDataLoaders, load_learner, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.blended_learner import blended_learner
from fastai_dropconnect.callback import intervals
from fastai_dropconnect.callback.calibrate import calibration_of
from fastai_dropconnect.ensemble.blend import BlendedModel
from conftest import make_dls, make_table

pytestmark = pytest.mark.filterwarnings('ignore')
DF = make_table(200)

def learner(noise='quantile', calibrate=True, fast=False, **config):
    set_seed(0)
    learn = tabular_learner(make_dls(DF), [12], noise=noise, fast=fast, config=config and tabular_dropconnect_config(**config))
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    if calibrate: learn.calibrate(.8)
    return learn

@pytest.mark.parametrize('fast', [False,True])
@pytest.mark.parametrize('noise,config', [('quantile',{}), ('mixture',dict(members=2)), (None,{}), (None,dict(members=2)), (None,dict(weight_p=.1))])
def test_predict_has_the_interval_of_predict_distribution(noise, config, fast, tmp_path):
    learn = learner(noise, fast=fast, **config)
    want = learn.predict_distribution(DF[5:6])
    learn.path = tmp_path
    learn.export()
    for l in (learn,load_learner(tmp_path/'export.pkl')):
        row,decoded,pred = l.predict(DF.iloc[5])
        np.testing.assert_allclose(row.items[['y','y_lower','y_upper']], want[['mean','lower','upper']], rtol=1e-4, atol=1e-5)
        assert list(row.y_names)==['y','y_lower','y_upper'] and float(decoded)==pytest.approx(float(pred))
        row.show()

def test_without_an_interval_all_is_as_before():
    for kw in (dict(noise=None, calibrate=False), dict(noise=None, calibrate=False, fast=True)):
        row,*_ = learner(**kw).predict(DF.iloc[5])
        assert list(row.y_names)==['y'] and not [n for n in row.items if n.endswith(('lower','upper'))]
    df = DF.assign(y=np.where(DF.y>0, 'a', 'b'))
    classes = tabular_learner(make_dls(df), [12])
    with classes.no_bar(): classes.calibrate()
    assert list(classes.predict(df.iloc[0])[0].y_names)==['y']

def test_show_results(monkeypatch):
    shown = []
    monkeypatch.setattr(intervals, 'display_df', shown.append)
    learn = learner()
    learn.show_results(max_n=3, shuffle=False)
    want = learn.predict_distribution(DF[160:163])
    assert len(shown[0])==3
    np.testing.assert_allclose(shown[0][['y_pred','y_lower','y_upper']], want[['mean','lower','upper']], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shown[0]['y'], DF.y[160:163], rtol=1e-5)

@pytest.mark.parametrize('fast', [False,True])
def test_predict_takes_the_group_of_the_row_that_it_was_given(fast, tmp_path):
    "Of a column that is no feature, of an unseen level, which is not a missing one, and from a dictionary"
    df = make_table(700).assign(site=lambda d: d.index%2)
    set_seed(0)
    learn = tabular_learner(make_dls(df), [12], noise='quantile', fast=fast)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    odd = df[:4].assign(color=['violet',None,'red','blue'])
    for group in ('color','site'):
        learn.calibrate(group=group, df=df)
        for i,k in enumerate(calibration_of(learn).group_q): calibration_of(learn).group_q[k] += 10*(i+1)
        want = learn.predict_distribution(odd)
        learn.path = tmp_path
        learn.export()
        for l in (learn,load_learner(tmp_path/'export.pkl')):
            for k in calibration_of(l).group_q: calibration_of(l).group_q[k] = calibration_of(learn).group_q[k]
            row = odd.iloc[0].copy()
            seen = []
            for i in range(4):
                row[:] = odd.iloc[i]        # one Series for all rows
                seen.append(l.predict(row)[0])
            for i,s in enumerate(seen):
                np.testing.assert_allclose(s.items[['y','y_lower','y_upper']].to_numpy('float64')[0], want[['mean','lower','upper']].iloc[i], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(l.predict(odd.iloc[0].to_dict())[0].items.y_upper, want.upper.iloc[0], rtol=1e-4)
    assert list(learn.predict(odd.iloc[0].drop('site'))[0].y_names)==['y']        # an interval of which group?


def snapshots(**kw):
    set_seed(0)
    learn = tabular_learner(make_dls(DF), [12], **kw)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit_zero_restarts(2, 1, 1e-2, seed=0)
    return learn

def blend(noise=None):
    models = [snapshots(noise=noise).averaged_model(), learner(noise, calibrate=False, members=2).averaged_model()]
    made = snapshots(noise=noise)
    learn = blended_learner(made.dls, BlendedModel(models, [.7,.3], *(['mixture'] if noise else [])), noise=made.loss_func.noise if noise else None)
    learn.remove_cb(learn.progress)
    return learn

MAKERS = dict(quantile=learner, mixture=lambda **kw: learner('mixture', members=2, **kw), gaussian=lambda **kw: learner('gaussian', fast=True, **kw),
              plain=lambda **kw: learner(None, **kw), members=lambda **kw: learner(None, members=2, **kw), passes=lambda **kw: learner(None, weight_p=.1, **kw),
              snapshots=snapshots, noisy_snapshots=lambda: snapshots(noise='quantile'), blend=blend, noisy_blend=lambda: blend('quantile'))

def ends_of(learn, df): return learn.predict_distribution(df)[['lower','upper']].to_numpy('float64')

@pytest.mark.parametrize('kind', MAKERS)
def test_get_preds_with_interval(kind, tmp_path):
    "The tuple is that of `get_preds`, and the ends are those of `predict_distribution`: also by group, of a test loader, of a loaded Learner"
    learn = MAKERS[kind]()
    learn.calibrate(.8, group='color', df=make_table(600, seed=1))
    assert calibration_of(learn).group_q
    kw = dict(with_input=True, with_decoded=True, with_loss=True)
    plain,res = learn.get_preds(**kw),learn.get_preds(with_interval=True, **kw)
    assert len(res)==len(plain)+2==7
    for a,b in zip(plain[0], res[0]): assert a.equal(b)
    for a,b in zip(plain[1:], res[1:]): assert a.equal(b)
    want = ends_of(learn, DF[160:])
    for end,w in zip(res[-2:], want.T):
        assert end.shape==(40,1) and end.dtype==res[1].dtype
        np.testing.assert_allclose(end[:,0], w, rtol=1e-4, atol=1e-5)
    learn.path = tmp_path
    learn.export()
    for one in (learn,load_learner(tmp_path/'export.pkl')):
        with one.no_bar(): preds,targs,lower,upper = one.get_preds(dl=one.dls.test_dl(DF[:30].drop(columns='y')), with_interval=True)
        assert targs is None
        np.testing.assert_allclose(torch.cat([lower,upper], 1), ends_of(one, DF[:30]), rtol=1e-4, atol=1e-5)
        with one.no_bar(): assert one.get_preds(dl=one.dls.test_dl(DF[:0]), with_interval=True)==(None,)*4

def test_of_a_noise_model_without_a_calibration_they_hold_90_percent():
    learn = learner(calibrate=False)
    _,_,lower,upper = learn.get_preds(0, with_interval=True)
    np.testing.assert_allclose(torch.cat([lower,upper], 1), learn.predict_distribution(DF[:160])[['q05','q95']], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('fast', [False,True])
@pytest.mark.parametrize('kind', ['quantile','members','snapshots'])
def test_the_order_of_rows(kind, fast):
    learn = MAKERS[kind]()
    if fast: learn.accelerate()
    learn.calibrate(.8, group='color', df=make_table(600, seed=1))
    inputs,*_,lower,upper = learn.get_preds(with_input=True, with_interval=True)
    place = {v:i for i,v in enumerate(inputs[1][:,1].tolist())}
    dl = learn.dls.valid.new(shuffle=True, bs=7)        # fastai's draws some rows twice and others never
    for reorder in (True,False):
        rows,_,_,low,high = learn.get_preds(dl=dl, with_input=True, reorder=reorder, with_interval=True)
        order = [place[v] for v in rows[1][:,1].tolist()]
        assert (order==sorted(order))==reorder
        np.testing.assert_allclose(low, lower[order], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(high, upper[order], rtol=1e-4, atol=1e-5)

def test_nothing_is_predicted_twice_and_nothing_stays():
    for kind in ('quantile','plain','noisy_snapshots','mixture','members','snapshots'):
        learn,calls = MAKERS[kind](),[]
        learn.calibrate(.8)
        dl = learn.dls.valid.new(bs=1000)
        hook = learn.model.register_forward_hook(lambda *args: calls.append(1))
        cbs = list(learn.cbs)
        learn.get_preds(dl=dl)
        plain = len(calls)
        learn.get_preds(dl=dl, with_interval=True)
        assert len(calls)==2*plain and list(learn.cbs)==cbs, kind
        learn.predict_distribution(DF[160:])
        assert len(calls)==4*plain and list(learn.cbs)==cbs, kind       # two batches
        hook.remove()

@pytest.mark.parametrize('kind', ['members','snapshots'])
def test_what_other_callbacks_do_to_predictions_is_in_the_interval(kind):
    "The members of snapshots pass through all callbacks, those of a masked ensemble through none"
    class Up(Callback):
        def after_pred(self): self.learn.pred = self.pred+10
    learn = MAKERS[kind]()
    learn.calibrate(.8)
    *_,lower,upper = learn.get_preds(with_interval=True)
    *_,low,high = learn.get_preds(with_interval=True, cbs=Up())
    torch.testing.assert_close(low, lower+10)
    torch.testing.assert_close(high, upper+10)
    assert getattr(learn.model, 'average', 'mean')=='mean' and learn.get_preds(with_interval=True)[3].equal(upper)

def test_an_error_while_members_are_kept_leaves_nothing_behind():
    class Fails(Callback):
        def after_batch(self): raise RuntimeError('stop')
    for kind in ('members','snapshots'):
        learn = MAKERS[kind]()
        learn.calibrate(.8)
        want,cbs = learn.get_preds(with_interval=True),list(learn.cbs)
        with pytest.raises(RuntimeError, match='stop'): learn.get_preds(with_interval=True, cbs=Fails())
        assert list(learn.cbs)==cbs and all(a.equal(b) for a,b in zip(learn.get_preds(with_interval=True), want))

def test_activation_inner_and_batches():
    learn = learner()
    want = learn.get_preds(with_interval=True)
    outs,_,lower,upper = learn.get_preds(act=lambda o: o+1, with_interval=True)
    assert outs.equal(want[0]+1) and lower.equal(want[2]) and upper.equal(want[3])
    batch = learn.dls.valid.one_batch()
    _,_,lower,_ = learn.get_preds(dl=[batch], with_interval=True)
    np.testing.assert_allclose(lower, want[2][:len(lower)], rtol=1e-5)
    seen = []
    class Inner(Callback):
        def after_epoch(self): seen.append(self.learn.get_preds(inner=True, with_interval=True))
    learn = learner(calibrate=False)
    with learn.no_logging(): learn.fit(1, cbs=Inner())
    assert [t.shape for t in seen[0]]==[(40,1)]*4
    for a,b in zip(seen[0], learn.get_preds(with_interval=True)): assert a.equal(b)

def test_two_targets_and_the_scale_of_the_targets():
    df = DF.assign(z=DF.y*1e6)
    set_seed(0)
    learn = tabular_learner(make_dls(df, ['y','z']), [12], noise='mixture')
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-2)
    learn.calibrate()
    preds,targs,lower,upper = learn.get_preds(with_interval=True)
    assert preds.shape==lower.shape==upper.shape==(40,2) and (lower<upper).all()
    np.testing.assert_allclose(upper, learn.predict_distribution(df[160:])[['y_upper','z_upper']], rtol=1e-4)

def test_errors_name_with_interval():
    plain = learner(None, calibrate=False)
    with pytest.raises(ValueError, match='`with_interval` needs a Learner with `noise`.*with_interval=True'): plain.get_preds(with_interval=True)
    df = DF.assign(y=np.where(DF.y>0, 'a', 'b'))
    classes = tabular_learner(make_dls(df), [12])
    classes.remove_cb(classes.progress)
    with pytest.raises(ValueError, match='`with_interval` must be False for classes'): classes.get_preds(with_interval=True)
    classes.calibrate()
    with pytest.raises(ValueError, match='`with_interval` must be False for classes'): classes.get_preds(with_interval=True)
    learn = learner()
    learn.calibrate(group='site', df=make_table(600).assign(site=lambda d: d.index%2))
    for dl in (None,learn.dls.test_dl(DF[:5]),[learn.dls.valid.one_batch()]):
        with pytest.raises(ValueError, match="`with_interval` needs rows with the column 'site'"): learn.get_preds(dl=dl, with_interval=True)
    assert len(learn.get_preds(dl=learn.dls.test_dl(DF[:5].assign(site=1)), with_interval=True))==4
    averaged = snapshots()
    averaged.calibrate()
    averaged.snapshot_ensemble.use = 'last'
    with pytest.raises(ValueError, match="the calibration is for use='average'"): averaged.get_preds(with_interval=True)

def test_levels_that_encoding_cannot_tell_from_missing_ones_are_told():
    learn,more = learner(),make_table(600, seed=1)
    learn.calibrate(group='color', df=more.assign(color=more.color.fillna('violet')))
    assert sorted(calibration_of(learn).group_q)==['blue','green','red','violet']
    with pytest.warns(UserWarning, match="'color' is missing or unseen in 2 rows"):
        learn.get_preds(dl=learn.dls.test_dl(DF[4:6].assign(color=['violet',None])), with_interval=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.get_preds(dl=learn.dls.test_dl(DF[4:6].assign(color='red')), with_interval=True)
        learn.calibrate(group='color', df=more[more.color.notna()])
        learn.get_preds(with_interval=True)       # one interval for all others

@pytest.mark.parametrize('procs', [[Categorify,FillMissing,Normalize], [Categorify,FillMissingAnywhere,QuantileNormalize]])
def test_groups_of_a_number_with_gaps_are_those_of_the_frame(procs):
    "Encoded, its gaps are filled, and whole numbers are a little off"
    r = np.random.default_rng(0)
    df = DF.assign(year=r.choice([1990.,2003.,2011.,np.nan], 200))
    df = pd.concat([df]*4, ignore_index=True)
    set_seed(0)
    learn = tabular_learner(TabularDataLoaders.from_df(df, procs=procs, cat_names=['color'], cont_names=['b','year'], y_names='y',
                                                       valid_idx=range(400, 800), bs=64), [8], noise='gaussian')
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    own = learn.calibrate(group='year').group_q
    framed = learn.calibrate(group='year', df=df[400:]).group_q
    assert sorted(own)==sorted(framed)==['#na#','1990','2003','2011']
    for k in own: torch.testing.assert_close(own[k], framed[k], rtol=1e-5, atol=1e-6)
    with learn.no_bar(): _,_,lower,upper = learn.get_preds(with_interval=True)
    np.testing.assert_allclose(torch.cat([lower,upper], 1), ends_of(learn, df[400:]), rtol=1e-4, atol=1e-5)

def test_levels_that_are_numbers_are_known_in_any_type():
    "A column of codes with a gap has 2.0 for 2"
    df = pd.concat([DF.assign(code=DF.code.astype('float64').where(DF.index>2))]*3, ignore_index=True)
    set_seed(0)
    learn = tabular_learner(make_dls(df), [8], noise='gaussian')
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    learn.calibrate(group='code', df=df.dropna(subset='code').astype({'code': 'int64'}))
    assert set(calibration_of(learn).group_q)==set('012345')
    with warnings.catch_warnings(),learn.no_bar():
        warnings.simplefilter('error', UserWarning)
        _,_,lower,upper = learn.get_preds(0, with_interval=True)      # rows without a code have the interval of all rows, as in a frame
    np.testing.assert_allclose(torch.cat([lower,upper], 1), ends_of(learn, df[:480]), rtol=1e-4, atol=1e-5)
