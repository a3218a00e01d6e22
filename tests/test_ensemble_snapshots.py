"The store of snapshots: files, folders, and what travels with a `state_dict`"
import contextlib
from pathlib import Path
import pytest, torch
from fastai.tabular.all import mae
from torch import nn
from ensemble_learners import *
from fastai_dropconnect.all import *

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


def cycle_files(folder): return sorted(f.name[:9] for f in folder.glob('cycle*'))


def test_files(tmp_path):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(4, 1, path='snaps', n_last=2)
    names = lambda: cycle_files(tmp_path/'models/snaps')
    assert names() == ['cycle_002','cycle_003'] and len(ensemble(learn).record)==2
    torch.testing.assert_close(preds(learn), learn.get_member_preds()[0].mean(1))
    learn.fit_zero_restarts(1, 1, path='other')
    assert names() == ['cycle_002','cycle_003']         # another folder's are left alone
    with pytest.raises(ValueError, match='overwrite=True'): learn.fit_zero_restarts(2, 1, path='snaps')
    learn.fit_zero_restarts(2, 1, path='snaps', overwrite=True)
    assert names() == ['cycle_000','cycle_001']         # a new fit does not mix with an old one


def test_n_last_in_memory():
    learn = make_learn()
    learn.fit_zero_restarts(4, 1, n_last=3)
    assert list(ensemble(learn).record)==[1,2,3] and len(ensemble(learn).report())==4


@pytest.mark.parametrize('old,new', [('one','two'), (None,'two'), ('one',None)])
def test_resume_into_another_folder(tmp_path, old, new):
    make_learn(path=tmp_path).fit_zero_restarts(6, 1, path='two')       # files of another fit
    names = lambda p: cycle_files(tmp_path/'models'/p)
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1, path=old)
    if new:
        with pytest.raises(ValueError, match='holds another run'): learn.fit_zero_restarts(4, 1, path=new, resume=True)
    learn.fit_zero_restarts(4, 1, path=new, resume=True, overwrite=True)
    all4 = [f'cycle_00{c}' for c in range(4)]
    if new: assert names(new)==all4
    if old: assert names(old)==all4[:2]             # left as it was
    assert all(isinstance(s, Path)==bool(new) for s in ensemble(learn).record.states.values())
    if new:
        again = make_learn(path=tmp_path, seed=3)
        again.fit_zero_restarts(4, 1, path=new, resume=True)
        assert torch.equal(preds(again), preds(learn))


def test_another_process_goes_on_in_the_new_folder(tmp_path):
    new = lambda seed=0: make_learn(dls=data(shuffle=False), path=tmp_path, seed=seed)
    whole = new()
    whole.fit_zero_restarts(4, 1)
    part = new()
    for kw in (dict(path='one'), dict(path='two', resume=True)):
        with contextlib.suppress(KeyboardInterrupt): part.fit_zero_restarts(4, 1, cbs=StopAt(2), **kw)
    part = new(9)
    part.fit_zero_restarts(4, 1, path='two', resume=True)
    for a,b in zip(members(whole), members(part), strict=True): assert same(a, b)


def test_other_files_and_other_models_in_the_folder(tmp_path):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1, path='snaps')
    (tmp_path/'models/snaps/cycle_best.pth').write_text('mine')
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(3, 1, path='snaps', resume=True)
    assert list(ensemble(learn).record)==[0,1,2] and (tmp_path/'models/snaps/cycle_best.pth').exists()
    other = make_learn(model=nn.Sequential(nn.Linear(4,5), nn.Linear(5,1)), path=tmp_path)
    before = state(other)
    with pytest.raises(ValueError, match='weights of the model.*snaps'): other.fit_zero_restarts(3, 1, path='snaps', resume=True)
    assert same(before, state(other)) and not len(ensemble(other).record) and other.validate()


def test_files_are_found_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make_learn(path='.')
    learn.fit_zero_restarts(2, 1, path='snaps')
    want = preds(learn)
    monkeypatch.chdir(tmp_path.parent)
    assert torch.equal(preds(learn), want)


@pytest.mark.parametrize('path', [None, 'snaps'])
def test_save_and_load(tmp_path, path):
    learn = make_learn(path=tmp_path, metrics=mae)
    learn.fit_zero_restarts(3, 1, path=path)
    learn.save('m')
    again = make_learn(SnapshotEnsemble(), path=tmp_path, seed=3)
    again.load('m')
    assert torch.equal(preds(again), preds(learn)) and ensemble(again).report().equals(ensemble(learn).report())
    new = make_learn(path=tmp_path, seed=4).load('m')                # a Learner without the callback gets it
    assert torch.equal(preds(new), preds(learn)) and list(new.model.state_dict()) == list(learn.model.state_dict())
    plain = make_learn(path=tmp_path, seed=5)
    plain.save('plain')
    learn.load('plain')                                              # and weights without snapshots are a single network
    assert not len(ensemble(learn).record) and torch.equal(preds(learn), preds(plain))


@pytest.mark.parametrize('model', [lambda: nn.Linear(4, 1), lambda: make_model(2)], ids=['names','shapes'])
def test_weights_that_do_not_fit_leave_the_snapshots(tmp_path, model):
    learn = make_learn(path=tmp_path)
    learn.fit_zero_restarts(2, 1)
    want = preds(learn)
    make_learn(model=model(), path=tmp_path).save('other')
    with pytest.raises(RuntimeError): learn.load('other')
    assert list(ensemble(learn).record)==[0,1] and torch.equal(preds(learn), want)
