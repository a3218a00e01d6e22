"Averages of members, the average that fits a loss, and an ensemble as one module"
import pickle
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from hypothesis import given, settings, strategies as st
from torch import nn
from ensemble_learners import average, make_model
from fastai_dropconnect.ensemble.averaging import *

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


@given(k=st.integers(1, 6), rows=st.integers(1, 4), n=st.integers(1, 4), scale=st.sampled_from([.1, 1., 40.]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mean_of_probabilities_for_any_logits(k, rows, n, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits = [scale*torch.randn(rows, n, generator=g, dtype=torch.float64) for _ in range(k)]
    for loss,act in ((CrossEntropyLossFlat(), partial(torch.softmax, dim=1)), (BCEWithLogitsLossFlat(), torch.sigmoid)):
        got = average(logits, loss)
        assert got.isfinite().all()
        torch.testing.assert_close(act(got), torch.stack([act(l) for l in logits]).mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_full(dtype):
    halves = [torch.full((2,1), v, dtype=dtype) for v in (1., 1., 1.0078125)]
    torch.testing.assert_close(average(halves, F.mse_loss), torch.full((2,1), 1+.0078125/3), rtol=1e-7, atol=0)


def test_log_probabilities_stay_log_probabilities():
    logs = [torch.randn(5,3).log_softmax(1) for _ in range(4)]
    torch.testing.assert_close(average(logs, nn.NLLLoss()).exp().sum(1), torch.ones(5))


def test_own_loss_functions_are_understood_by_their_activation():
    class Loss:
        def __init__(self, act): self.activation = act
    assert average_for(Loss(partial(torch.softmax, dim=-1)), (3,)) == ('softmax',-1)
    assert average_for(Loss(torch.sigmoid), (1,))[0] == 'sigmoid'
    assert average_for(Loss(torch.exp), (1,))[0] == 'mean'


def test_losses_derived_from_torchs():
    class Weighted(nn.CrossEntropyLoss): pass
    class Logits(nn.BCEWithLogitsLoss): pass
    assert average_for(Weighted(), (3,)) == ('softmax',-1) and average_for(Logits(), (1,))[0] == 'sigmoid'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_of_masked_members_is_averaged_in_full(dtype):
    x = torch.tensor([[[1.],[1.],[1.0078125]]], dtype=dtype)
    torch.testing.assert_close(average_members(x), torch.tensor([[1+.0078125/3]]), rtol=1e-7, atol=0)
    for kind in ('softmax','sigmoid'): assert average_members(x, kind).dtype==torch.float32


@pytest.mark.parametrize('dim', [1, -1])
def test_classes_on_any_dimension(dim):
    outs = [3*torch.randn(2, 4, 5, 5) for _ in range(3)]
    got = average(outs, CrossEntropyLossFlat(axis=dim))
    torch.testing.assert_close(got.softmax(dim), torch.stack([o.softmax(dim) for o in outs]).mean(0))

def test_classes_of_sequences():
    outs = [3*torch.randn(2, 4, 5) for _ in range(3)]
    got = average(outs, CrossEntropyLossFlat(axis=1))
    torch.testing.assert_close(got.softmax(1), torch.stack([o.softmax(1) for o in outs]).mean(0))


def test_outputs_of_one_dimension_and_single_numbers():
    torch.testing.assert_close(average([torch.zeros(4), torch.ones(4)], F.mse_loss), torch.full((4,), .5))
    assert average_members(stack_members([(torch.zeros(4),torch.tensor(1.)), (torch.zeros(4),torch.tensor(2.))]))[1]==1.5


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat()], ids=['class','function','fastai'])
def test_the_loss_of_an_ensemble_averages_as_the_loss_it_wraps(loss):
    assert average_for(EnsembleLoss(loss)) == average_for(partial(EnsembleLoss(loss), reduction='none')) == ('softmax',-1)


def test_the_average_compiles_without_a_graph_break():
    model,x = AveragedModel([nn.Linear(4, 3) for _ in range(3)], 'softmax'),torch.randn(5, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), model(x))


def test_a_module_of_models_averages_gradients_copies_and_errors():
    models = [make_model(3) for _ in range(3)]
    model,x = AveragedModel(models).eval(),torch.randn(5, 4)
    model(x).sum().backward()
    grads = [m[5].bias.grad.clone() for m in models]
    for g in grads: torch.testing.assert_close(g, torch.full((3,), 5/3))
    twin = pickle.loads(pickle.dumps(deepcopy(model)))
    assert torch.equal(twin(x), model(x)) and twin.average=='mean'
    with pytest.raises(ValueError, match="average='median'"): AveragedModel(models, 'median')
    with pytest.raises(ValueError, match='at least one'): AveragedModel([])

def test_a_mixture_is_the_members_side_by_side():
    x = torch.arange(24.).view(2, 3, 4)
    assert torch.equal(average_members(x, 'mixture'), x.flatten(1))

def test_a_loss_of_members_can_be_pickled_and_has_what_the_loss_has():
    loss = pickle.loads(pickle.dumps(EnsembleLoss(CrossEntropyLossFlat())))
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss.decodes(logits), logits.argmax(1))
    assert not hasattr(loss, '__wrapped__') and not hasattr(object.__new__(EnsembleLoss), 'anything')
