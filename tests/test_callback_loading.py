"`learn.load` in a new Learner brings the ensemble back, or says what it leaves out"
import warnings
import pytest, torch
from fastai.tabular.all import SaveModelCallback
from ensemble_learners import *
from fastai_dropconnect.all import *

pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array', 'ignore::DeprecationWarning')

def said(f, *args, **kw):
    "The warnings of a call, but those of fastai"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f(*args, **kw)
    return [str(w.message) for w in ws if 'the file holds' in str(w.message)]


@pytest.mark.parametrize('use', ['average', 'weights', 'last', 1])
@pytest.mark.parametrize('with_opt', [True, False])
def test_a_new_learner_predicts_the_same_after_load(use, with_opt, tmp_path):
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=torch.nn.CrossEntropyLoss(), path=tmp_path)
    learn.fit_zero_restarts(3, 1)
    if use=='weights': ensemble(learn).average_weights()
    ensemble(learn).use = use
    learn.save('m', with_opt=with_opt)
    fresh = make_learn(seed=5, dls=data(target=classes), model=make_model(3), loss_func=torch.nn.CrossEntropyLoss(), path=tmp_path)
    assert (preds(fresh)!=preds(learn)).any()
    assert said(fresh.load, 'm', with_opt=with_opt)==[]
    assert torch.equal(preds(fresh), preds(learn)) and ensemble(fresh).use==use
    assert fresh.load('m', with_opt=with_opt) is fresh and len(fresh._grab_cbs(SnapshotEnsemble))==1
    fresh.fit_zero_restarts(1, 1)           # it can go on
    assert len(ensemble(fresh).record)==1


def test_members_of_a_masked_ensemble_come_back_too(tmp_path):
    def learner(seed): return tabular(seed=seed, path=tmp_path, config=tabular_dropconnect_config(members=3))
    learn = learner(0)
    learn.fit_zero_restarts(2, 1)
    learn.save('m')
    fresh = learner(1).load('m')
    assert torch.equal(fresh.get_member_preds()[0], learn.get_member_preds()[0]) and torch.equal(preds(fresh), preds(learn))


def test_what_is_left_out_is_said(tmp_path):
    learn = make_learn(FrozenZeroInit(.5), path=tmp_path)
    learn.fit_zero_restarts(2, 1)
    learn.save('m')
    fresh = make_learn(path=tmp_path)
    message, = said(fresh.load, 'm')
    assert 'masks of FrozenZeroInit for 0.weight, 3.weight' in message and 'add FrozenZeroInit() before `load`' in message
    assert torch.equal(preds(fresh), preds(learn))
    held = make_learn(FrozenZeroInit(.5), path=tmp_path)
    assert said(held.load, 'm')==[] and list(held.frozen_zero_init.record)
    other = make_learn(model=torch.nn.Sequential(*make_model()[:-1], torch.nn.Identity(), torch.nn.Linear(8,1)), path=tmp_path)
    messages = said(other.load, 'm', strict=False)
    assert any('an ensemble of 2 snapshots, which was left out' in m for m in messages) and not hasattr(other, 'snapshot_ensemble')


def test_a_load_that_fails_or_has_no_ensemble_changes_no_callbacks(tmp_path):
    learn = make_learn(path=tmp_path)
    learn.fit(1)
    learn.save('plain')
    fresh = make_learn(path=tmp_path)
    before = list(fresh.cbs)
    assert said(fresh.load, 'plain')==[] and list(fresh.cbs)==before
    with pytest.raises(FileNotFoundError): fresh.load('nothing')
    other = make_learn(model=make_model(2), path=tmp_path)
    with pytest.raises(RuntimeError): other.load('plain')
    assert not fresh.model._load_state_dict_pre_hooks and not other.model._load_state_dict_pre_hooks


def test_the_best_weights_of_a_fit_are_loaded_as_before(tmp_path):
    learn = make_learn(SaveModelCallback(), path=tmp_path)
    learn.fit_zero_restarts(3, 1)
    assert len(ensemble(learn).record)==3 and ensemble(learn).use=='average'
