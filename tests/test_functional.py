"DropConnect as functions: choice of the backend, operators, errors, gradients"
import subprocess, sys
import pytest, torch
import torch.nn.functional as F
from fastai_dropconnect import functional
from fastai_dropconnect.functional import BACKENDS, MODES, choose_backend, dropconnect, linear_dropconnect


def run(code):
    "What a new Python process prints"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr
    return res.stdout.strip()


def test_without_numba_the_package_works():
    code = '''
import sys
sys.modules['numba'] = None     # as if it were not installed
from fastai_dropconnect.functional import choose_backend
import torch
from fastai_dropconnect.layers.dropconnect import DropConnectLinear
DropConnectLinear(3, 2)(torch.randn(4, 3)).sum().backward()
print(choose_backend('cpu'))
try: choose_backend('cpu', 'numba')
except RuntimeError as e: print('not installed' in str(e))'''
    assert run(code).split()==['torch','True']


def test_numba_is_imported_only_when_it_is_needed():
    assert run("import sys, fastai_dropconnect.all; print('numba' in sys.modules)")=='False'


def test_the_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', 'torch')
    assert choose_backend('cpu')=='torch' and choose_backend('cpu', 'numba')=='numba'
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', 'fortran')
    with pytest.raises(ValueError, match="backend='fortran'"): linear_dropconnect(torch.ones(3, 2), torch.ones(4, 2))
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', '')
    assert choose_backend('cpu')=='numba'


def tensors(n=6, n_in=5, n_out=4, dtype=torch.float32):
    "Inputs, a weight, a bias, and a gradient of the outputs"
    return [torch.randn(s, dtype=dtype) for s in ((n,n_in), (n_out,n_in), (n_out,), (n,n_out))]


def test_one_list_of_modes_and_of_backends():
    assert MODES==('example', 'batch', 'gaussian') and BACKENDS==('numba', 'triton', 'torch')
    for mode in MODES: assert linear_dropconnect(*tensors()[:3], mode=mode).shape==(6,4)


@pytest.mark.parametrize('args,error,message', [
    (dict(mode='rows'), ValueError, "`mode` must be one of 'example', 'batch', 'gaussian', got mode='rows'"),
    (dict(backend='cuda'), ValueError, "`backend` must be None or one of 'numba', 'triton', 'torch', got backend='cuda'"),
    (dict(p=1), ValueError, '`p` must be a number with 0 <= p < 1, got p=1'),
    (dict(p='0.5'), TypeError, "`p` must be a number with 0 <= p < 1, got p='0.5'")])
def test_wrong_arguments_are_refused_also_in_eval(args, error, message):
    for training in (True, False):
        with pytest.raises(error, match=message): linear_dropconnect(*tensors()[:3], training=training, **args)


def test_inputs_that_do_not_fit_are_refused():
    x,w,b,_ = tensors()
    with pytest.raises(ValueError, match=r'`x` must have 5 values in its last dimension, got x.shape=\(6, 4\)'): linear_dropconnect(x[:,1:], w, b)
    with pytest.raises(TypeError, match='`x` must be of the type of `weight`, torch.float32, got x.dtype=torch.float64'):
        linear_dropconnect(x.double(), w, b)


def test_a_backend_that_does_not_run_there_is_refused():
    with pytest.raises(RuntimeError, match="`backend` must run on meta, got backend='numba', which is not installed"): choose_backend('meta', 'numba')


@pytest.mark.parametrize('name', ['_example_forward', '_example_grads', '_example_grad_input', '_example_grad_weight'])
def test_the_operators_keep_the_rules_of_torch(name):
    "Schema, shapes without data, autograd registration and compilation"
    (x,w,_,g),rest = tensors(),(torch.tensor(3),9000,'torch')
    args = dict(_example_forward=(x,w), _example_grads=(g,x,w), _example_grad_input=(g,w), _example_grad_weight=(g,x))[name]
    torch.library.opcheck(getattr(functional, name), (*args,*rest))


def test_the_operator_of_normal_numbers_keeps_the_rules_of_torch():
    torch.library.opcheck(functional._normals, (torch.tensor(3),torch.empty(6, 4),'torch'))


@pytest.mark.parametrize('needed', ['x', 'w', 'b', 'xw', 'wb', 'xwb'])
@pytest.mark.parametrize('mode', MODES)
def test_only_the_gradients_asked_for(mode, needed):
    x,w,b,g = tensors(dtype=torch.float64)
    ts = dict(x=x, w=w, b=b)
    for name in needed: ts[name].requires_grad_()
    torch.manual_seed(5)
    linear_dropconnect(x, w, b, .3, mode).backward(g)
    grads = {name: t.grad for name,t in ts.items()}
    assert {name for name,t in grads.items() if t is not None}==set(needed)
    for t in ts.values(): t.grad = None; t.requires_grad_()
    torch.manual_seed(5)
    linear_dropconnect(x, w, b, .3, mode).backward(g)
    for name in needed: torch.testing.assert_close(grads[name], ts[name].grad)


@pytest.mark.parametrize('mode', MODES)
def test_the_type_under_autocast_is_that_of_a_linear_layer(mode):
    for dtype in (torch.float32, torch.float64):
        x,w,b,_ = tensors(dtype=dtype)
        with torch.autocast('cpu', torch.bfloat16):
            for bias in (b, None): assert linear_dropconnect(x, w, bias, mode=mode).dtype==F.linear(x, w, bias).dtype


def test_a_weight_without_noise_is_the_weight_itself():
    w = torch.randn(3, 4)
    assert dropconnect(w, 0) is w and dropconnect(w, .5, training=False) is w
    out = dropconnect(w, .5)
    assert torch.equal(out[out!=0], w[out!=0]*2)


def test_a_dropped_bias_is_a_weight_of_one_more_input():
    x,w,b,_ = tensors()
    for mode in MODES:
        torch.manual_seed(3)
        out = linear_dropconnect(x, w, b, .3, mode, drop_bias=True)
        torch.manual_seed(3)
        torch.testing.assert_close(out, linear_dropconnect(F.pad(x, (0,1), value=1.), torch.cat([w, b[:,None]], 1), None, .3, mode))

def test_rows_of_zeros_get_no_noise_from_what_torch_can_trace():
    g = torch.Generator().manual_seed(0)
    w,b,x = torch.randn(5, 4, generator=g),torch.randn(5, generator=g),torch.randn(3, 4, generator=g)
    x[1] = 0
    y = functional._gaussian_expression(x, w, b, torch.tensor(7), .5, None)
    assert torch.equal(y[1], b) and not (y[[0,2]]==F.linear(x[[0,2]], w, b)).any()
