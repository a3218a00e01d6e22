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
