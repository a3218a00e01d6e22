import copy
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai_dropconnect.layers.variational import (VariationalDropConnectConv2d, VariationalDropConnectLinear, kl_log_uniform, kl_of, log_alpha_of, variational_)


def seeded(f, *args):
    torch.manual_seed(3)
    return f(*args)

def noisy_layer(n_in=6, n_out=4, log_sigma2=-1., **kw):
    layer = VariationalDropConnectLinear(n_in, n_out, **kw)
    nn.init.constant_(layer.log_sigma2, log_sigma2)
    return layer


@pytest.mark.parametrize('shape', [(1,6), (0,6), (6,), (2,3,6)], ids=str)
def test_shapes(shape):
    layer,x = noisy_layer(),torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape==F.linear(x, layer.weight).shape
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_types_and_autocast(dtype):
    layer = noisy_layer(dtype=dtype)
    assert layer(torch.randn(5, 6, dtype=dtype)).dtype==dtype
    layer = noisy_layer()
    with torch.autocast('cpu', torch.bfloat16): y = layer(torch.randn(5, 6))
    assert y.dtype==torch.bfloat16
    y.sum().backward()
    assert layer.log_sigma2.grad.dtype==torch.float32


def test_the_noise_does_not_depend_on_the_bias():
    layer,x = noisy_layer(),torch.randn(3, 6)
    with torch.no_grad():
        a = seeded(layer, x)
        layer.bias += 100
        b = seeded(layer, x)
    assert torch.allclose(b-a, torch.full((3,4), 100.), atol=1e-4)


def test_a_batch_of_zeros_has_finite_gradients():
    for net,x in ((noisy_layer(), torch.zeros(3, 6)), (VariationalDropConnectConv2d(1, 2, 3), torch.zeros(2, 1, 4, 4))):
        x.requires_grad_()
        y = net(x)
        assert torch.equal(y, net.eval()(x))
        y.square().sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *net.parameters()))


def test_convolutions_have_the_variance_of_independent_weights():
    conv,x = VariationalDropConnectConv2d(2, 3, 3, padding=1, stride=2),torch.randn(1, 2, 5, 5)
    nn.init.normal_(conv.log_sigma2)
    with torch.no_grad():
        y = conv(x.expand(20_000, -1, -1, -1))
        var = F.conv2d(x.square(), conv.log_sigma2.exp(), None, 2, 1)[0]
        assert ((y.mean(0)-F.conv2d(x, conv.weight, conv.bias, 2, 1)[0]).abs() < 5*(var/20_000).sqrt()).all()
        assert ((y.var(0)/var-1).abs() < 5*(2/20_000)**.5).all()


def test_traced_and_eager_passes_draw_the_same_noise():
    torch._dynamo.reset()
    layer,x = noisy_layer(),torch.randn(7, 6)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    assert torch.allclose(seeded(compiled, x), seeded(layer, x), atol=1e-5)


def test_second_derivatives_are_refused():
    layer,x = noisy_layer(),torch.randn(3, 6, requires_grad=True)
    g, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


def test_kl_falls_to_0_and_log_alpha_is_cut_off():
    a = torch.linspace(-8, 8, 50)
    assert (kl_log_uniform(a).diff()<0).all() and 0 < kl_log_uniform(torch.tensor(8.)) < 1e-3
    w,s = torch.tensor([0.,1,1]),torch.tensor([0.,99,-99])
    assert log_alpha_of(w, s).tolist()==[8,8,-8]
    w.requires_grad_()
    kl_log_uniform(log_alpha_of(w, s)).sum().backward()
    assert w.grad.isfinite().all()


def test_a_deep_net_trains_without_nan():
    torch.manual_seed(0)
    net = variational_(nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 1)))
    opt = torch.optim.Adam(net.parameters(), 3e-2)
    for _ in range(150):
        loss = net(torch.randn(16, 8)).square().mean() + 1e-2*kl_of(net)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_conversion():
    plain,x = nn.Linear(6, 4),torch.randn(3, 6)
    layer = VariationalDropConnectLinear.from_linear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias and list(plain._parameters)==['weight','bias']
    assert torch.allclose(layer.eval()(x), plain(x), atol=.02)      # weights below .0015 count as noise from the start
    with torch.no_grad(): layer.log_sigma2[1] = 20
    back = layer.to_linear()
    assert type(back) is nn.Linear and set(vars(back))==set(vars(plain)) and not back.weight[1].any() and back.weight is not plain.weight
    assert torch.equal(back(x), layer(x)) and plain.weight[1].any() and isinstance(back.weight, nn.Parameter)
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    variational_(net, ['2'])
    assert type(net[0]) is nn.Linear and type(net[2]) is VariationalDropConnectLinear and kl_of(net)>0
    twin = copy.deepcopy(net)
    assert twin[2].log_sigma2 is not net[2].log_sigma2 and torch.equal(seeded(twin, torch.ones(2, 3)), seeded(net, torch.ones(2, 3)))
    for wrong in (['1'], ['2']):
        with pytest.raises(TypeError, match='must select nn.Linear or nn.Conv2d'): variational_(net, wrong)
    with pytest.raises(TypeError, match='`conv` must be a plain Conv2d'): VariationalDropConnectConv2d.from_conv(plain)
