"Random histories of Learners: `python tests/histories.py --n 10000` checks what must hold after every step, and prints a short failing one"
import argparse, contextlib, os, random, sys, tempfile, time, traceback, warnings
os.environ.setdefault('MPLBACKEND', 'Agg')
from copy import deepcopy
from functools import cache
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.tabular.all import (Callback, CancelBatchException, CancelFitException, Categorify, FillMissing, L, Normalize, ProgressCallback,
                                TabularDataLoaders, load_learner, mae, noop, params, set_seed, trainable_params)
from fastai.tabular.model import TabularModel
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.averaging import BestAverage
from fastai_dropconnect.callback.calibrate import calibration_of
from fastai_dropconnect.callback.columns import AverageMetric
from fastai_dropconnect.callback.core import LeanCallback, RecordingCallback
from fastai_dropconnect.callback.gates import FeatureGates, column_sizes, input_layer
from fastai_dropconnect.callback.penalty import GroupLasso
from fastai_dropconnect.callback.prune import GradualPruning
from fastai_dropconnect.callback.variational import VariationalDropConnect
from fastai_dropconnect.serialize.learner import CALLBACKS as SAVED
from fastai_dropconnect.tabular.one_pass import OnePassTabularModel

torch.set_num_threads(1)

def classes_of(model): # `accelerate` looks up all embeddings of fastai's model in one pass
    return [TabularModel if type(m) is OnePassTabularModel else type(m) for m in model.modules()]


class Oops(Exception): "An error of somebody else's"

class Break(Callback):
    "Raise an error at the `n`-th call of an event"
    order = 100
    def __init__(self, event, n, error): self.event,self.n,self.error = event,n,error
    def __call__(self, event_name):
        if event_name!=self.event: return
        self.n -= 1
        if self.n==0: raise self.error('stop')      # fastai fails on an exception without a message

class Begins(Callback):
    "Note that a fit has begun; weights of files that are older than the masks are zero from then on"
    order,begun = 99,False
    def before_fit(self): self.begun = True

EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss after_backward after_step after_batch before_validate after_epoch'.split()
ERRORS = KeyboardInterrupt,Oops,CancelFitException,CancelBatchException

def table(n=24):
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(color=r.choice(['red','green'], n), a=r.normal(size=n), b=r.normal(size=n)))
    return df.assign(y=(df.a*df.b).astype('float32'))

@cache
def shared_dls(): return TabularDataLoaders.from_df(table(), procs=[Categorify,FillMissing,Normalize], cat_names=['color'], cont_names=['a','b'], y_names='y',
                                                    valid_idx=range(8), bs=8, device='cpu')

def make_dls(): # With loaders that draw the order of rows anew
    dls = shared_dls()
    return type(dls)(*[dl.new() for dl in dls.loaders], path=dls.path, device=dls.device)

def splitter(model): return L(params(model)[:2], params(model)[2:])

CALLBACKS = dict(
    DropConnect=lambda r: DropConnect(r.choice([.3, falling]), r.choice(['example','batch','gaussian'])),
    FrozenZeroInit=lambda r: FrozenZeroInit(.5, **r.choice([{}, dict(zero=False), dict(mask_grads=False), dict(rescale=True), dict(per='row')])),
    RecalibrateBN=lambda r: RecalibrateBN(r.random()<.5), ZeroRestarts=lambda r: ZeroRestarts(1, use=r.choice(['average','last','weights'])),
    SnapshotEnsemble=lambda r: SnapshotEnsemble(), MixedPrecision=lambda r: MixedPrecision(r.choice(['fp16','bf16'])),
    GradualPruning=lambda r: GradualPruning(r.choice([2,4]), **r.choice([{}, dict(structured=True), dict(regrow=.3, every=1), dict(schedule='once')])),
    GroupLasso=lambda r: GroupLasso(**r.choice([{}, dict(threshold=.2), dict(cut=None), dict(cut=.1)])),
    FeatureGates=lambda r: FeatureGates(r.choice([0,.5,300]), end=r.choice([.3,.7,1])),
    VariationalDropConnect=lambda r: VariationalDropConnect(sigma_lr=r.choice([.04,2])),
    BestAverage=lambda r: BestAverage(**r.choice([{}, dict(every=1), dict(every=2, patience=1, warmup=2), dict(deadline=0)])))

def falling(pos): return .3*(1-pos)

FILES = 'a','b'
VALIDATIONS = dict(validate=lambda l: l.validate(), get_preds=lambda l: l.get_preds(with_loss=True), summary=lambda l: l.summary(),
                   predict=lambda l: l.predict(table().iloc[3]))
HOLDERS = 'GradualPruning GroupLasso VariationalDropConnect FeatureGates'.split()
REFUSED = 'BestAverage stops','ZeroRestarts takes its snapshots'     # starts of messages
WHOLE = [*HOLDERS, 'ZeroRestarts']     # act at shares of a whole fit
FITS = dict(fit=lambda l,r: l.fit(r.choice([1,2]), 1e-2, reset_opt=r.random()<.2), one_cycle=lambda l,r: l.fit_one_cycle(1, 1e-2), fine_tune=lambda l,r: l.fine_tune(1, 1e-2),
            lr_find=lambda l,r: l.lr_find(num_it=6, show_plot=False, suggest_funcs=None),
            restarts=lambda l,r: l.fit_zero_restarts(2, 1, 1e-2, use=r.choice(['average','last','weights'])),
            resume=lambda l,r: l.fit_zero_restarts(2, 1, 1e-2, resume=True),
            folder=lambda l,r: l.fit_zero_restarts(2, 1, 1e-2, path='run', **r.choice([dict(resume=True), dict(overwrite=True), {}])))
OTHERS = 'save load freeze unfreeze export deepcopy accelerate decelerate add remove release recalibrate calibrate share'.split()
STEPS = [*VALIDATIONS, *FITS, *FITS, 'temporary', 'temporary', *OTHERS, 'add', 'save', 'load']

def refused(e): return any(s in str(e) for s in REFUSED)
def named(learn, name): return [cb for cb in learn.cbs if type(cb).__name__==name]
def frozen(learn): return next(iter(named(learn, 'FrozenZeroInit')), None)
def ensemble(learn): return next(iter(named(learn, 'SnapshotEnsemble')), None)
def tensors(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def equal(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)
def preds(learn): return learn.get_preds()[0]

HOOKS = '_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks'.split()


class History:
    "A Learner, and what has been done to it"
    def __init__(self, seed:int, path:Path):
        r = random.Random(seed)
        set_seed(seed)
        config = r.choice([None, dict(weight_p=.2), dict(members=2)])
        self.usable = {n:f for n,f in CALLBACKS.items() if not (n=='VariationalDropConnect' and config==dict(members=2))}     # it refuses members
        names = [n for n in self.usable if r.random()<r.choice([0,.3,1])]
        if set(names) & set(WHOLE) and r.random()<.8: names = [n for n in names if n!='BestAverage']       # they refuse each other
        cbs = [CALLBACKS[n](r) for n in names]
        self.dls,self.path,self.saved = make_dls(),path,{}
        self.learn = tabular_learner(self.dls, layers=[6,4], cbs=cbs, path=path, metrics=mae, splitter=splitter,
                                     config=config)
        self.prepare()
        self.keys,self.classes = list(self.learn.model.state_dict()),classes_of(self.learn.model)
        self.start = ', '.join(map(repr, cbs)) or 'no callbacks'

    def prepare(self):
        if hasattr(self.learn, 'progress'): self.learn.remove_cb(ProgressCallback)
        self.learn.logger = noop
        self.ids = [id(p) for p in self.learn.model.parameters()]
        self.metrics = [id(m) for m in self.learn.metrics]

    def step(self, name:str, seed:int):
        "Do one step and check what must hold"
        r = random.Random(seed)
        set_seed(seed)
        trained = self.other_values = False     # a callback of one fit may hold weights at other values than zero
        if name in VALIDATIONS: self.validation(name)
        elif name in FITS or name=='temporary': trained = self.fit(name, r)
        else: getattr(self, name)(r)
        self.check(trained)

    def validation(self, name):
        before,was = tensors(self.learn),self.state()
        with contextlib.redirect_stdout(None): VALIDATIONS[name](self.learn)
        assert equal(tensors(self.learn), before) and self.state()==was

    def state(self):
        ens,records = ensemble(self.learn),getattr(self.learn.model.state_dict(), '_metadata', {})
        return sorted(map(repr, self.learn.cbs)),{k:repr(v) for k,v in records.items() if k.startswith('fastai_dropconnect.')},ens and (list(ens.record), ens.use)

    def fit(self, name, r):
        learn = self.learn
        if named(learn, 'ZeroRestarts') and name in ('restarts','resume','folder'): return False
        was = tensors(learn),self.state(),[cb for cb in learn.cbs if type(cb).__name__!='SnapshotEnsemble']
        stop = Break(r.choice(EVENTS), r.choice([1,2,4]), r.choice(ERRORS)) if r.random()<.4 else None
        begins = Begins()
        for cb in (begins, *([stop] if stop else [])): learn.add_cb(cb)
        try: self.temporary(r) if name=='temporary' else FITS[name](learn, r)
        except (KeyboardInterrupt,Oops,CancelBatchException): pass       # the last one between batches
        except ValueError as e:
            foreign = name=='folder' and '`path` must' in str(e)        # another run is in the folder
            if not foreign and not refused(e): raise
        finally:
            for cb in (begins, *([stop] if stop else [])): learn.remove_cb(cb)
        assert [cb for cb in learn.cbs if type(cb).__name__!='SnapshotEnsemble']==was[2]
        if name=='lr_find' and not stop:
            assert equal(tensors(learn), was[0])
            assert self.state()==was[1]
        return begins.begun and name!='lr_find'     # which puts the weights of before back

    def temporary(self, r):
        learn = self.learn
        cbs = [f(r) for n,f in self.usable.items() if n!='MixedPrecision' and r.random()<.3 and not named(learn, n)]
        self.other_values = any(isinstance(cb, FrozenZeroInit) and not cb.zero for cb in cbs)
        learn.fit(1, 1e-2, cbs=cbs)

    def save(self, r):
        name = r.choice(FILES)
        self.learn.save(name)
        ens = ensemble(self.learn)
        self.saved[name] = preds(self.learn),bool(ens and len(ens.record)),self.scores()

    def load(self, r):
        name = r.choice(FILES)
        if name not in self.saved: return
        want,has_members,scores = self.saved[name]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: self.learn.load(name)
            except ValueError as e:
                if 'snapshot' not in str(e).lower(): raise      # refused, as there is no ensemble
                return
        if ensemble(self.learn) or not has_members: assert torch.equal(preds(self.learn), want), 'other predictions after load'
        assert self.scores()==scores, 'another calibration after load'

    def scores(self): # Of the calibration
        cal = calibration_of(self.learn)
        return cal and cal.scores.tolist()

    def calibrate(self, r):
        want = preds(self.learn)
        cal = self.learn.calibrate(r.choice([.5,.9]))
        if r.random()<.5: self.learn.update_calibration(table())
        assert calibration_of(self.learn) is cal and torch.equal(preds(self.learn), want)

    def share(self, r): # Without pickle
        learn = self.learn
        others = [cb for cb in learn.cbs if type(cb) not in SAVED and type(cb).__name__ in CALLBACKS and type(cb).__name__!='SnapshotEnsemble']
        schedules = [cb for cb in named(learn, 'DropConnect') if callable(cb.weight_p)]
        def preds_of_table(l): return l.get_preds(dl=l.dls.test_dl(table()))[0]
        want,was,learn.splitter = preds_of_table(learn),learn.splitter,trainable_params
        with learn.removed_cbs(others+schedules): save_model(learn, self.path/'shared')
        learn.splitter = was
        new = load_model(self.path/'shared')
        with new.no_bar(): got = preds_of_table(new)
        assert torch.equal(got, want), 'other predictions from the file without pickle'

    def freeze(self, r): self.learn.freeze()
    def unfreeze(self, r): self.learn.unfreeze()
    def accelerate(self, r): self.learn.accelerate()
    def decelerate(self, r): self.learn.decelerate()
    def recalibrate(self, r): recalibrate_bn(self.learn)

    def release(self, r):
        if frozen(self.learn) and r.random()<.3: frozen(self.learn).release()

    def export(self, r):
        want,old,scores = preds(self.learn),self.learn,self.scores()
        self.learn.export('export.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.learn = load_learner(self.path/'export.pkl')
        self.learn.path,self.learn.dls = self.path,self.dls
        self.prepare()
        assert torch.equal(preds(self.learn), want) and torch.equal(preds(old), want), 'other predictions after export'
        assert self.scores()==scores, 'another calibration after export'

    def deepcopy(self, r):
        dls = self.learn.dls
        for dl in [*dls.loaders, *getattr(dls, '_shipped', dls).loaders]: vars(dl).pop('it', None)     # of an interrupted epoch: fastai cannot copy it
        old,before,want = self.learn,tensors(self.learn),preds(self.learn)
        self.learn = deepcopy(old)
        self.prepare()
        assert torch.equal(preds(self.learn), want), 'other predictions of a copy'
        assert calibration_of(old) is None or calibration_of(self.learn) is not calibration_of(old)
        try: self.learn.fit(1, 1e-2)
        except ValueError as e:
            if not refused(e): raise
        assert equal(tensors(old), before) and torch.equal(preds(old), want), 'the copy has changed the original'

    def add(self, r):
        name = r.choice(list(self.usable))
        if not named(self.learn, name): self.learn.add_cb(CALLBACKS[name](r))

    def remove(self, r):
        cbs = [cb for cb in self.learn.cbs if type(cb).__name__ in CALLBACKS]
        if not cbs: return
        cb = r.choice(cbs)
        self.learn.remove_cb(cb)
        if r.random()<.3: self.learn.add_cb(cb)     # and back again

    def check(self, trained):
        learn,model = self.learn,self.learn.model
        assert list(model.state_dict())==self.keys, 'other names in the state'
        assert [id(p) for p in model.parameters()]==self.ids, 'other parameters'
        assert classes_of(model)==self.classes and not any('_dropconnect' in vars(m) for m in model.modules()), 'a layer is still noisy'
        assert not any(getattr(m, h) for m in model.modules() for h in HOOKS), 'hooks are left'
        n_records = len([cb for cb in learn.cbs if isinstance(cb, RecordingCallback)])
        assert len(model._state_dict_hooks)==len(model._load_state_dict_post_hooks)==n_records, 'hooks of records'
        told = any(isinstance(cb, LeanCallback) and cb._is_told for cb in learn.cbs)
        assert ('fit' in vars(learn))==told and ('_do_one_batch' in vars(learn))==bool(named(learn, 'DropConnect')), 'methods are still replaced'
        assert [id(m) for m in learn.metrics]==self.metrics and not any(isinstance(m, AverageMetric) for m in learn.metrics), 'other metrics'
        assert all(cb.run for cb in learn.cbs if cb.name not in ('recorder',)), 'a callback is off'
        assert not learn.lock.locked()
        for n,t in model.state_dict().items(): assert not t.is_floating_point() or t.isfinite().all(), f'{n} is not finite'
        if learn.opt is not None: assert {id(p) for p in learn.opt.all_params().itemgot(0)} <= set(self.ids), 'the optimizer has other parameters'
        self.check_masks(trained)
        a,b = preds(learn),preds(learn)
        assert a.isfinite().all() and torch.equal(a, b), 'predictions do not repeat'

    def check_masks(self, trained):
        self.check_frozen(trained)
        held_elsewhere = self.other_values or frozen(self.learn) and not frozen(self.learn).zero
        ps = dict(self.learn.model.named_parameters())
        for cb in self.learn.cbs:
            if type(cb).__name__ not in HOLDERS: continue
            assert cb._held is None
            if isinstance(cb, FeatureGates): continue
            for n in cb.record:
                assert cb.record[n].shape==ps[n].shape, f'a mask of another shape in {cb}'
                if trained and not held_elsewhere: assert (ps[n][~cb.record[n]]==0).all(), f'a weight that {cb} removed is not zero'
        gates = next(iter(named(self.learn, 'FeatureGates')), None)
        if not gates: return
        assert gates._handle is None and gates._gate is None
        if trained and gates.record.state.get('fixed') and not held_elsewhere:
            sizes = torch.tensor(list(column_sizes(self.learn).values()))
            kept = gates.kept().repeat_interleave(sizes)
            assert (input_layer(self.learn.model).weight[..., ~kept]==0).all(), 'a removed column has weights'

    def check_frozen(self, trained):
        cb = frozen(self.learn)
        if cb is None: return
        assert cb._held is None and not cb._in_lr_find
        ps = dict(self.learn.model.named_parameters())
        for n in cb.record:
            mask = cb.record[n]
            assert mask.shape==ps[n].shape, 'a mask of another shape'
            assert cb.per=='row' or (~mask).sum()==round(.5*mask.numel()), 'another number of masked weights'
            if trained and cb.zero and cb.mask_grads: assert (ps[n][~mask]==0).all(), 'a held weight is not zero'


def steps_of(seed:int, longest:int=10) -> list: # Pairs (name of a step, its seed)
    r = random.Random(seed)
    return [(r.choice(STEPS), r.getrandbits(32)) for _ in range(r.randint(3, longest))]

def run(seed:int, steps:list) -> str|None: # What went wrong and in which step, or `None`
    "Run a history"
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        history = History(seed, Path(d))
        for i,(name,step_seed) in enumerate(steps):
            try: history.step(name, step_seed)
            except Exception: return f'{history.start}\nstep {i}, {name}:\n{traceback.format_exc(limit=-6)}'

def shrink(seed:int, steps:list) -> list:
    "Leave out steps that a failure does not need"
    i = len(steps)-1
    while i>=0:
        fewer = steps[:i]+steps[i+1:]
        if run(seed, fewer): steps = fewer
        i -= 1
    return steps

def check(seed:int, longest:int=10): # Raises `AssertionError` with a short history if one fails
    "Run the history of `seed`"
    steps = steps_of(seed, longest)
    if not run(seed, steps): return
    steps = shrink(seed, steps)
    raise AssertionError(f'seed {seed}, steps {steps}: {run(seed, steps)}')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=200, help='histories')
    parser.add_argument('--start', type=int, default=0, help='first seed')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after this long')
    args = parser.parse_args()
    start,failed,done = time.time(),[],0
    for seed in range(args.start, args.start+args.n):
        if time.time()-start>args.seconds: break
        try: check(seed)
        except AssertionError as e:
            failed.append(seed)
            print(e, flush=True)
        done += 1
        if done%100==0: print(f'{done} histories, {len(failed)} failed, {time.time()-start:.0f} s', flush=True)
    print(f'{done} histories, seeds {args.start} to {args.start+done-1}, {len(failed)} failed: {failed}, {time.process_time():.0f} s of CPU time')
    sys.exit(bool(failed))

if __name__=='__main__': main()
