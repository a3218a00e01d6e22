"Validations, summaries and `lr_find` change nothing; a fit that is broken off leaves the Learner as fastai's callbacks do"
import contextlib
from copy import deepcopy
import pytest, torch
from fastai.callback.hook import *
from fastai.callback.schedule import *
from fastai.tabular.all import Callback, CancelFitException, EarlyStoppingCallback, Learner, mae, params
from fastcore.foundation import L
from conftest import make_table
from ensemble_learners import *
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import mc      # noqa: F401, gives every Learner `get_mc_preds`

pytestmark = pytest.mark.filterwarnings('ignore')

def zeros(**kw): return FrozenZeroInit(.5, **kw)
CALLBACKS = dict(
    nothing=lambda: [], dropconnect=lambda: [DropConnect(.3)], zeros=lambda: [zeros()], rows=lambda: [zeros(per='row', rescale=True)],
    values=lambda: [zeros(zero=False)], free_zeros=lambda: [zeros(mask_grads=False)], batchnorm=lambda: [RecalibrateBN(every_epoch=True)],
    restarts=lambda: [ZeroRestarts(1)], folder=lambda: [ZeroRestarts(1, path='snaps')], snapshots=lambda: [SnapshotEnsemble()],
    all=lambda: [ZeroRestarts(1, use='weights'), RecalibrateBN(), zeros(), DropConnect(lambda pos: .1+.2*pos)])
callbacks = pytest.mark.parametrize('cbs', CALLBACKS.values(), ids=CALLBACKS)

def learner(cbs, path, **kw):
    return tabular(cbs=cbs(), path=path, metrics=mae, df=make_table(80), splitter=lambda m: L(params(m)[:3], params(m)[3:]), **kw)

# What a Learner is

def plain(value): # Tensors and containers of them as lists, to be compared by ==
    if torch.is_tensor(value): return str(value.dtype),value.detach().flatten().tolist()
    if isinstance(value, dict): return {k:plain(v) for k,v in value.items()}
    if isinstance(value, (list,tuple,L)): return [plain(v) for v in value]
    return value

def records(learn):
    res = {}
    for cb in learn.cbs:
        record = getattr(cb, 'record', None)
        if hasattr(record, 'masks'): res[cb.name] = {n:cb.record[n].tolist() for n in record}
        elif record is not None: res[cb.name] = {c:plain(record[c]) for c in record},record.use,record.average,plain(record.weights)
    return res

HOOKS = [n for n in vars(torch.nn.Linear(1,1)) if n.endswith('_hooks')]

def structure(learn):
    "Everything that is not a number"
    model = learn.model
    return dict(cbs=sorted(map(repr, learn.cbs)), callbacks=sorted(type(cb).__name__ for cb in learn.cbs), metrics=[id(m) for m in learn.metrics],
                loss_func=id(learn.loss_func), run={cb.name:cb.run for cb in learn.cbs}, parameters=[id(p) for p in model.parameters()],
                classes=[type(m) for m in model.modules()], grads=[p.requires_grad for p in model.parameters()],
                hooks=[{n:len(getattr(m, n)) for n in HOOKS} for m in model.modules()],
                attributes=[sorted(k for k in vars(m) if k[0]!='_' or k=='_dropconnect') for m in model.modules()],
                methods=sorted(k for k,v in vars(learn).items() if callable(getattr(Learner, k, None)) and callable(v)))

def numbers(learn):
    opt = learn.opt and plain(deepcopy(learn.opt.state_dict()))
    return dict(model=plain(dict(learn.model.state_dict())), opt=opt, records=records(learn))

# Validations

def show(learn):
    with contextlib.redirect_stdout(None): learn.show_results()

def predict_as_fastai_does_inside(learn): # As in `layer_info`: without the lock
    with learn.no_logging(),learn: learn.get_preds(inner=True)

ACTIONS = dict(
    validate=lambda l: l.validate(), validate_train=lambda l: l.validate(0), get_preds=lambda l: l.get_preds(with_loss=True, with_decoded=True),
    predict=lambda l: l.predict(make_table(9).iloc[8]), show_results=show, summary=lambda l: l.summary(),
    mc=lambda l: l.get_mc_preds(n=6, p=.2, seed=0), moments=lambda l: l.get_mc_preds(p=.2, method='moments'), inner=predict_as_fastai_does_inside,
    lr_find=lambda l: l.lr_find(show_plot=False, num_it=6, suggest_funcs=None))

def files(path): return {f for f in path.rglob('*') if f.name!='models'}

@callbacks
def test_nothing_changes(cbs, tmp_path):
    "Neither in a Learner that was never trained, nor in one that was, nor is a file left behind"
    learn = learner(cbs, tmp_path)
    learn.create_opt()
    for trained in (False, True):
        if trained: learn.fit(2, 1e-2)
        learn.opt.set_hypers(lr=learn.lr)       # `lr_find` sets it, and saves the optimizer with it
        was = structure(learn) | numbers(learn) | dict(files=files(tmp_path))
        preds = learn.get_preds()[0]
        for name,action in ACTIONS.items():
            if name=='inner' and cbs is CALLBACKS['folder']: continue       # a folder is claimed in `before_fit`
            action(learn)
            now = structure(learn) | numbers(learn) | dict(files=files(tmp_path))
            for k in was: assert now[k]==was[k], (trained, name, k)
        assert torch.equal(learn.get_preds()[0], preds)


def test_validations_before_the_first_fit_keep_pretrained_weights(tmp_path):
    pretrained = learner(CALLBACKS['nothing'], tmp_path)
    pretrained.fit(1, 1e-2)
    pretrained.save('pretrained')
    learn = learner(CALLBACKS['all'], tmp_path, seed=1).load('pretrained')
    for action in ACTIONS.values():
        action(learn)
        assert same(state(learn), state(pretrained))
    learn.fit(1, 0.)        # the first fit sets the zeros
    assert learn.frozen_zero_init.zero_share()==.5

# Fits that are broken off

class Break(Callback):
    "Raise `error` at an event, in the second epoch where there is one"
    order = 100
    def __init__(self, at, error): self.at,self.error = at,error
    def __call__(self, event_name):
        training,event = self.at.split() if ' ' in self.at else (None,self.at)
        there = event_name==event and (training is None or self.learn.training==(training=='training'))
        if there and (event=='before_fit' or self.learn.epoch==min(1, self.learn.n_epoch-1)): raise self.error

class Oops(Exception): "An error of the user's own callback"

FITS = dict(fit=lambda l: l.fit(3, 1e-3), one_cycle=lambda l: l.fit_one_cycle(3, 1e-3), restarts=lambda l: l.fit_zero_restarts(3, 1, 1e-3),
            temporary=lambda l: l.fit(3, 1e-3, cbs=[RecalibrateBN(), EarlyStoppingCallback('average_mae', patience=9), ZeroRestarts(1)]),
            lr_find=lambda l: l.lr_find(num_it=8, show_plot=False, suggest_funcs=None))
PLACES = ['before_fit','training before_train','training after_pred','training after_step','validation before_validate' ,'validation after_loss','after_epoch']

def broken(cbs, fit, place, error, path):
    "A Learner whose second fit is broken off, and its structure and records before"
    learn = learner(cbs, path)
    learn.fit(1, 1e-3)
    was = structure(learn),records(learn)
    learn.add_cb(stop := Break(place.replace('validation', 'valid'), error))
    with contextlib.suppress(Oops, KeyboardInterrupt): FITS[fit](learn)
    learn.remove_cb(stop)
    return learn,*was

def modes(learn): return [m.training for m in learn.model.modules()]

ERRORS = KeyboardInterrupt,Oops,CancelFitException
OWN = {'restarts': ['values'], 'temporary': ['values']}      # the others have a `ZeroRestarts` already

@pytest.mark.parametrize('name,fit,place,error', [
    (n,f,p,e) for i,f in enumerate(FITS) for j,p in enumerate(PLACES) for k,e in enumerate(ERRORS) for n in OWN.get(f, ['nothing','values','restarts','all'])
    if (i+j+k)%6==0 and not (f=='lr_find' and ('valid' in p or p=='after_epoch'))])
def test_a_fit_that_is_broken_off_leaves_nothing_behind(name, fit, place, error, tmp_path):
    learn,was,records_before = broken(CALLBACKS[name], fit, place, error, tmp_path/'a')
    plain,_,_ = broken(CALLBACKS['nothing'], 'fit' if fit in OWN else fit, place, error, tmp_path/'b')
    assert modes(learn)==modes(plain) and not learn.lock.locked()
    rows = learn.recorder.values
    assert len(rows)==len(plain.recorder.values) and (fit=='lr_find' or all(len(row)==len(learn.recorder.metric_names)-2 for row in rows))
    if fit!='restarts': assert learn.opt.hypers==plain.opt.hypers
    if fit in OWN: learn.remove_cb(SnapshotEnsemble)
    assert structure(learn)==was
    assert len(learn.validate())==2 and list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','mae','time']
    if hasattr(learn, 'frozen_zero_init'): check_masks(learn.frozen_zero_init, records_before['frozen_zero_init'])
    learn.fit(1, 1e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def check_masks(cb, was):
    "The masks are those of before, nothing is held, and the optimizer has no past of the masked weights"
    assert cb._held is None and {n:cb.record[n].tolist() for n in cb.record}==was
    for n,(p,_) in cb.weights().items():
        for t in cb.learn.opt.state[p].values():
            if torch.is_tensor(t) and t.shape==p.shape: assert not t[~cb.record[n]].any()


def test_a_broken_lr_find_before_the_first_fit(tmp_path):
    "Its masks are dropped, its zeros are forgotten, and the next fit recalibrates"
    learn = learner(CALLBACKS['all'], tmp_path)
    with contextlib.suppress(KeyboardInterrupt): 
        with learn.added_cbs(Break('training after_step', KeyboardInterrupt)): learn.lr_find(num_it=8)
    assert not list(learn.frozen_zero_init.record) and learn.frozen_zero_init._held is None and 'snapshot_ensemble' not in dir(learn)
    learn.fit(1, 1e-2)
    once = state(learn)
    assert same(state(recalibrate_bn(learn)), once)


def test_a_broken_lr_find_keeps_the_ensemble(tmp_path):
    learn = learner(CALLBACKS['nothing'], tmp_path)
    learn.fit_zero_restarts(2, 1)
    with contextlib.suppress(KeyboardInterrupt): 
        with learn.added_cbs(Break('training after_step', KeyboardInterrupt)): learn.lr_find(num_it=8)
    assert ensemble(learn).use=='average' and len(ensemble(learn).record)==2


def test_a_callback_removed_in_a_broken_fit_leaves_a_clean_optimizer(tmp_path):
    learn = learner(CALLBACKS['nothing'], tmp_path)
    with contextlib.suppress(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[zeros(), Break('training after_step', KeyboardInterrupt)])
    w = learn.model.layers[0][0].weight
    assert (learn.opt.state[w]['sqr_avg'][w==0]==0).all() and (w==0).sum()==round(w.numel()/2)
