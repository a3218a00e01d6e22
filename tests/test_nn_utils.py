"Helpers for modules"
import torch
from torch import nn
from fastai_dropconnect.nn_utils import inner_model


def test_the_inner_model_of_a_compiled_model_in_a_wrapper():
    net = nn.Linear(2, 1)
    assert inner_model(torch.compile(nn.DataParallel(net))) is net
    assert inner_model(nn.DataParallel(torch.compile(net))) is net
