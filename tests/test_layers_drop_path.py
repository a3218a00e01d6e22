import pytest, torch
from fastai_dropconnect.layers.drop_path import DropPath, drop_path, drop_path_rates


def test_the_draws_are_those_of_timm():
    "Computed with timm 1.0.31: `drop_path(torch.ones(8, 2), .25, True)` and `drop_path(torch.ones(8, 2, 2), .5, True, False)`"
    torch.manual_seed(0)
    y = drop_path(torch.ones(8, 2), .25)
    assert y[:,0].tolist() == [0.0, 1.3333333730697632, 1.3333333730697632, 0.0, 1.3333333730697632, 0.0, 1.3333333730697632, 1.3333333730697632]
    assert torch.equal(y[:,0], y[:,1])
    torch.manual_seed(1)
    assert drop_path(torch.ones(8, 2, 2), .5, True, False)[:,0,0].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_rates_are_those_of_timm():
    assert drop_path_rates(.3, 4) == pytest.approx(torch.linspace(0, .3, 4).tolist()) and drop_path_rates(.3, 1)==[0] and drop_path_rates(0, 2)==[0,0]


@pytest.mark.parametrize('p', [.05, .5, .9])
def test_mean_and_variance(p):
    n,y = 50_000,drop_path(torch.ones(50_000, 1), p)
    var = p/(1-p)
    assert abs(y.mean()-1) < 5*(var/n)**.5 and abs(y.var()/var-1) < .1
    assert set(y.flatten().tolist()) <= {0., (torch.ones(1)/(1-p)).item()}


def test_eval_and_p_0_return_the_same_tensor():
    x = torch.randn(4, 3)
    assert drop_path(x, .5, False) is x and drop_path(x, 0.) is x and DropPath(.5).eval()(x) is x


@pytest.mark.parametrize('shape', [(1,3), (0,3), (5,), (2,3,4), (2,3,4,5)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_types(shape, dtype):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = DropPath(.5)(x)
    assert y.shape==shape and y.dtype==dtype
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_compiles_and_bad_input():
    torch._dynamo.reset()
    compiled = torch.compile(DropPath(.5), backend='eager', fullgraph=True)
    torch.manual_seed(0)
    y = compiled(torch.ones(9, 2))
    torch.manual_seed(0)
    assert torch.equal(y, drop_path(torch.ones(9, 2), .5))
    for f in (lambda: DropPath(1.), lambda: drop_path(torch.ones(1), -1), lambda: drop_path_rates(1, 2), lambda: drop_path_rates(.1, 0)):
        with pytest.raises(ValueError, match='must be'): f()
