"Learners with noise models and calibrations: every way to save, copy and predict keeps what they predict"
from copy import deepcopy
import json, warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import (Categorify, DataLoader, DataLoaders, FillMissing, Learner, MSELossFlat, MultiCategoryBlock, Normalize, TabularDataLoaders,
                                load_learner, rmse, set_seed)
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.calibrate import *
from fastai_dropconnect.callback.distribution import DistributionMetric
from fastai_dropconnect.serialize.export import input_columns
from fastai_dropconnect.uncertainty.noise import *
from conftest import make_dls, make_table

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
DF = make_table(200)


def learner(noise='quantile', config=None, restarts=False, fit=True, dls=None, **kwargs):
    set_seed(0)
    config = config and tabular_dropconnect_config(**config)
    learn = tabular_learner(dls or make_dls(DF), [12], config=config, noise=noise, **kwargs)
    learn.remove_cb(learn.progress)
    if not fit: return learn
    with learn.no_logging():
        if restarts: learn.fit_zero_restarts(2, 1, 1e-2, seed=0)
        else: learn.fit_one_cycle(1, 1e-2)
    return learn

KINDS = [('quantile',dict()), ('mixture',dict()), ('gaussian',dict()), ('quantile',dict(config=dict(members=3))),
         ('mixture',dict(restarts=True)), ('quantile',dict(config=dict(members=2, weight_p=.1), restarts=True)),
         (NoiseModel('quantile', n_levels=9),dict(fast=True))]


def frame(learn): return learn.predict_distribution(DF[:20])

def assert_same(a, b): pd.testing.assert_frame_equal(a, b, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('noise,kw', KINDS)
def test_what_is_predicted_survives_every_file(noise, kw, tmp_path):
    learn = learner(noise, path=tmp_path, metrics=rmse, **kw)
    learn.calibrate(.8)
    want,state = frame(learn),{k:v.clone() for k,v in learn.model.state_dict().items()}
    assert set(want) >= {'mean','sd','lower','upper','q05','q95','sd_noise','sd_members','warnings'}
    assert (want.lower<=want.upper).all() and (want.q05<=want.q50).all() and want.drop(columns='warnings').notna().all().all()
    n_members = (2 if kw.get('restarts') else 1)*kw.get('config', {}).get('members', 1)
    assert (want.sd_members.max()>1e-4) == (n_members>1)
    learn.export()
    assert_same(frame(load_learner(tmp_path/'export.pkl')), want)
    learn.save('m')
    other = learner(noise, path=tmp_path, fit=False, **{k:v for k,v in kw.items() if k!='restarts'}).load('m')
    assert_same(frame(other), want)
    save_model(learn, tmp_path/'model')
    again = load_model(tmp_path/'model')
    assert_same(frame(again), want)
    assert again.predict(DF.iloc[0])[2].numpy() == pytest.approx(want['mean'].iloc[0], abs=1e-5)
    rows = DF[:20].astype(object).where(DF[:20].notna(), None).to_dict('records')
    np.testing.assert_allclose(load_predictor(tmp_path/'model').predict_rows(rows)[:,0], want['mean'], rtol=1e-4, atol=1e-4)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k]), k
    assert learn.model.training is False and [type(m).__name__ for m in learn.metrics]==['AccumMetric']


@pytest.mark.parametrize('noise,kw', KINDS[:5])
def test_everything_that_predicts_returns_means(noise, kw):
    learn = learner(noise, metrics=rmse, **kw)
    preds,targs = learn.get_preds()
    assert preds.shape == (40,1)
    loss,error = learn.validate()
    assert error == pytest.approx((preds-targs).square().mean().sqrt().item(), rel=1e-4)
    losses = learn.get_preds(with_loss=True)[2]
    assert losses.shape == (40,) and losses.mean().item() == pytest.approx(loss, rel=1e-4)
    pred,_ = predicted(learn, learn.dls.valid)
    torch.testing.assert_close(pred.mean, preds)
    if not kw: return
    members,_ = learn.get_member_preds()
    torch.testing.assert_close(members.mean(1), preds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(members.std(1, correction=0), pred.distribution.sd_members, rtol=1e-3, atol=1e-4)


def test_an_ensemble_predicts_the_mixture_of_its_members():
    learn = learner('mixture', config=dict(members=2), restarts=True)
    whole = predicted(learn, learn.dls.valid)[0].distribution
    x = whole.mean
    parts = []
    for cycle in learn.snapshot_ensemble.record:
        with learn.snapshot_ensemble.using(cycle): parts.append(predicted(learn, learn.dls.valid)[0].distribution.cdf(x))
    torch.testing.assert_close(whole.cdf(x), torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6)


def test_several_targets():
    df = DF.assign(z=100*DF.y+7)
    learn = learner('quantile', dls=make_dls(df, ['y','z']), metrics=rmse)
    learn.calibrate()
    got = learn.predict_distribution(df[:5])
    assert {'y_mean','z_mean','y_lower','z_q95'} <= set(got)
    assert (got.z_sd>20*got.y_sd).all()


def test_columns_of_the_average_are_of_means():
    learn = learner('quantile', fit=False, metrics=[rmse,DistributionMetric('crps')])
    with learn.no_logging(): learn.fit_zero_restarts(2, 1, 1e-2, seed=0)
    dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    loss,error,crps = learn.validate()
    assert learn.snapshot_ensemble.report().iloc[-1].to_dict()['average_rmse'] == pytest.approx(error, rel=1e-4)
    assert learn.snapshot_ensemble.report().iloc[-1].to_dict()['average_crps'] == pytest.approx(crps, rel=1e-4)


def test_a_fit_ends_the_calibration_and_lr_find_does_not(tmp_path):
    learn = learner(path=tmp_path)
    learn.calibrate()
    with learn.no_logging(): learn.lr_find(show_plot=False, num_it=12)
    assert calibration_of(learn) is not None
    with pytest.warns(UserWarning, match='ends the calibration'), learn.no_logging(): learn.fit(1)
    assert calibration_of(learn) is None
    learn.save('plain')
    learn.calibrate()
    learn.load('plain')         # other weights, without a calibration
    assert calibration_of(learn) is None


def test_numbers_without_a_noise_model():
    learn = learner(None)
    assert learn.calibrate().method=='split'
    with pytest.raises(ValueError, match="`method` must be one of 'split', 'pit', got"): learn.calibrate(method='local')
    ens = learner(None, config=dict(members=3))
    assert ens.calibrate().method=='local'
    got = ens.predict_distribution(DF[:5])
    assert list(got) == ['mean','sd','lower','upper','sd_members','warnings'] and (got.sd>=got.sd_members*0).all()


def test_the_spread_of_noisy_passes_sets_the_width(tmp_path):
    learn = learner(None, config=dict(weight_p=.1), path=tmp_path)
    assert learn.calibrate(method='split').passes==0
    cal = learn.calibrate()
    assert (cal.method,cal.passes,cal.p) == ('local',50,None)
    want = frame(learn)
    width = want.upper-want.lower
    samples,_ = learn.get_mc_preds(50, dl=learn.dls.test_dl(DF[:20]), seed=0)
    sd = (cal.noise+cal.factor*samples.std(1).double().square()).sqrt()[:,0].numpy()
    np.testing.assert_allclose(width, 2*cal.q.item()*sd, rtol=1e-5)
    assert_same(frame(learn), want)                 # it repeats
    np.testing.assert_allclose((want.lower+want.upper)/2, learn.get_preds(dl=learn.dls.test_dl(DF[:20]))[0][:,0], rtol=1e-5, atol=1e-6)
    learn.export()
    assert_same(frame(load_learner(tmp_path/'export.pkl')), want)
    save_model(learn, tmp_path/'model')
    assert_same(frame(load_model(tmp_path/'model')), want)
    learn.update_calibration(DF[:10])
    assert len(cal.scores)==50
    plain = learner(None)
    assert plain.calibrate(p=.1, passes=8).method=='local' and calibration_of(plain).p==.1
    for other,kw in ((learner(),dict(passes=5)),(learner(None, config=dict(members=2)),dict(p=.1)),(learn,dict(passes=5, method='split'))):
        with pytest.raises(ValueError, match=f"`{list(kw)[0]}` is for method 'local'"): other.calibrate(**kw)


def test_groups_and_times_from_the_rows_of_the_learner():
    df = DF.assign(day=pd.date_range('2020-01-01', periods=len(DF)))
    learn = learner(dls=make_dls(df))
    cal = learn.calibrate(.5, by='day', group='color', last=25)
    assert len(cal.scores)==25 and set(cal.groups) <= {'red','green','blue','#na#'}
    with pytest.raises(ValueError, match="no column 'year'"): learn.calibrate(by='year')
    n = len(cal.scores)
    learn.update_calibration(df[:10].assign(day=df.day.max()+pd.Timedelta(days=1)))
    assert len(calibration_of(learn).scores)==n and (calibration_of(learn).times.diff()>=0).all()
    with pytest.raises(ValueError, match='color'): learn.predict_distribution(df[:3].drop(columns='color'))


@pytest.mark.parametrize('kw,name', [(dict(n_out=3), 'n_out'), (dict(y_range=(0,1)), 'y_range'), (dict(loss_func=rmse), 'loss_func')])
def test_what_a_noise_model_decides_cannot_be_given(kw, name):
    with pytest.raises(ValueError, match=f'`{name}` must be None with `noise`'): learner(fit=False, **kw)


def test_no_noise_model_for_classes_and_targets_without_end():
    with pytest.raises(ValueError, match='for classes'): learner(fit=False, dls=make_dls(DF.assign(y=np.where(DF.y>0, 'a', 'b'))))
    for y in (DF.y.where(DF.index%5>0), DF.y.where(DF.index%5>0, np.inf)):      # with gaps, infinite
        with pytest.raises(ValueError, match=r"finite targets in the training rows, but those of \['y'\]"):
            learner(fit=False, dls=make_dls(DF.assign(y=y)))


def test_too_few_rows_give_infinite_intervals_and_say_so():
    learn = learner()
    with pytest.warns(UserWarning, match=r'level=0.999 needs at least 999 rows to calibrate with, got 40'): learn.calibrate(.999)
    got = learn.predict_distribution(DF[:3])
    assert (got.lower==-np.inf).all() and (got.upper==np.inf).all()
    with pytest.warns(UserWarning, match='needs at least 9 rows to calibrate with, got 8'): learn.calibrate(last=8)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert learn.calibrate(last=9).q.isfinite().all()
        learn.update_calibration(DF[:2])
    with pytest.warns(UserWarning, match='got 40 with half_life=2'): learn.calibrate(half_life=2)


def test_too_few_rows_for_both_ends_give_infinite_intervals_and_say_so():
    learn = learner()
    with pytest.warns(UserWarning, match='needs at least 19 rows to calibrate with, got 18'): learn.calibrate(method='pit', last=18)
    assert learn.predict_distribution(DF[:3]).lower.isin([-np.inf]).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.calibrate(method='pit', last=19)
    assert np.isfinite(learn.predict_distribution(DF[:3])[['lower','upper']]).all(axis=None)


def test_a_calibration_that_does_not_fit_is_refused():
    learn = learner()
    learn.calibrate()
    learn.loss_func = MSELossFlat()
    with pytest.raises(ValueError, match="calibration 'cqr' does not fit"): learn.predict_distribution(DF[:2])
    learn = learner()
    learn.calibrate(method='pit')
    learn.loss_func = MSELossFlat()
    with pytest.raises(ValueError, match="calibration 'pit' does not fit"): learn.predict_distribution(DF[:2])
    ens = learner(None, restarts=True)
    for method in ('local','pit','split'):
        ens.snapshot_ensemble.use = 'average'
        ens.calibrate(method=method)
        ens.snapshot_ensemble.use = 'last'
        with pytest.raises(ValueError, match="calibration is for use='average'"): ens.predict_distribution(DF[:2])
    plain = learner(None)
    plain.calibrate()
    with pytest.warns(UserWarning, match='`set_noise` ends the calibration'): plain.set_noise('quantile')
    assert calibration_of(plain) is None
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        plain.set_noise('gaussian')     # there is none to end


@pytest.mark.parametrize('use', ['average', 'last', 1, 'weights'])
def test_a_calibration_remembers_which_snapshots_predicted(use, tmp_path):
    "Also in a file: other snapshots are refused, and the same ones are not"
    learn = learner(None, restarts=True, path=tmp_path)
    ens = learn.snapshot_ensemble
    ens.average_weights()
    ens.use = use
    learn.calibrate()
    want = frame(learn)
    other = 0 if use=='average' else 'average'
    ens.use = other     # what is saved predicts otherwise than when it was calibrated
    learn.export()
    learn.save('m')
    save_model(learn, tmp_path/'model')
    fresh = learner(None, fit=False, path=tmp_path)
    fresh.calibrate()       # with one of its own
    for again in (load_learner(tmp_path/'export.pkl'), learner(None, fit=False, path=tmp_path).load('m'), fresh.load('m'), load_model(tmp_path/'model'), deepcopy(learn)):
        assert again.snapshot_ensemble.use==other and calibration_of(again).use==use
        with pytest.raises(ValueError, match=f'calibration is for use={use!r}: .* got use={other!r}'): frame(again)
        again.snapshot_ensemble.use = use
        assert_same(frame(again), want)


def test_a_calibration_without_snapshots_fits_any(tmp_path):
    "As do those of older files, which do not say what predicted"
    learn = learner(None, restarts=True)
    learn.calibrate(method='split')
    save_model(learn, tmp_path/'model')
    file = tmp_path/'model'/'model.json'
    config = json.loads(file.read_text())
    assert config['calibration'].pop('use')=='average'
    file.write_text(json.dumps(config))
    again = load_model(tmp_path/'model')
    again.snapshot_ensemble.use = 'last'
    assert calibration_of(again).use is None and len(frame(again))==20
    plain = learner(None)
    assert plain.calibrate().use is None and len(frame(plain))==20


@pytest.mark.parametrize('noise,method', [(None,'split'),('quantile','cqr'),('quantile','split'),('quantile','local')])
def test_ends_that_move_apart_follow_a_shift(noise, method, tmp_path):
    learn,shifted = learner(noise, path=tmp_path),DF.assign(y=DF.y+3)
    learn.calibrate(method=method, df=shifted)
    wide = learn.predict_distribution(DF)
    learn.calibrate(method=method, df=shifted[:100], symmetric=False)
    learn.update_calibration(shifted[100:])
    got = learn.predict_distribution(DF)
    assert .85 < shifted.y.between(got.lower, got.upper).mean() < .95
    assert (got.upper-got.lower).mean() < .7*(wide.upper-wide.lower).mean() and got.upper.mean() > DF.y.mean()+3
    learn.export()
    again = load_learner(tmp_path/'export.pkl').predict_distribution(DF)
    np.testing.assert_array_equal(again[['lower','upper']], got[['lower','upper']])


def test_no_rows_to_calibrate_with_are_named(tmp_path):
    learn = learner(path=tmp_path)
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    for f in (loaded.calibrate,loaded.show_calibration):
        with pytest.raises(ValueError, match='`df` must be given'): f()
        with pytest.raises(ValueError, match='`df` must have rows'): f(df=DF[:0])
    assert loaded.calibrate(df=DF).q.isfinite().all()
    with torch.no_grad(): next(learn.model.parameters()).fill_(np.nan)
    with pytest.raises(ValueError, match='predictions must be finite'): learn.calibrate()


def test_temperatures_take_the_latest_rows_and_known_classes():
    df = DF.assign(y=np.where(DF.y>0, 'a', 'b'), day=pd.date_range('2020-01-01', periods=len(DF))[::-1])
    learn = learner(None, dls=make_dls(df))
    first = learn.calibrate(df=df[:60]).temperature
    assert learn.calibrate(df=df, by='day', last=60).temperature == pytest.approx(first, rel=1e-3) != learn.calibrate(df=df).temperature
    with pytest.raises(ValueError, match='but 5 are not'): learn.calibrate(df=df[:5].assign(y='c'))
    for kw in (dict(group='color'), dict(half_life=3.)):
        with pytest.raises(ValueError, match=f'`{list(kw)[0]}` must be None for classes'): learn.calibrate(**kw)


@pytest.mark.parametrize('noise', ['quantile','mixture'])
@pytest.mark.parametrize('scale', [1e-25,1e12,1e25])
def test_targets_of_any_scale(noise, scale):
    df = DF.assign(y=DF.y.astype('float64')*scale)
    learn = learner(noise, dls=make_dls(df), config=dict(members=2))
    learn.calibrate()
    got = learn.predict_distribution(df[160:])
    assert np.isfinite(got[['sd','sd_noise','sd_members','lower','upper']]).all(axis=None) and (got[['sd_noise','sd_members']]>0).all(axis=None)
    assert ((got.lower<=df.y[160:]) & (df.y[160:]<=got.upper)).mean() >= .9
    learn.metrics = DistributionMetric('crps')
    assert 0 < learn.validate()[1]/scale < 5


@pytest.mark.parametrize('kw', [dict(), dict(config=dict(members=2))])
def test_small_targets_without_a_noise_model_have_small_intervals(kw):
    df = DF.assign(y=1e-27*DF.y.astype('float64'))
    learn = learner(None, dls=make_dls(df), fit=False, **kw)
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    for method in ('pit','split'):
        learn.calibrate(method=method)
        got = learn.predict_distribution(df[160:])
        assert 1e-27 < (got.upper-got.lower).mean() < 2e-26 and got.upper.ge(df.y[160:]).mean() > .9, method


def test_groups_and_times_are_those_of_the_rows_as_they_were():
    df = DF.assign(year=np.arange(len(DF))+2000.)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code'], cont_names=['a','year'],
                                     y_names='y', valid_idx=list(range(80, 200)), bs=32)
    learn = learner(dls=dls)
    cal = learn.calibrate(.5, by='year', group='code')
    np.testing.assert_allclose(cal.times, df.year[80:], atol=.1)        # not the normalized numbers
    cal.group_q['2'] = torch.tensor([100.]).double()
    rows = df[df.code==2][:3]
    for code in (2, 2., np.float32(2)): assert (learn.predict_distribution(rows.assign(code=code)).upper>50).all()
    assert cal.quantiles_for(1, [2.])==100
    by_color = learn.calibrate(.5, group='color')
    by_color.group_q['#na#'] = torch.tensor([100.]).double()
    assert (learn.predict_distribution(df[df.color.isna()][:3]).upper>50).all()


def test_unseen_levels_are_told_without_a_guard(tmp_path):
    learn = learner(path=tmp_path)
    learn.export()
    odd = DF[:3].assign(color=['violet',None,'red'], code=[1,77,2])
    for l in (learn,load_learner(tmp_path/'export.pkl')):
        assert l.predict_distribution(odd).warnings.tolist() == ["color: 'violet' is new",'code: 77 is new','']


def test_the_fast_path_trains_the_same_network():
    a = learner('quantile', fit=False)
    b = learner('quantile', fit=False).accelerate(replacement=True, valid_bs=32)
    for l in (a,b):
        set_seed(1)
        with l.no_logging(): l.fit(1, 1e-2)
    for k,v in a.model.state_dict().items(): torch.testing.assert_close(v, b.model.state_dict()[k], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.predict(DF.iloc[0])[2], a.predict(DF.iloc[0])[2], rtol=1e-4, atol=1e-5)


def test_an_exported_program_returns_the_means(tmp_path):
    learn = learner('quantile', restarts=True)
    want,_ = learn.get_preds()
    program = torch.export.load(export_program(learn, tmp_path/'m.pt2')).module()
    encoder = RowEncoder(*input_columns(learn))
    rows = DF[160:].astype(object).where(DF[160:].notna(), None).to_dict('records')
    cats,conts = [torch.from_numpy(t) for t in encoder(rows)]
    torch.testing.assert_close(program(cats, conts), want, rtol=1e-4, atol=1e-4)


def test_a_trained_learner_gets_a_noise_model():
    learn = learner(None, metrics=rmse)
    body = {k:v.clone() for k,v in learn.model.state_dict().items() if not k.startswith('layers.1')}
    learn.set_noise('quantile')
    for k,v in body.items(): assert torch.equal(v, learn.model.state_dict()[k]), k
    with learn.no_logging(): learn.fit(1, 1e-2)
    assert learn.get_preds()[0].shape==(40,1) and len(learn.validate())==2
    learn.set_noise('gaussian')         # and another one
    assert [type(m).__name__ for m in learn.model.layers][-1]=='NoiseHead' and len(learn.model.layers)==3
    assert frame(learn).sd.gt(0).all()
    snapshots = learner(None, restarts=True)
    with pytest.raises(ValueError, match='without snapshots'): snapshots.set_noise()
    with pytest.raises(ValueError, match="`noise` must be one of 'quantile', 'mixture', 'gaussian', got noise=None"): learn.set_noise(None)


@pytest.mark.parametrize('path,value,message', [
    (['calibration','method'], 'best', 'calibration.method'), (['calibration','level'], 2, 'calibration.level'),
    (['calibration','temperature'], None, 'calibration.temperature'), (['calibration','half_life'], 0, 'calibration.half_life'),
    (['calibration','passes'], -1, 'calibration.passes'), (['calibration','p'], 1, 'calibration.p'),
    (['calibration','last'], 0, 'calibration.last'), (['calibration','groups'], ['a'], 'calibration.groups'),
    (['calibration','more'], 1, "unknown field 'more'"), (['network','noise','kind'], 'normal', 'network.noise.kind'),
    (['network','noise','n_levels'], 20, 'network.out_sz'), (['network','noise'], None, 'loss.beta'),
    (['loss','n_levels'], 2**40, 'loss.n_levels'), (['loss','n_targets'], 2, 'loss.n_targets')])
def test_a_file_from_a_stranger_is_checked(path, value, message, saved_config):
    from fastai_dropconnect.serialize.description import check_description
    config = deepcopy(saved_config)
    check_description(config)
    place = config
    for n in path[:-1]: place = place[n]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message.replace('.', r'\.')): check_description(config)

@pytest.fixture(scope='module')
def saved_config(tmp_path_factory):
    from fastai_dropconnect.serialize.files import SavedModel
    learn = learner(fit=False)
    learn.calibrate()
    return SavedModel(save_model(learn, tmp_path_factory.mktemp('m')/'model')).config


def test_a_learner_with_snapshots_is_not_made_compact():
    ens = learner(None, restarts=True)
    with pytest.raises(ValueError, match='must have no snapshots.*remove `snapshot_ensemble`'):
        with compacted(ens): pass
    ens.remove_cb(ens.snapshot_ensemble)
    model = ens.model
    with compacted(ens): assert ens.model is not model
    assert ens.model is model


def test_the_spread_of_a_blend_is_found_where_the_model_is(monkeypatch):
    import fastai_dropconnect.callback.calibrate as module
    from fastai_dropconnect.callback.calibrate import predicted
    learn = learner(None)
    learn.model = BlendedModel([learn.model, deepcopy(learn.model)])
    devices = []
    monkeypatch.setattr(module, 'to_device', lambda b, device: devices.append(device) or b)
    assert predicted(learn, [learn.dls.valid.one_batch()[:2]])[0].spread.shape[1]==1 and devices==[torch.device('cpu')]


def test_dates_of_any_unit_are_one_time():
    "A CSV file gives another unit than `pd.to_datetime` of a list or a database, and text is dates, too"
    df = DF.assign(day=pd.date_range('2020-01-01', periods=len(DF)).astype('datetime64[ns]'))
    learn = learner(dls=make_dls(df))
    want = learn.calibrate(by='day', last=20, df=df).times
    later = df[:10].assign(day=df.day.max()+pd.to_timedelta(np.arange(1, 11), unit='D'))
    for to in ('datetime64[s]', 'datetime64[us]', str, 'category', lambda s: s.dt.tz_localize('UTC'), lambda s: s.dt.date.astype(object)):
        change = to if callable(to) else lambda s, to=to: s.astype(to)
        change = change if change is not str else lambda s: s.astype(str)
        torch.testing.assert_close(learn.calibrate(by='day', last=20, df=df.assign(day=change(df.day))).times, want, rtol=0, atol=0)
        learn.calibrate(by='day', last=20, df=df)
        assert (learn.update_calibration(later.assign(day=change(later.day))).times > want.max()).sum()==10
    years = df.assign(year=2000+df.index%20)
    want = learn.calibrate(by='year', df=years).times
    for to in (object, 'category', 'float32', 'Int64'):
        assert torch.equal(learn.calibrate(by='year', df=years.assign(year=years.year.astype(to))).times, want)
    for wrong in ('color', df.day.dt.to_period('M'), df.day-df.day[0]):
        rows = df.dropna() if isinstance(wrong, str) else df.assign(span=wrong)
        name = wrong if isinstance(wrong, str) else 'span'
        with pytest.raises(ValueError, match=f"`by` must be a column of dates or numbers, got by='{name}'"): learn.calibrate(by=name, df=rows)


def test_what_is_no_table_or_lacks_columns_is_named():
    learn = learner()
    for n in ('a', 'color', 'b'):
        for rows in (DF[:3], DF[:0]):
            with pytest.raises(ValueError, match=rf"`df` must have the columns of the training frame, but \['{n}'\]"): learn.predict_distribution(rows.drop(columns=n))
        with pytest.raises(ValueError, match=rf"but \['{n}'\] are missing"): learn.calibrate(df=DF.drop(columns=n))
    learn.calibrate()
    with pytest.raises(ValueError, match=r"but \['a'\] are missing"): learn.update_calibration(DF.drop(columns='a'))
    for f in (learn.predict_distribution, learn.update_calibration, lambda df: learn.calibrate(df=df), learn.show_calibration):
        with pytest.raises(TypeError, match='`df` must be a pd.DataFrame, got Series'): f(DF.iloc[0])
    for name in ('by','group'):
        with pytest.raises(TypeError, match=rf"`{name}` must be the name of a column, got {name}=\['color'\]"): learn.calibrate(df=DF, **{name:['color']})
    x = torch.randn(40, 6)
    dl = DataLoader(list(zip(x, x[:,:1])), bs=8)
    plain = Learner(DataLoaders(dl, dl), torch.nn.Linear(6, 1), MSELossFlat())
    plain.remove_cb(plain.progress)
    assert plain.calibrate().q.isfinite().all()
    for f in (plain.predict_distribution, plain.update_calibration, lambda df: plain.calibrate(df=df), plain.show_calibration):
        with pytest.raises(TypeError, match='needs a Learner of a table, but its loaders have rows of list'): f(DF)
    with pytest.raises(TypeError, match='needs a Learner of a table'): plain.calibrate(by='day')


@pytest.mark.parametrize('noise,kw', KINDS[:4])
def test_training_metrics_are_of_the_same_distribution(noise, kw):
    "In training quantiles may cross: the metrics of an epoch without any learning are those of validation"
    metrics = [rmse]+[DistributionMetric(s) for s in ('crps','pinball','nll','coverage','width','winkler')]
    learn = learner(noise, fit=False, dls=make_dls(DF, bs=160), metrics=metrics, fast=True, **kw)       # each row once
    for m in learn.model.modules():
        if isinstance(m, torch.nn.BatchNorm1d): m.momentum = 1.      # validate with the statistics of the one batch
    learn.recorder.train_metrics = True
    with learn.no_logging(): learn.fit(1, 0., wd=0.)
    got = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    learn.recorder.train_metrics = False
    names = ['train__rmse','train_crps','train_pinball','train_nll','train_coverage_0.9','train_width_0.9','train_winkler_0.9']
    assert [got[n] for n in names] == pytest.approx(learn.validate(0)[1:], rel=.03)


def test_pinball_is_the_mean_over_19_levels():
    learn = learner('mixture', metrics=DistributionMetric('pinball'))
    rows = learn.predict_distribution(DF[160:])
    q,y = rows[[f'q{v:02}' for v in range(5, 100, 5)]].to_numpy('float64'),DF.y[160:].to_numpy('float64')[:,None]
    t = np.arange(5, 100, 5)/100
    assert learn.validate()[1] == pytest.approx(np.maximum(t*(y-q), (t-1)*(y-q)).mean(), rel=1e-4)


def test_several_classes_per_row_are_refused():
    df = DF.assign(warm=DF.a>0, big=DF.b>0)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color'], cont_names=['a','b'], y_names=['warm','big'],
                                     y_block=MultiCategoryBlock(encoded=True, vocab=['warm','big']), valid_idx=list(range(160, 200)), bs=32)
    learn = learner(None, dls=dls, metrics=DistributionMetric('nll'), fit=False)
    with pytest.raises(ValueError, match='`calibrate` needs a Learner that predicts numbers or one class per row'): learn.calibrate()
    assert calibration_of(learn) is None
    with pytest.raises(ValueError, match=r'needs one class per row, got probabilities \(32, 2\) for targets \(32, 2\)'): learn.validate()


def test_groups_that_are_too_small_for_a_correction_are_told():
    learn = learner()
    with pytest.warns(UserWarning, match="group='color' changes nothing: no group has 50 rows"): learn.calibrate(group='color')
    assert calibration_of(learn).group_q=={}
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert set(learn.calibrate(group='color', df=DF).group_q)=={'red','green','blue'}       # no value: too few


@pytest.mark.parametrize('method', ['local','pit'])
def test_the_latest_rows_are_all_that_counts(method):
    "Also for the model of the variance: with `last` a calibration is that of a frame of those rows, in whatever order they come"
    learn = learner(None, config=dict(members=3))
    df = make_table(300, seed=1).assign(day=np.arange(300))
    df['y'] += np.where(df.day<200, 9*np.sin(df.day), 0.)       # another world, until day 200
    want = learn.calibrate(method=method, df=df[200:])
    mixed = learn.calibrate(method=method, last=100, by='day', df=df.sample(frac=1, random_state=0))
    later = learn.calibrate(method=method, last=100, df=df)
    for cal in (mixed,later):
        torch.testing.assert_close(cal.noise, want.noise)
        torch.testing.assert_close(cal.factor, want.factor)
        torch.testing.assert_close(cal.q, want.q)
