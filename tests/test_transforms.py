"What torch does to functions and layers: compilation, tracing, vmap, derivatives of derivatives, tensors without data"
import pytest, torch
from torch import nn

from fastai_dropconnect.all import *
from fastai_dropconnect.functional import MODES

modes = pytest.mark.parametrize('mode', MODES)


def rows(n, width): return (torch.randn(n, width),)
def words(n): return (torch.randint(0, 5, (n,)),)
def table(n): return torch.randint(0, 5, (n,2)),torch.randn(n, 3)

# Each makes a layer, and a batch of `n` rows for it
CASES = {
    'drop_bias': lambda: (DropConnectLinear(5, 4, p=.3, drop_bias=True), lambda n: rows(n, 5)),
    'masked': lambda: (MaskedEnsembleLinear(5, 4, n_members=3), lambda n: rows(n, 15)),
    'masked-example': lambda: (MaskedEnsembleLinear(5, 4, n_members=2, p=.3), lambda n: rows(n, 10)),
    'embedding': lambda: (DropConnectEmbedding(5, 4, p=.3), words),
    'embedding_dropout': lambda: (EmbeddingDropout(nn.Embedding(5, 4), .3), words),
    'weight_dropout': lambda: (WeightDropout(nn.Linear(5, 4), .3, 'weight'), lambda n: rows(n, 5)),
    **{f'table-{m}': lambda m=m: (TabularDropConnectModel([(5,2), (5,2)], 3, 1, [6], weight_p=.3, mode=m, embed_weight_p=.2), table) for m in MODES}}


def step(layer, args, seed=3): # Outputs, and gradients of all parameters
    layer.zero_grad()
    torch.manual_seed(seed)
    y = layer(*args)
    y.square().sum().backward()
    return [y.detach(), *[p.grad.clone() for p in layer.parameters()]]

# torch.compile

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_one_graph_for_any_number_of_rows(case):
    torch._dynamo.reset()
    layer,batch = case()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for n in (6, 9):
        args = batch(n)
        for ours,theirs in zip(step(layer, args), step(compiled, args), strict=True): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@modes
def test_p_may_change_within_one_graph(mode):
    torch._dynamo.reset()
    compiled = torch.compile(linear_dropconnect, backend='aot_eager', fullgraph=True, dynamic=True)
    for n,p in ((6,.3), (7,.4), (8,.5)):
        args = torch.randn(n, 5),torch.randn(4, 5),torch.randn(4),p,mode
        torch.manual_seed(1)
        want = linear_dropconnect(*args)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(*args), want)
    with pytest.raises(ValueError, match='`p` must be a number with 0 <= p < 1, got p=1.5'): linear_dropconnect(*args[:3], 1.5)
