"Predictions of the members of any ensemble, their spread, and the module that predicts"
import pickle
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from fastai.tabular.all import Callback, CrossEntropyLossFlat, accuracy, load_learner, mae
from torch import nn
from ensemble_learners import *
from fastai_dropconnect.all import *

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


def test_members_of_a_model_with_several_outputs():
    learn = two_outputs()
    learn.fit_zero_restarts(3, 1)
    each,_ = learn.get_member_preds()
    mean,_,spread = learn.get_preds_and_spread()
    for e,m,s,p in zip(each, mean, spread, preds(learn)):
        assert e.shape==(96,3,1)
        torch.testing.assert_close(m, p)
        torch.testing.assert_close(s, e.std(1, correction=0))
