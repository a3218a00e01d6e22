"DropConnect under fastai's own features, and the tabular learner's own promises"
import contextlib, copy, io, pickle, warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.tabular import learner as fastai_learner
from fastai.tabular.all import (Categorify, EarlyStoppingCallback, FillMissing, Normalize, SaveModelCallback, TabularDataLoaders,
                                TabularModel, accuracy, load_learner, ranger, rmse, set_seed, tabular_config)

from conftest import make_dls, make_table
from fastai_dropconnect.all import *

MODES = ['example', 'batch', 'gaussian']
modes = pytest.mark.parametrize('mode', MODES)


def quiet(learn):
    stack = contextlib.ExitStack()
    for c in (learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO())): stack.enter_context(c)
    return stack

def learner(dls, mode='batch', seed=0, layers=(20,10), weight_p=0.3, **kw):
    set_seed(seed)
    return tabular_learner(dls, layers=list(layers), config=tabular_dropconnect_config(weight_p=weight_p, mode=mode), metrics=rmse, **kw)

def fit(learn, n=1, **kw):
    with quiet(learn): learn.fit_one_cycle(n, 1e-2, **kw)
    return learn

def values(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def preds(learn, dl=None):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.valid if dl is None else dl)[0]

@pytest.mark.parametrize('members', [None, 2])
@pytest.mark.parametrize('fast', [False, True])
def test_columns_of_later_rows_in_any_order(fast, members):
    "fastai's loaders, too; `learn.predict` and a loader of `test_dl`"
    set_seed(0)
    learn = fit(tabular_learner(make_dls(), layers=[8], fast=fast, config=tabular_dropconnect_config(members=members, weight_p=.1)))
    df = make_table(50).drop(columns='y')
    reverse = df[list(df)[::-1]]
    want,loader = preds(learn, learn.dls.test_dl(df)),learn.dls.test_dl(reverse)
    assert torch.equal(preds(learn, loader), want)
    assert torch.allclose(learn.predict(reverse.iloc[3])[2], want[3], atol=1e-5)
    with learn.no_bar():
        if members: assert torch.equal(learn.get_member_preds(dl=learn.dls.test_dl(reverse))[0], learn.get_member_preds(dl=learn.dls.test_dl(df))[0])
        samples = [learn.get_mc_preds(n=3, seed=1, dl=learn.dls.test_dl(d))[0] for d in (df,reverse)]
        assert torch.equal(*samples)
        learn.calibrate(df=make_table(300)[list(make_table(1))[::-1]])
        pd.testing.assert_frame_equal(learn.predict_distribution(reverse), learn.predict_distribution(df))
        losses = [learn.validate(dl=learn.dls.test_dl(d[list(d)[::i]])) for d in [make_table(50)] for i in (1, -1)]
    assert losses[0]==losses[1]

# The one-line way in

def test_without_a_dropconnect_config_it_is_fastai(dls):
    for config in (None, {}, tabular_config(ps=0.1, embed_p=0.1)):
        runs = []
        for f in (tabular_learner, fastai_learner.tabular_learner):
            set_seed(3)
            runs.append(fit(f(dls, layers=[20,10], config=copy.copy(config), y_range=(-5,5))))
            runs[-1].end = preds(runs[-1])
        assert type(runs[0].model) is TabularModel and isinstance(runs[0], fastai_learner.TabularLearner)
        assert torch.equal(runs[0].end, runs[1].end)


@modes
def test_a_config_makes_the_model_and_is_not_used_up(dls, mode):
    config = tabular_dropconnect_config(weight_p=[0.1,0.2], out_p=0.05, mode=mode, embed_weight_p=0.1, y_range=(-3,3), ps=0.1)
    kept = dict(config)
    for c in (config, dict(config)):
        m = tabular_learner(dls, layers=[20,10], config=c).model
        assert type(m) is TabularDropConnectModel
        assert [l.p for l in m.modules() if isinstance(l, DropConnectLinear)] == [0.1, 0.2, 0.05]
        assert {l.mode for l in m.modules() if isinstance(l, DropConnectLinear)} == {mode} and {e.p for e in m.embeds} == {0.1}
        assert (m.layers[-1].low, m.layers[-1].high) == (-3,3)
    assert config == kept


def test_wrong_length_is_named_by_the_learner(dls):
    config = tabular_dropconnect_config(weight_p=[0.1]*3)
    with pytest.raises(ValueError, match=r'one per hidden layer \(2\)'): tabular_learner(dls, config=config)


@modes
def test_it_learns_and_a_seed_repeats_the_fit(dls, mode):
    a,b = [fit(learner(dls, mode, weight_p=0.1), 4) for _ in range(2)]
    assert torch.equal(values(a), values(b))
    assert a.recorder.values[-1][1] < 0.5*float(np.var(make_table().y))

# fastai's features

FEATURES = { # name: function of a folder
    'clip': lambda path: [GradientClip(0.1)],
    'accumulate': lambda path: [GradientAccumulation(64)],
    'fp16': lambda path: [MixedPrecision()],
    'bf16': lambda path: [MixedPrecision(amp_mode='bf16')],
    'save': lambda path: [SaveModelCallback(fname=str(path/'m'))],
    'stop': lambda path: [EarlyStoppingCallback(min_delta=100)],
    'recalibrate': lambda path: [RecalibrateBN()],
    'all': lambda path: [GradientClip(0.1), GradientAccumulation(64), SaveModelCallback(fname=str(path/'m')),
                         RecalibrateBN(every_epoch=True)]}

@modes
@pytest.mark.parametrize('name', FEATURES)
def test_composes_with_callbacks(dls, mode, name, tmp_path):
    learn = learner(dls, mode)
    before = values(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')     # autocast for CUDA on a machine without
        fit(learn, 2, cbs=FEATURES[name](tmp_path))
    assert (values(learn) != before).any() and values(learn).isfinite().all() and preds(learn).isfinite().all()


@modes
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_trains_under_autocast(dls, mode, dtype):
    learn = learner(dls, mode)
    forward = learn.model.forward
    def wrapped(*a):
        with torch.autocast('cpu', dtype=dtype): return forward(*a).float()
    learn.model.forward = wrapped
    fit(learn, 3)
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]


@modes
def test_lr_find_leaves_no_trace(dls, mode):
    learn = learner(dls, mode, cbs=RecalibrateBN())
    before = copy.deepcopy(learn.model.state_dict())
    with quiet(learn): learn.lr_find(num_it=10, show_plot=False)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])


@modes
def test_freezing_and_fine_tune(dls, mode):
    set_seed(0)
    split = lambda m: [list(m.embeds.parameters()), list(m.layers.parameters())]
    learn = learner(dls, mode, splitter=split)
    learn.freeze()
    emb = learn.model.embeds[0].weight.detach().clone()
    fit(learn)
    assert torch.equal(learn.model.embeds[0].weight, emb)
    learn.unfreeze()
    with quiet(learn): learn.fine_tune(1)
    assert (learn.model.embeds[0].weight != emb).any()


@modes
@pytest.mark.parametrize('opt', [ranger], ids=['ranger'])
def test_other_optimizers(dls, mode, opt):
    assert preds(fit(learner(dls, mode, opt_func=opt))).isfinite().all()


@modes
def test_save_load_and_the_plain_model_takes_the_weights(dls, mode, tmp_path):
    learn = fit(learner(dls, mode, path=tmp_path))
    learn.save('w')
    other = learner(dls, mode, seed=9, path=tmp_path)
    other.load('w')
    plain = fastai_learner.tabular_learner(dls, layers=[20,10], path=tmp_path)
    plain.load('w', with_opt=False)
    for l in (other, plain): assert torch.equal(preds(l), preds(learn))
    fit(other)


@modes
def test_export_and_load(dls, mode, tmp_path):
    learn = fit(learner(dls, mode, path=tmp_path, cbs=RecalibrateBN()))
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = make_table(40, seed=5).drop(columns='y')
    test.loc[0,'color'] = 'never seen'
    test.loc[1,['color','a']] = [None,np.nan]
    a,b = [preds(l, l.dls.test_dl(test)) for l in (learn, again)]
    assert a.shape == (40,1) and a.isfinite().all() and torch.equal(a, b)
    assert torch.equal(again.predict(test.iloc[3])[2], learn.predict(test.iloc[3])[2])
    fit(learn)      # the Learner in memory goes on
    assert type(pickle.loads(pickle.dumps(learn.model))) is TabularDropConnectModel


@pytest.mark.parametrize('trained', [False, True])
def test_export_does_not_grow_with_the_rows(trained, tmp_path):
    sizes = []
    for n in (300, 3000, 30000):
        learn = learner(make_dls(make_table(n), bs=256), path=tmp_path, cbs=RecalibrateBN())
        if trained: preds(fit(learn))
        learn.export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert max(sizes) < min(sizes)+2000, sizes      # 27,000 rows more; 2,000 bytes for a few medians and dates

# predict

def test_predict_takes_a_row_of_the_training_frame(dls):
    df,learn = make_table(),fit(learner(dls), 3)
    want = preds(learn, learn.dls.test_dl(df))
    for i in (0, 3, 5):      # 3 has gaps
        row,dec,pred = learn.predict(df.iloc[i])
        assert torch.allclose(pred, want[i], atol=1e-5)
        assert torch.allclose(learn.predict(df.drop(columns='y').iloc[i])[2], pred)
        assert isinstance(row.items, pd.DataFrame) and abs(row.items.y.iloc[0]-pred.item()) < 1e-5


@pytest.mark.parametrize('change', [
    lambda d: d.convert_dtypes(), lambda d: d.astype({'color':'category'}), lambda d: d.astype({'code':'float'}),
    lambda d: d.assign(extra=pd.Timestamp('2020-01-01'))], ids=['nullable','category','float','extra'])
def test_predict_takes_rows_of_other_frames(dls, change):
    df,learn = make_table(),fit(learner(dls))
    other = change(df.copy())
    for i in (0, 4, 5): assert torch.allclose(learn.predict(other.iloc[i])[2], learn.predict(df.iloc[i])[2], atol=1e-5)


def test_predict_of_classes():
    df = make_table()
    df['y'] = np.where(df.y > df.y.median(), 'high', 'low')
    set_seed(0)
    learn = fit(tabular_learner(make_dls(df), layers=[20], config=tabular_dropconnect_config(mode='batch'), metrics=accuracy))
    row,dec,probs = learn.predict(df.iloc[0])
    assert probs.shape == (2,) and abs(probs.sum()-1) < 1e-5 and dec.item() == probs.argmax().item()
    assert torch.allclose(learn.predict(df.drop(columns='y').iloc[0])[2], probs)


def test_predict_of_an_all_number_frame():
    df = make_table().drop(columns=['color','flag'])
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['code'], cont_names=['a','b'],
                                     y_names='y', valid_idx=list(range(100)), bs=32)
    learn = fit(tabular_learner(dls, layers=[20], config=tabular_dropconnect_config(mode='batch')))
    want = preds(learn, learn.dls.test_dl(df))
    for i in range(5): assert torch.allclose(learn.predict(df.iloc[i])[2], want[i], atol=1e-5)


def test_predict_names_what_is_wrong(dls):
    learn = learner(dls)
    with pytest.raises(TypeError, match='row is a DataFrame'): learn.predict(make_table()[:1])
    with pytest.raises(ValueError, match=r"\['color', 'b'\] are missing"): learn.predict(make_table().iloc[0].drop(['b','color']))

# Batch norm after noise

def test_recalibration_estimates_the_noise_free_statistics(dls):
    learn = fit(learner(dls, 'batch', weight_p=0.5), 2)
    learn.model.train()     # as within a fit
    recalibrate_bn(learn)
    bn = learn.model.layers[0][2]
    seen = []
    with bn.register_forward_pre_hook(lambda m,i: seen.append(i[0].detach())), torch.no_grad():
        learn.model.eval()
        for b in learn.dls.train: learn.model(*b[:2])
    x = torch.cat(seen)
    torch.testing.assert_close(bn.running_mean, x.mean(0), atol=0.05, rtol=0.05)
    torch.testing.assert_close(bn.running_var, x.var(0), atol=0.05, rtol=0.1)


@modes
def test_recalibration_changes_nothing_else(dls, mode):
    learn = fit(learner(dls, mode))
    learn.model.layers[0].eval()        # odd modes come back, too
    modes_before = [m.training for m in learn.model.modules()]
    before,rng,shuffle = copy.deepcopy(learn.model.state_dict()),torch.get_rng_state(),learn.dls.train.rng.getstate()
    assert recalibrate_bn(learn) is learn
    after = learn.model.state_dict()
    for k,v in after.items(): assert torch.equal(v, before[k]) != ('running' in k) or 'num_batches' in k
    assert modes_before == [m.training for m in learn.model.modules()]
    assert torch.equal(torch.get_rng_state(), rng) and learn.dls.train.rng.getstate() == shuffle
    assert all(m.momentum == 0.1 for m in learn.model.modules() if hasattr(m, 'momentum'))


def test_a_training_with_the_callback_goes_the_same_way(dls):
    a,b = [fit(learner(make_dls(), 'gaussian', cbs=cbs), 3) for cbs in (None, RecalibrateBN(every_epoch=True))]
    assert torch.equal(values(a), values(b))


def test_the_callback_acts_only_on_a_fit(dls, tmp_path):
    learn = fit(learner(dls, path=tmp_path))
    learn.save('noisy')
    learn.add_cb(RecalibrateBN())
    fit(learn)
    learn.load('noisy')
    before = copy.deepcopy(learn.model.state_dict())
    preds(learn)
    with quiet(learn): learn.validate()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])


@modes
def test_fewer_rows_than_a_batch(mode):
    # no training batch at all: nothing changes, nothing fails
    learn = fit(learner(make_dls(make_table(40), bs=64), mode, cbs=RecalibrateBN()))
    assert preds(learn).shape == (8,1)


def test_recalibration_without_batch_norm_or_rows(dls):
    set_seed(0)
    none = tabular_learner(dls, layers=[20], config=tabular_dropconnect_config(use_bn=False, bn_cont=False))
    before = copy.deepcopy(none.model.state_dict())
    recalibrate_bn(none)
    for k,v in none.model.state_dict().items(): assert torch.equal(v, before[k])
    learn = fit(learner(dls))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='`dl`'): recalibrate_bn(learn, dls.train.new(learn.dls.train_ds.new_empty()))
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])


def test_an_error_in_the_middle_keeps_the_old_statistics(dls):
    learn = fit(learner(dls))
    before = copy.deepcopy(learn.model.state_dict())
    batches = list(learn.dls.train)[:2]
    def failing():
        yield from batches
        raise RuntimeError('disk on fire')
    with pytest.raises(RuntimeError): recalibrate_bn(learn, failing())
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
