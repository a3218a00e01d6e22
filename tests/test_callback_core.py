"A callback of ours serves one Learner at a time, is called only for its events, and travels with its Learner"
import copy, pickle
import pytest, torch
import torch.nn.functional as F
from fastai.tabular.all import DataLoaders, L, Learner, ProgressCallback, noop, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.core import LeanCallback, RecordingCallback
from fastai_dropconnect.nn_utils import ModelRecord


class Events(LeanCallback):
    "Record the events that are called"
    def __init__(self): self.events = []
    def __call__(self, event_name):
        before = len(self.events)
        super().__call__(event_name)
        return len(self.events)>before
    def before_fit(self): self.events.append('before_fit')
    def after_step(self): self.events.append('after_step')

class Recording(RecordingCallback):
    "A callback whose record does nothing"
    def __init__(self): super().__init__(ModelRecord())

every = pytest.mark.parametrize('make', [lambda: DropConnect(.3), lambda: FrozenZeroInit(.5), RecalibrateBN, lambda: ZeroRestarts(1), SnapshotEnsemble, Events, Recording],
                                ids=['DropConnect','FrozenZeroInit','RecalibrateBN','ZeroRestarts','SnapshotEnsemble','LeanCallback','RecordingCallback'])

def make_learn(*cbs, seed=0, **kw):
    set_seed(seed)
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    ds = TensorDataset(x, x.prod(1, keepdim=True)+x[:,:1])
    model = nn.Sequential(nn.Linear(4,12), nn.Tanh(), nn.BatchNorm1d(12), nn.Linear(12,8), nn.Tanh(), nn.Linear(8,1))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=16, shuffle=True, device='cpu', num_workers=0), model, F.mse_loss, cbs=L(cbs), **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

def fit(learn, cbs=None):
    "Two epochs from a fixed seed"
    set_seed(7)
    learn.fit(2, 1e-2, cbs=cbs)
    return weights(learn)

def traces(learn): return sorted(vars(learn)),list(learn.cbs),len(learn.model._state_dict_hooks)


@every
def test_two_learners_at_once_are_refused_and_the_first_goes_on(make):
    cb = make()
    first,alone = make_learn(cb),make_learn(make())
    second = make_learn(seed=1)
    before = traces(second),weights(second)
    says = f'belongs to another Learner: make a new {type(cb).__name__} for each Learner, or remove this one first'
    for give in (lambda: second.add_cb(cb), lambda: second.fit(1, cbs=cb), lambda: make_learn(cb), lambda: second.validate(cbs=cb)):
        with pytest.raises(ValueError, match=says): give()
    assert cb.learn is first and (traces(second),)==before[:1] and same(weights(second), before[1])
    assert same(fit(first), fit(alone))


@every
def test_the_same_callback_twice_in_a_learner_is_refused(make):
    cb = make()
    learn,alone = make_learn(cb),make_learn(make())
    before = traces(learn)
    for give in (lambda: learn.add_cb(cb), lambda: learn.fit(1, cbs=cb), lambda: make_learn(*[make()]*2)):
        with pytest.raises(ValueError, match='must be added once and to one Learner, but this Learner has it already'): give()
    assert traces(learn)==before
    assert same(fit(learn), fit(alone))


@every
def test_a_removed_callback_is_free(make):
    cb = make()
    first = make_learn(cb)
    fit(first)
    first.remove_cb(cb)
    assert cb.learn is None
    second,alone = make_learn(cb, seed=1),make_learn(make(), seed=1)
    assert cb.learn is second and same(fit(second), fit(alone))


@every
def test_callbacks_of_a_fit_serve_one_learner_after_the_other(make):
    cb = make()
    first,second,alone = make_learn(),make_learn(seed=1),make_learn(seed=1)
    for _ in range(2): fit(first, cb)
    assert cb.learn is None and not {'_do_one_batch',cb.name} & set(vars(first))
    assert same(fit(second, cb), fit(alone, make()))


@every
def test_removed_for_a_while(make):
    cb = make()
    learn = make_learn(cb)
    fit(learn)
    with learn.removed_cbs(cb):
        assert cb.learn is None
        fit(learn)
    assert cb.learn is learn
    fit(learn)


@every
def test_copies_of_a_learner_have_callbacks_of_their_own(make):
    learn = make_learn(make())
    fit(learn)
    for again in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        mine,other = again.cbs[-1],learn.cbs[-1]
        assert mine is not other and mine.learn is again and other.learn is learn
        fit(again)
        with pytest.raises(ValueError, match='belongs to another Learner'): learn.add_cb(mine)
        again.remove_cb(mine)
        for free in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))): fit(make_learn(free))
    fit(learn)


def test_a_first_learner_that_is_gone():
    cb = FrozenZeroInit(.5)
    fit(make_learn(), cb)
    again,alone = make_learn(seed=1),make_learn(seed=1)
    assert same(fit(again, cb), fit(alone, FrozenZeroInit(.5)))


def test_only_own_events_are_called():
    cb = Events()
    learn = make_learn(cb)
    assert [cb(e) for e in ('before_fit','after_pred','after_step','before_batch')] == [True,False,True,False]
    fit(learn)
    assert cb.events[2:] == ['before_fit']+['after_step']*6


def test_what_on_add_raises_leaves_the_callback_free():
    class Picky(LeanCallback):
        def on_add(self, learn):
            if learn.dls.bs!=16: raise ValueError('not this one')
    cb = Picky()
    other = make_learn()
    other.dls.train.bs = 8
    with pytest.raises(ValueError, match='not this one'): other.add_cb(cb)
    assert cb.learn is None and cb not in other.cbs
    assert make_learn(cb).cbs[-1] is cb


def test_a_broken_fit_is_told_once_to_each_callback_that_is_still_there():
    told = []
    class Told(LeanCallback):
        def __init__(self, name, other=None): self.called,self.other = name,other
        def on_broken_fit(self):
            told.append(self.called)
            if self.other: self.learn.remove_cb(self.other)
    class Break(LeanCallback):
        def after_step(self): raise KeyboardInterrupt
    gone = Told('gone')
    learn = make_learn(Told('first', gone), gone, Told('last'))
    fit(learn)
    assert not told
    with pytest.raises(KeyboardInterrupt): fit(learn, Break())
    assert told==['first','last'] and gone.learn is None
    fit(learn)
    assert len(told)==2
