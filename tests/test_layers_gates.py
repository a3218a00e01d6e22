import copy, pickle
import pytest, torch
from torch import nn
from fastai_dropconnect.layers.gates import (HIGH, LOW, TEMPERATURE, FeatureGate, GatedLinear, HardConcreteLinear, gates_open, initial_log_alpha,
                                             mean_gates, sample_gates)


@pytest.mark.parametrize('a', [-4., -1., 0., 2., 6.])
def test_lumps_and_density_are_those_of_the_paper(a):
    "Louizos et al. 2018, equations 10 to 12: P(z<=c) = sigmoid(temperature*logit((c-low)/(high-low)) - log_alpha) for 0 <= c < 1"
    n,z = 40_000,sample_gates(torch.full((40_000,), a))
    def cdf(c): return torch.sigmoid(TEMPERATURE*torch.logit(torch.tensor((c-LOW)/(HIGH-LOW))) - a).item()
    for c in (0, .3, .9):
        p = cdf(c)
        assert abs((z<=c).float().mean()-p) < 5*(p*(1-p)/n)**.5 + 1e-4
    assert abs(1-cdf(0)-gates_open(torch.tensor(a))) < 1e-5
    assert abs((z==1).float().mean() - (1-torch.sigmoid(TEMPERATURE*torch.logit(torch.tensor((1-LOW)/(HIGH-LOW)))-a))) < .02


def test_mean_gates_are_exact_at_both_ends_and_grow():
    a = torch.linspace(-8, 8, 100)
    z = mean_gates(a)
    assert (z.diff()>=0).all() and (z[a<-2.4]==0).all() and (z[a>2.4]==1).all() and (z[(a>-2.39)&(a<2.39)].diff()>0).all()


def test_gradients():
    a = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: (torch.manual_seed(1), sample_gates(a))[1], a)
    assert torch.autograd.gradcheck(gates_open, a) and torch.autograd.gradcheck(mean_gates, a)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types(dtype):
    assert FeatureGate([1,2])(torch.ones(4, 3, dtype=dtype)).dtype==dtype
    for cls in (HardConcreteLinear,GatedLinear):
        y = cls(6, 4, dtype=dtype)(torch.ones(3, 6, dtype=dtype))
        assert y.dtype==dtype and y.isfinite().all()


LAYERS = [pytest.param(lambda: HardConcreteLinear(6, 4), id='weight'), pytest.param(lambda: HardConcreteLinear(6, 4, per='input', bias=False), id='input'),
          pytest.param(lambda: GatedLinear(6, 4), id='gated'), pytest.param(lambda: FeatureGate([1,2,3]), id='columns')]

@pytest.mark.parametrize('make', LAYERS)
@pytest.mark.parametrize('shape', [(1,6), (0,6), (6,), (2,3,6)], ids=str)
def test_shapes(make, shape):
    layer,x = make(),torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape[:-1]==shape[:-1]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('make', LAYERS)
def test_compiles_without_a_graph_break(make):
    torch._dynamo.reset()
    layer = make()
    compiled,x = torch.compile(layer, backend='eager', fullgraph=True),torch.randn(5, 6)
    for _ in range(2):
        torch.manual_seed(3)
        want = layer(x)
        torch.manual_seed(3)
        assert torch.equal(compiled(x), want)
        layer.eval()


def test_hard_concrete_equals_the_dense_expression_with_the_same_gates():
    x = torch.randn(5, 6)
    for per in ('weight','input'):
        layer = HardConcreteLinear(6, 4, per=per)
        torch.manual_seed(2)
        y = layer(x)
        torch.manual_seed(2)
        z = sample_gates(layer.log_alpha)
        assert torch.allclose(y, x@(layer.weight*z).T + layer.bias, atol=1e-6)


def test_expected_open_is_the_mean_number_of_connections():
    for per in ('weight','input'):
        layer = HardConcreteLinear(20, 10, per=per)
        layer.log_alpha.data = torch.randn(layer.log_alpha.shape)*2
        with torch.no_grad(): counts = torch.stack([(sample_gates(layer.log_alpha).expand(10, 20)>0).sum() for _ in range(1000)]).double()
        assert abs(counts.mean()-layer.expected_open()) < 5*counts.std()/1000**.5


def test_conversion_shares_parameters_both_ways_and_closed_gates_are_exact_zeros():
    plain,x = nn.Linear(6, 4),torch.randn(3, 6)
    layer = HardConcreteLinear.from_linear(plain)
    layer.log_alpha.data[0] = -5
    assert layer.weight is plain.weight and list(plain._parameters)==['weight','bias']
    back = layer.eval().to_linear()
    assert type(back) is nn.Linear and not back.training and (back.weight[0]==0).all()
    assert torch.allclose(back(x), layer(x), atol=1e-7) and back.weight is not layer.weight
    with pytest.raises(TypeError, match='`linear` must be a plain Linear'): HardConcreteLinear.from_linear(nn.Conv1d(1, 1, 1))


def test_gated_linear_opens_by_row():
    layer = GatedLinear(6, 4).eval()
    with torch.no_grad():
        layer.gate[-1].weight.mul_(50)
        z = layer.gates(torch.randn(200, 6))
    assert (z==0).any() and (z==1).any() and (z.std(0)>0).all()


@pytest.mark.parametrize('f,message', [
    (lambda: FeatureGate([]), 'sizes'), (lambda: FeatureGate([0]), 'sizes=0'), (lambda: FeatureGate([1], p0=1), 'p0=1'), (lambda: initial_log_alpha(0), 'p0=0'),
    (lambda: HardConcreteLinear(2, 2, per='unit'), "per='unit'"), (lambda: GatedLinear(2, 2, hidden=0), 'hidden=0'), (lambda: FeatureGate([2])(torch.ones(1, 3)), '2 columns')])
def test_bad_input(f, message):
    with pytest.raises(ValueError, match=message): f()


@pytest.mark.parametrize('make', LAYERS)
def test_copies(make):
    layer,x = make(),torch.randn(3, 6)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin.eval()(x), layer.eval()(x)) and repr(twin)==repr(layer)
        with pytest.raises(TypeError, match='torch.jit.script does not support'): torch.jit.script(twin)
