"Models without pickle: round trips, kills while writing, and a file of version 1 that is read forever; files of strangers in test_serialize_strangers.py"
import json, os
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.tabular import learner as fastai_learner
from fastai.tabular.all import (Callback, Categorify, CrossEntropyLossFlat, FillMissing, Normalize, OptimWrapper, ProgressCallback, TabDataLoader,
                                TabularDataLoaders, TabularPandas, TabularProc, Transform, mae, noop, set_seed, tabular_config)
from torch import nn
from conftest import make_dls, make_table
from fastai_dropconnect import files
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.snapshots import snapshot_ensemble
from fastai_dropconnect.serialize.fields import encode_values
from fastai_dropconnect.serialize.learner import load_model, save_model
from fastai_dropconnect.sparsity.compact import CompactModel

pytestmark = pytest.mark.filterwarnings('ignore')
FIXTURE = Path(__file__).parent/'fixtures'/'model_v1'


def shake(learn, seed=1):
    "Give weights and statistics values that training could have given them"
    g = torch.Generator().manual_seed(seed)
    for n,t in learn.model.state_dict().items():
        if t.is_floating_point() and not n.startswith('num_embeds.0'): t += .3*torch.rand(t.shape, generator=g)
    return quiet(learn)

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def with_snapshots(learn, use='average'):
    ens = snapshot_ensemble(learn)
    for c in range(3): shake(learn, c); ens.add_snapshot(c)
    if use=='weights': ens.average_weights()
    ens.use = use
    return learn

def small(df=None, target='y', seed=0, cls=tabular_learner, **kw):
    set_seed(seed)
    return shake(cls(make_dls(df, target), layers=[12,8], **kw))

def config(**kw): return tabular_dropconnect_config(**kw)
def quantiles(**kw):
    df = make_table(200)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissingAnywhere,QuantileNormalize(**kw)], cat_names=['color','code'], cont_names=['a','b'],
                                     y_names='y', valid_idx=range(150, 200), bs=32)
    return shake(tabular_learner(dls, layers=[12,8]))

def classes(): return make_table().assign(y=lambda d: np.where(d.y>1, 'high', 'low'))
def only(cats, conts):
    dls = TabularDataLoaders.from_df(make_table(200), procs=[Categorify,FillMissing,Normalize], cat_names=cats, cont_names=conts, y_names='y', valid_idx=range(150, 200))
    return shake(tabular_learner(dls, layers=[12]))

LEARNERS = {
    'fastai': lambda: small(cls=fastai_learner.tabular_learner, config=tabular_config(ps=[.1,.2], embed_p=.1, act_cls=nn.LeakyReLU(.2))),
    'lin_last': lambda: small(config=tabular_config(lin_first=False, bn_final=True), y_range=(-1,3), loss_func=F.l1_loss),
    'dropconnect': lambda: small(config=config(weight_p=[.1,.2], out_p=.1, mode='gaussian', embed_weight_p=.1, use_bn=False), cbs=RecalibrateBN()),
    'callback': lambda: small(cbs=DropConnect({'layers.0.0': .2}, mode='batch')),
    'ple': lambda: small(config=config(num_embeddings=PLE(4, 6, .1))),
    'periodic_members': lambda: small(config=config(num_embeddings='periodic', members=MaskedMembers(9, .25))),
    'classes': lambda: small(classes(), config=config(members=3), loss_func=CrossEntropyLossFlat(label_smoothing=.1)),
    'two_targets': lambda: small(make_table().assign(z=1.), ['y','z']),
    'snapshots': lambda: with_snapshots(small()),
    'classes_snapshots': lambda: with_snapshots(small(classes())),
    'members_snapshots': lambda: with_snapshots(small(config=config(members=2, weight_p=.1))),
    'mean_weights': lambda: with_snapshots(small(), 'weights'),
    'second_snapshot': lambda: with_snapshots(small(), 1),
    'uniform': quantiles, 'normal': lambda: quantiles(output_distribution='normal', n_quantiles=20),
    'no_numbers': lambda: only(['color','code'], []), 'no_categories': lambda: only([], ['b']),
    'accelerated': lambda: small().accelerate()}
learners = pytest.mark.parametrize('make', LEARNERS.values(), ids=LEARNERS)


def frame_for(learn):
    "Rows like those of the training, some with categories that are not there"
    df = make_table(70, seed=5)
    df.loc[3,'color'] = 'pink'
    if not hasattr(learn.dls.train_ds.procs, 'fill_missing_anywhere'): df['b'] = df.b.fillna(0)
    return df.drop(columns='y')

def preds(learn, df): return learn.get_preds(dl=learn.dls.test_dl(df))[0]

def check_same(a, b):
    df = frame_for(a)
    got,want = preds(b, df),preds(a, df)
    assert got.shape==want.shape and torch.equal(got, want) and want.std()>0
    assert torch.equal(b.predict(df.iloc[0])[2], a.predict(df.iloc[0])[2])


@learners
def test_a_loaded_model_predicts_the_same_bit_for_bit(make, tmp_path):
    learn = make()
    again = load_model(save_model(learn, tmp_path/'m'))
    check_same(learn, again)
    assert repr(again.model)==repr(learn.model) and repr(again.loss_func)==repr(learn.loss_func)
    assert [type(cb) for cb in again.cbs if type(cb) is not ProgressCallback]==[type(cb) for cb in learn.cbs]
    assert list(again.dls.vocab)==list(learn.dls.vocab) if hasattr(learn.dls, 'vocab') else True
    third = load_model(save_model(again, tmp_path/'n'))
    check_same(learn, third)
    save_model(third, tmp_path/'n')
    save_model(learn, tmp_path/'m')
    assert (tmp_path/'m'/'model.json').read_bytes()==(tmp_path/'n'/'model.json').read_bytes()


@pytest.mark.parametrize('name', ['fastai','periodic_members','accelerated'])
def test_a_loaded_model_trains_as_the_saved_one(name, tmp_path):
    learn = LEARNERS[name]()
    again = quiet(load_model(save_model(learn, tmp_path/'m')))
    for l in (learn, again):
        set_seed(3)
        l.dls = make_dls()
        l.fit(1, 1e-2, reset_opt=True)
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), again.model.parameters(), strict=True))


def test_masks_hold_and_frozen_layers_stay(tmp_path):
    learn = small(cbs=FrozenZeroInit(.5, per='row', seed=3))
    learn.fit(1, 1e-2)
    learn.model.embeds[0].weight.requires_grad_(False)
    again = quiet(load_model(save_model(learn, tmp_path/'m'), metrics=mae))
    a,b = learn.frozen_zero_init,again.frozen_zero_init
    assert list(b.record)==list(a.record)!=[] and all(torch.equal(a.record[n], b.record[n]) for n in a.record) and b.stds==a.stds
    again.dls = make_dls()
    before = again.model.embeds[0].weight.clone()
    again.fit(1, 1e-2)
    for n,p in again.model.named_parameters():
        if n in b.record: assert (p[~b.record[n]]==0).all() and (p[b.record[n]]!=0).all()
    assert torch.equal(before, again.model.embeds[0].weight) and again.metrics[0].name=='mae'


def test_snapshots_members_and_report_come_back(tmp_path):
    learn = small(config=config(members=2))
    learn.fit_zero_restarts(2, 1)
    again = quiet(load_model(save_model(learn, tmp_path/'m')))
    df = frame_for(learn)
    a,b = [l.get_member_preds(dl=l.dls.test_dl(df))[0] for l in (learn, again)]
    assert torch.equal(a, b) and a.shape[1]==4
    pd.testing.assert_frame_equal(learn.snapshot_ensemble.report(), again.snapshot_ensemble.report())
    for use in ('last', 0, 1):
        with learn.snapshot_ensemble.using(use),again.snapshot_ensemble.using(use): assert torch.equal(preds(learn, df), preds(again, df))


TYPED = dict(text=['a','b',None,'a'], whole=[3,-1,3,2], yes=[True,False,True,True], half=[.5,np.nan,2.,.5],
             day=pd.to_datetime(['2020-01-01 10:00:00.123456','2021-01-01',None,'2020-01-01 10:00:00.123456'], format='ISO8601'), mixed=pd.Categorical(['x','z','z','x'], ['z','y','x'], ordered=True))

@pytest.mark.parametrize('reduce', [True, False])
@pytest.mark.parametrize('name', TYPED)
def test_categories_keep_their_types(name, reduce, tmp_path):
    df = pd.DataFrame({name: TYPED[name]*10 if isinstance(TYPED[name], list) else list(TYPED[name])*10})
    if name=='mixed': df[name] = pd.Categorical(df[name], ['z','y','x'], ordered=True)
    df['y'] = np.arange(40.)
    to = TabularPandas(df, [Categorify], [name], [], 'y', splits=(list(range(32)), list(range(32, 40))), reduce_memory=reduce)
    learn = shake(tabular_learner(to.dataloaders(bs=8), layers=[4]))
    again = load_model(save_model(learn, tmp_path/'m'))
    a,b = [list(l.dls.train_ds.procs.categorify.classes[name].items) for l in (learn, again)]
    assert a==b and [type(v) for v in a]==[type(v) for v in b]
    other = df[[name]].drop_duplicates()
    if name!='mixed': other = pd.concat([other, pd.DataFrame({name: [df[name].max()]})], ignore_index=True)
    assert torch.equal(preds(learn, other), preds(again, other))


@pytest.mark.parametrize('value', [1j, np.complex64(1), pd.Timestamp('2020-01-01', tz='UTC'), pd.NaT, pd.Interval(0, 1), (1,2), None], ids=str)
def test_categories_of_other_types_are_not_saved(value):
    with pytest.raises(TypeError, match='column must hold text, numbers, bools or dates'): encode_values(['a', value], 'column')


def test_what_cannot_be_saved_is_refused_by_name_and_nothing_is_written(tmp_path):
    class Mine(Callback): pass
    class MyProc(TabularProc): pass
    dls = TabularDataLoaders.from_df(make_table(), procs=[Categorify,FillMissing,MyProc], cat_names=['color'], cont_names=['a'], y_names='y')
    def hooked():
        learn = small()
        learn.model.layers[0] = nn.Sequential(*learn.model.layers[0])
        return learn
    def changed(f):
        learn = small()
        f(learn)
        return learn
    def loaded(f, procs=(Categorify,FillMissing,Normalize), conts=('a',)):
        df = make_table().rename(columns={'b': 0})
        dls = TabularDataLoaders.from_df(df, procs=list(procs), cat_names=['color'], cont_names=list(conts), y_names='y')
        f(dls)
        return tabular_learner(dls, layers=[4])
    def mse_loss(p, y): return F.mse_loss(p, y)
    class MSELoss(nn.Module):
        reduction = 'mean'
        def forward(self, p, y): return F.mse_loss(p, y)
    class ReLU(nn.ReLU): pass
    class MyLearner(type(small())): pass
    class MyLoader(TabDataLoader): pass
    def my_loader(dls): dls.loaders[0].__class__ = MyLoader
    def my_transform(dls): dls.train.after_batch.add(Transform(noop))
    def own_mean(dls): dls.train_ds.procs.normalize.mean = 0.
    def sequential(learn): learn.model = nn.Sequential(nn.Linear(1, 1))
    def other_act(learn): learn.model.layers[1][1] = nn.Tanh()
    def one_layer_more(learn): learn.model.layers.append(nn.Identity())
    def halves(learn): learn.model.half()
    def compact_sequential(learn): learn.model = CompactModel(nn.Sequential(nn.Linear(1, 1)), [None], [1])
    def my_learner(learn): learn.__class__ = MyLearner
    cases = [(loaded(my_loader), '`dls` must have loaders of .* got MyLoader'), (loaded(my_transform), '`dls` must have no transforms'), (loaded(own_mean), '`Normalize` must have no mean'),
             (loaded(noop, conts=['a',0]), 'names of columns must be text'), (loaded(noop, [Categorify,FillMissing,QuantileNormalize(),QuantileNormalize()]), 'one QuantileNormalize'),
             (changed(sequential), 'the model must be .* got Sequential'), (changed(other_act), 'the model must be .* it was changed, got .*Tanh'), (changed(one_layer_more), 'the model must be .* it was changed'),
             (changed(halves), 'the model must be .* it was changed: .*float16'), (changed(compact_sequential), 'inside a CompactModel'), (changed(my_learner), '`learn` must be a TabularLearner'),
             (small(loss_func=mse_loss), '`loss_func` must be'), (small(loss_func=MSELoss()), '`loss_func` must be'), (small(config=tabular_config(act_cls=ReLU())), '`act_cls` must be'),
             (small(opt_func=partial(partial(FusedAdam), eps='x')), '`opt_func` must be'), (small(opt_func=lambda ps, lr: FusedAdam(ps, lr)), '`opt_func` must be'), (small(opt_func=partial(FusedAdam, 1)), '`opt_func` must be'),
             (small(cbs=Mine()), 'got Mine.*removed_cbs'), (small(cbs=DropConnect(lambda pos: .1*pos)), '`weight_p` of DropConnect'),
             (small(cbs=FrozenZeroInit(layers=lambda n,m: n=='layers.0.0')), '`layers` of FrozenZeroInit'), (tabular_learner(dls), '`procs` must be.*got MyProc'),
             (small(loss_func=lambda p,y: 0), '`loss_func` must be'), (small(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), '`opt_func` must be'),
             (small(splitter=lambda m: [list(m.parameters())]), '`splitter` must be'), (small(config=tabular_config(act_cls=nn.Hardtanh())), '`act_cls` must be'),
             (hooked(), 'the model must be'), (small().to_fp16(), 'got MixedPrecision'), (small(lr=slice(1,2)), '`lr` must be')]
    for learn,match in cases:
        with pytest.raises(TypeError, match=match): save_model(learn, tmp_path/'m')
        assert not (tmp_path/'m').exists()


# Writing

OPERATIONS = 'write_new','sync_file','sync_names','rename_file','delete_file'

class Stop(BaseException): pass

def test_a_kill_while_writing_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch):
    import fastai_dropconnect.serialize.files as module
    old,new = small(),small(seed=1)
    df = frame_for(old)
    a,b = preds(old, df),preds(new, df)
    count = [0]
    def stopping(operation, at):
        def call(*args):
            count[0] += 1
            if count[0]==at: raise Stop
            if operation.__name__=='write_new' and count[0]+1==at: args = args[0],args[1][:len(args[1])//2]
            return operation(*args)
        return call
    own = {n:getattr(files, n) for n in OPERATIONS}
    seen = set()
    for at in range(1, 30):
        path = tmp_path/str(at)
        save_model(old, path)
        (path/'mine.txt').write_text('mine')
        count[0] = 0
        with monkeypatch.context() as m:
            for n in OPERATIONS:
                for where in (files,module):
                    if hasattr(where, n): m.setattr(where, n, stopping(own[n], at))
            try: save_model(new, path)
            except Stop: pass
            else: break
        got = preds(load_model(path), df)
        assert torch.equal(got, a) or torch.equal(got, b)
        seen.add(torch.equal(got, b))
        assert (path/'mine.txt').read_text()=='mine'
        save_model(new, path)
        assert torch.equal(preds(load_model(path), df), b)
    assert at>6 and seen=={True,False}
    assert len(list(path.glob('*.safetensors')))==1 and not list(path.glob('*.tmp'))


def test_a_full_disk_is_named_and_leaves_the_old_model(tmp_path, monkeypatch):
    learn = small()
    path = save_model(learn, tmp_path/'m')
    def full(file, data): raise OSError(28, 'No space left on device', str(file))
    monkeypatch.setattr(files, 'write_new', full)
    with pytest.raises(OSError, match='No space left'): save_model(small(seed=1), path)
    check_same(learn, load_model(path))


def test_other_peoples_files_are_neither_replaced_nor_deleted(tmp_path):
    (tmp_path/'model.json').write_text('{"mine": 1}')
    with pytest.raises(ValueError, match='another program'): save_model(small(), tmp_path)
    assert os.listdir(tmp_path)==['model.json'] and (tmp_path/'model.json').read_text()=='{"mine": 1}'
    # a description from elsewhere cannot make us delete what it names
    (tmp_path/'model.json').write_text(json.dumps(dict(format='fastai_dropconnect.model', tensors=dict(file='../keep.txt'))))
    (tmp_path.parent/'keep.txt').write_text('x')
    save_model(small(), tmp_path)
    assert (tmp_path.parent/'keep.txt').exists() and len(os.listdir(tmp_path))==2
    (tmp_path/'model.json').write_text(json.dumps(dict(format='fastai_dropconnect.model', tensors=dict(file=3))))
    check_same(learn := small(), load_model(save_model(learn, tmp_path)))


def test_tensors_that_were_lost_or_damaged_are_written_again(tmp_path):
    learn = small()
    file = next(save_model(learn, tmp_path/'m').glob('*.safetensors'))
    file.unlink()
    check_same(learn, load_model(save_model(learn, tmp_path/'m')))
    (save_model(small(seed=1), tmp_path/'n')/file.name).write_bytes(b'')
    check_same(learn, load_model(save_model(learn, tmp_path/'n')))


def test_a_snapshot_of_another_model_is_not_saved(tmp_path):
    learn = with_snapshots(small())
    state = learn.snapshot_ensemble.record.states[0]
    state['layers.0.0.weight'] = state['layers.0.0.weight'].double()
    with pytest.raises(ValueError, match='snapshot.0.layers.0.0.weight.*F64'): save_model(learn, tmp_path/'m')
    assert not (tmp_path/'m').exists()


# The format

def fixture_frame():
    r = np.random.default_rng(7)
    df = pd.DataFrame(dict(color=r.choice(['red','green','blue'], 40), code=r.integers(0, 3, 40), ok=r.random(40)>.5, a=r.normal(size=40).round(3),
                           day=pd.to_datetime('2020-01-01')+pd.to_timedelta(r.integers(0, 3, 40), 'D')))
    df['y'] = np.where(df.a+(df.color=='red')>0, 'high', 'low')
    df.loc[::7,'a'] = np.nan
    df.loc[3,'color'] = None
    return df

def write_fixture():
    "Write the fixture: once for each version of the format, never again"
    set_seed(0)
    df = fixture_frame()
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissingAnywhere,QuantileNormalize(10)], cat_names=['color','code','ok','day'], cont_names=['a'],
                                     y_names='y', valid_idx=range(30, 40), bs=8)
    learn = quiet(tabular_learner(dls, layers=[4], config=config(weight_p=.1, num_embeddings=PLE(2, 3), members=2), cbs=FrozenZeroInit(.5)))
    learn.fit_zero_restarts(2, 1)
    save_model(learn, FIXTURE)
    (FIXTURE/'preds.json').write_text(json.dumps(preds(learn, df.drop(columns='y')).tolist()))

def test_a_file_of_version_1_is_read_with_the_same_predictions():
    learn = quiet(load_model(FIXTURE))
    df = fixture_frame()
    want = torch.tensor(json.loads((FIXTURE/'preds.json').read_text()))
    got = preds(learn, df.drop(columns='y'))
    assert want.std()>.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert list(learn.dls.vocab)==['high','low']
    assert len(learn.snapshot_ensemble.record)==2 and list(learn.frozen_zero_init.record)
