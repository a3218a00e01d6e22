"`HardConcrete`: gates take part in training, zeros are held, and the model stays as it is"
import pytest, torch
from fastai.optimizer import SGD
from torch import nn
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.hard_concrete import HardConcrete
from conftest import Scaled
from ensemble_learners import make_learn
from test_callback_gates import Each
from test_callback_variational import check_resumed, fit, hidden


def eager(**kw): return HardConcrete(**dict(dict(price=3., gate_lr=.5, warm=.1), **kw))       # closes gates within a few steps


@pytest.mark.parametrize('per', ['weight','input'])
def test_gates_close_zeros_are_held_and_the_model_stays_plain(per, tmp_path):
    learn = fit(make_learn(eager(per=per), path=tmp_path))
    assert list(learn.model.state_dict())==list(make_learn().model.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    zeros = [w.detach()==0 for w in hidden(learn)]
    assert 0 < learn.hard_concrete.zero_share() < 1 and (learn.model[5].weight!=0).all()
    if per=='input': assert all(torch.equal(z, z.any(0).expand(z.shape)) for z in zeros)
    def check(learn, name): assert not any(w.detach()[z].any() for w,z in zip(hidden(learn), zeros))
    fit(learn, 2, cbs=Each(check, 'after_step'))
    learn.save('m')
    fit(make_learn(HardConcrete(), path=tmp_path, seed=3).load('m'), 1, cbs=Each(check, 'after_step'))


def test_validations_have_the_mean_gates_and_training_its_own_weights():
    seen = {}
    def before(learn, name): seen['folded'] = [w.detach().clone() for w in hidden(learn)]
    def after(learn, name): seen.setdefault('raw', [w.detach().clone() for w in hidden(learn)])
    class Late(Each): order = HardConcrete.order+1
    fit(make_learn(eager(per='input', gate_lr=.1)), 1, cbs=[Late(before, 'before_validate'), Late(after, 'before_train')])
    learn = make_learn(eager())
    cb,layer = learn.hard_concrete,learn.model[0]
    part = cb.make_part(layer)
    was = layer.weight.detach().clone()
    part.fold()
    assert not torch.equal(layer.weight, was)
    part.unfold()
    assert torch.equal(layer.weight, was)
    part.fold()
    layer.weight.data.zero_()       # somebody loads other weights
    part.unfold()
    assert not layer.weight.any()


def test_the_scale_of_mixed_precision_is_taken_into_account():
    a,b = [fit(make_learn(eager()), 3, cbs=cbs) for cbs in (None, Scaled())]
    assert all(torch.equal(v, w) for v,w in zip(hidden(a), hidden(b)))


def test_the_price_decides():
    shares = [fit(make_learn(eager(price=p))).hard_concrete.zero_share() for p in (.001,10.)]
    assert shares[0]<shares[1]


@pytest.mark.parametrize('event', ['after_backward','after_pred'])
def test_a_broken_fit_leaves_nothing(event):
    def stop(learn, name): raise KeyboardInterrupt
    learn = make_learn(eager())
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Each(stop, event))
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'weight' in vars(m) for m in learn.model.modules())
    assert not learn.hard_concrete.record.masks
    fit(learn)
    assert learn.hard_concrete.record.masks


def test_convolutions_and_layers_that_lose_all():
    conv = nn.Conv2d(3, 4, 3)
    part = HardConcrete(per='input').make_part(conv)
    assert part.own.shape==(1,3,1,1) and part.n_each==4*9 and part.kept().shape==conv.weight.shape
    part.own.data.fill_(-20)
    part.fold()
    assert (conv.weight!=0).any(3).any(2).any(0).sum()==1      # one input stays


@pytest.mark.parametrize('kw', [dict(price=0), dict(gate_lr=-1), dict(warm=1), dict(per='unit'), dict(p0=0)], ids=str)
def test_bad_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): HardConcrete(**kw)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    check_resumed(lambda: make_learn(eager(per='input'), path=tmp_path, opt_func=SGD))
