"How DropConnect layers are made and shown; what they compute is in test_contract.py"
import inspect, pickle
import pytest, torch
from torch import nn
from fastai_dropconnect.layers.dropconnect import DropConnectEmbedding, DropConnectLinear


@pytest.mark.parametrize('cls', [DropConnectLinear, DropConnectEmbedding])
def test_settings_are_given_by_keyword(cls):
    "Else the third argument, which people mean for `p`, would be taken for another"
    with pytest.raises(TypeError, match='positional'): cls(20, 10, 0.1)
    assert cls(20, 10, p=0.1).p == 0.1


def test_arguments_are_those_of_the_plain_layer_and_some_more():
    ours,plain = (list(inspect.signature(c).parameters) for c in (DropConnectLinear, nn.Linear))
    assert ours[:2]==plain[:2] and set(plain) < set(ours)
    layer = DropConnectLinear(3, 2, bias=False, device='meta', dtype=torch.float64)
    assert layer.bias is None and layer.weight.is_meta and layer.weight.dtype==torch.float64
    emb = DropConnectEmbedding(5, 2, p=.5, padding_idx=0, dtype=torch.float64)
    assert emb.padding_idx==0 and emb.weight.dtype==torch.float64 and not emb.weight[0].any()


@pytest.mark.parametrize('kw,shown', [(dict(), "p=0.5, mode='example'"), (dict(p=0, mode='batch', drop_bias=True), "p=0.0, mode='batch', drop_bias=True"),
                                      (dict(drop_bias=True, sample_eval=True), "mode='example', drop_bias=True, sample_eval=True")])
def test_a_layer_shows_its_settings(kw, shown):
    assert repr(DropConnectLinear(3, 2, **kw)) == f'DropConnectLinear(in_features=3, out_features=2, bias=True, {shown if "p=" in shown else "p=0.5, "+shown})'
    assert repr(DropConnectEmbedding(3, 2, p=.2)) == 'DropConnectEmbedding(3, 2, p=0.2)'


def test_conversion_takes_settings_and_gives_a_layer_that_can_be_pickled():
    layer = DropConnectLinear.from_linear(nn.Linear(3, 2), .2, 'gaussian', True)
    assert (layer.p, layer.mode, layer.drop_bias, layer.sample_eval) == (.2, 'gaussian', True, False)
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
    assert DropConnectLinear.from_linear(layer, .3).weight is layer.weight      # new settings for a layer that has some


class Other(nn.Linear):
    def forward(self, x): return super().forward(x)*2

@pytest.mark.parametrize('bad,got', [(Other(3, 2), 'got Other'), (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 'got a parametrized one')])
def test_a_layer_that_would_lose_something_is_not_converted(bad, got):
    with pytest.raises(TypeError, match=f'`linear` must be a plain Linear.*{got}'): DropConnectLinear.from_linear(bad)
    with pytest.raises(TypeError, match='`embedding` must be a plain Embedding.*got Linear'): DropConnectEmbedding.from_embedding(nn.Linear(3, 2))


def test_padding_rows_stay_zero_and_get_no_gradient():
    emb = DropConnectEmbedding(20, 4, p=.5, padding_idx=3)
    out = emb(torch.arange(20))
    out.sum().backward()
    assert not out[3].any() and not emb.weight.grad[3].any()
    assert torch.equal(emb.weight.grad.any(1), out.any(1))
