"Products by oneDNN: the same numbers, gradients and second derivatives, only where they pay, and torch as it was afterwards"
import copy, os, subprocess, sys
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.tabular.all import CancelBatchException, L1LossFlat, SGD, TabularDataLoaders, set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastai_dropconnect import products
from fastai_dropconnect.functional import linear_dropconnect
from fastai_dropconnect.layers.masked_ensemble import MaskedEnsembleLinear, member_linear
from fastai_dropconnect.products import _torch_linear, fast_linear, fast_linears, onednn_pays
from fastai_dropconnect.tabular.learner import tabular_learner

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN')

@pytest.fixture
def slow_mkl(monkeypatch):
    "Let MKL count as slow on any CPU, and all products as large"
    monkeypatch.setattr(products, 'is_mkl_slow', lambda: True)
    for name in ('LEAST_WORK','LEAST_IN','LEAST_OUT'): monkeypatch.setattr(products, name, 1)

@pytest.fixture
def used(slow_mkl, monkeypatch):
    "Note the products by oneDNN; other layouts can take it a thousand times as long"
    calls,made = [],products._onednn
    def noted(x, weight, bias):
        for t in (x,weight): assert t.is_contiguous() or t.t().is_contiguous(), t.stride()
        calls.append(x.shape)
        return made(x, weight, bias)
    monkeypatch.setattr(products, '_onednn', noted)
    return calls

def close(got, want):
    "Are two results the same but for rounding?"
    return torch.allclose(got, want, rtol=1e-4, atol=1e-5*float(want.detach().abs().max() if want.numel() else 0))


@pytest.mark.parametrize('n,n_in,n_out', [(1,1,1), (0,3,2), (3,0,2), (5,7,3), (64,33,17), (200,581,100)])
@pytest.mark.parametrize('bias', [True,False])
def test_any_shape(used, n, n_in, n_out, bias):
    torch.manual_seed(0)
    x,w,b = [torch.randn(*s, requires_grad=True) for s in ((n,n_in),(n_out,n_in),(n_out,))]
    args = (x,w,b) if bias else (x,w)
    got,want = fast_linear(*args),F.linear(*args)
    g = torch.randn(n, n_out)
    assert close(got, want)
    for a,e in zip(torch.autograd.grad(got, args, g), torch.autograd.grad(want, args, g)): assert close(a, e)
    assert bool(used)==(n*n_in*n_out>0)

def test_views_and_layouts(used):
    torch.manual_seed(0)
    wide,w = torch.randn(30, 40),torch.randn(6, 10)
    for x in (wide[:,5:15], wide[::3,20:30], wide.t()[:,:10], wide[:,::4], wide[:1,:10].expand(8, -1), wide[:4,:1].expand(-1, 10)):
        for weight in (w, wide.t()[:6,:10]):
            a,b = [x.detach().requires_grad_(),weight.detach().requires_grad_()],torch.randn(len(x), 20)[:,7:13]
            (got,want) = [(linear(*a), torch.autograd.grad(linear(*a), a, b)) for linear in (fast_linear,F.linear)]
            assert close(got[0], want[0]) and all(map(close, got[1], want[1]))

def test_any_layout_of_the_bias(used):
    torch.manual_seed(0)
    x,w = torch.randn(16, 10),torch.randn(6, 10)
    for b in (torch.randn(6, 3)[:,1], torch.randn(1).expand(6), torch.randn(12)[::2]):
        for needs_grad in (False, True):
            b = b.detach().requires_grad_(needs_grad)
            assert close(fast_linear(x, w, b), F.linear(x, w, b))
    assert len(used)==6

def test_arguments_have_the_names_of_torch(used):
    class Named(nn.Linear):
        def forward(self, x): return F.linear(input=x, weight=self.weight, bias=self.bias)
    layer,x = Named(10, 6),torch.randn(16, 10)
    with fast_linears(): y = layer(x)
    assert used and close(y, layer(x))

def test_what_torch_must_do_itself(used):
    torch.manual_seed(0)
    x,w = torch.randn(8, 5),torch.randn(3, 5)
    torch.testing.assert_close(torch.func.vmap(lambda row: fast_linear(row[None], w)[0])(x), F.linear(x, w))
    torch.testing.assert_close(torch.func.jvp(lambda t: fast_linear(t, w), (x,), (x,))[1], F.linear(x, w))
    torch.testing.assert_close(torch.func.jacrev(lambda t: fast_linear(t, w).sum(0))(x), torch.func.jacrev(lambda t: F.linear(t, w).sum(0))(x))
    assert fast_linear(x.to('meta'), w.to('meta')).is_meta
    assert fast_linear(x.double(), w.double()).dtype==torch.float64
    with torch.autocast('cpu', torch.bfloat16): assert fast_linear(x, w).dtype==torch.bfloat16
    exported = torch.export.export(Layer(w), (x,))
    assert 'mkldnn' not in str(exported.graph)
    assert not used
    for bad in ((x, w[:,:4]), (x, w, torch.zeros(2)), (x, w, torch.zeros(3).bfloat16())):
        with pytest.raises(RuntimeError): fast_linear(*bad)

class Layer(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
    def forward(self, x):
        with fast_linears(): return F.linear(x, self.w)

def test_a_batch_of_gradients(used):
    x,w = torch.randn(4, 5, requires_grad=True),torch.randn(3, 5, requires_grad=True)
    y,g = fast_linear(x, w),torch.eye(12).view(12, 4, 3)
    got,want = [torch.autograd.grad(t, w, g, is_grads_batched=True)[0] for t in (y,F.linear(x, w))]
    torch.testing.assert_close(got, want)

def test_second_derivatives(slow_mkl):
    torch.manual_seed(0)
    args = [torch.randn(4, 5, requires_grad=True),torch.randn(3, 5, requires_grad=True),torch.randn(3, requires_grad=True)]
    def penalty(linear):
        grads = torch.autograd.grad(linear(*args).tanh().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), args)
    for a,e in zip(penalty(fast_linear), penalty(F.linear)): assert close(a, e)

@pytest.mark.parametrize('bias', [True,False])
@pytest.mark.parametrize('rows', [(16,),(2,8)])
def test_members(used, monkeypatch, bias, rows):
    torch.manual_seed(0)
    x,w = torch.randn(*rows, 12, requires_grad=True),torch.randn(3, 5, 4, requires_grad=True)
    b = torch.randn(15, requires_grad=True) if bias else None
    args = [t for t in (x,w,b) if t is not None]
    got = member_linear(x, w, b)
    grads = torch.autograd.grad(got.tanh().sum(), args)
    assert bool(used)==(len(rows)==1)
    monkeypatch.setattr(products, 'is_mkl_slow', lambda: False)
    want = member_linear(x, w, b)
    assert close(got, want)
    for a,e in zip(grads, torch.autograd.grad(want.tanh().sum(), args)): assert close(a, e)

@pytest.mark.parametrize('p', [.1,.5])
def test_gaussian_noise_is_the_same(used, monkeypatch, p):
    x,w,b = torch.randn(16, 5, requires_grad=True),torch.randn(3, 5, requires_grad=True),torch.randn(3, requires_grad=True)
    def run():
        torch.manual_seed(0)
        y = linear_dropconnect(x, w, b, p, 'gaussian')
        return [y, *torch.autograd.grad(y.tanh().sum(), (x,w,b))]
    got = run()
    assert len(used)==6
    monkeypatch.setattr(products, 'is_mkl_slow', lambda: False)
    for a,e in zip(got, run()): assert close(a, e)

def test_a_masked_ensemble_keeps_its_zeros(used):
    layer = MaskedEnsembleLinear(8, 6, n_members=4, sparsity=.5)
    layer(torch.randn(10, 32)).square().sum().backward()
    assert used and not layer.weight.grad[layer.weight==0].any()


def dls(bs=32):
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=r.choice(list('abc'), 256), size=r.normal(size=256).astype('float32')))
    df['price'] = df['size'] + (df.kind=='a')
    return TabularDataLoaders.from_df(df.assign(price=df.price.astype('float32')), procs=[], cat_names=[], cont_names=['size'], y_names='price',
                                      valid_idx=range(64), bs=bs, device='cpu')

def trained(fast):
    set_seed(0)
    learn = tabular_learner(dls(), layers=[16,8], loss_func=L1LossFlat(), opt_func=SGD)
    if fast: learn.accelerate(replacement=True, valid_bs=32)     # fastai's draws
    set_seed(1)
    with learn.no_bar(),learn.no_logging():
        learn.fit(2, 1e-2)
        return learn,learn.get_preds()[0]

def test_an_accelerated_learner_multiplies_with_onednn(used):
    plain = trained(False)[1]
    assert not used
    learn,fast = trained(True)
    assert used and F.linear is _torch_linear
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    seen = len(used)
    learn.decelerate()
    with learn.no_bar(): learn.get_preds()
    assert len(used)==seen

def test_parts_that_backward_runs_again(used):
    class Again(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, *xb): return checkpoint(self.model, *xb, use_reentrant=False)
    learn = tabular_learner(dls(), layers=[16,8], loss_func=L1LossFlat(), opt_func=SGD).accelerate()
    learn.model = Again(learn.model)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    assert used and np.isfinite(learn.recorder.values[-1]).all()

@pytest.mark.parametrize('error', [KeyboardInterrupt,ValueError,CancelBatchException])
def test_a_broken_batch_gives_torch_its_linear_back(used, error):
    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, *xb):
            self.model(*xb)
            raise error
    learn,_ = trained(True)
    learn.model = Broken(learn.model)
    with learn.no_bar(),learn.no_logging():
        if error is CancelBatchException: learn.fit(1)
        else:
            with pytest.raises(error): learn.fit(1)
    assert used and F.linear is _torch_linear

def test_somebody_elses_linear_stays(used, monkeypatch):
    def theirs(*args): return 'theirs'
    monkeypatch.setattr(F, 'linear', theirs)
    with fast_linears(): assert F.linear is theirs
    assert F.linear is theirs and not used

def test_a_copy_and_a_pickle_know_nothing_of_it(used, tmp_path):
    learn,_ = trained(True)
    assert type(copy.deepcopy(learn).model.layers[0][0]) is nn.Linear

def test_what_decides(monkeypatch):
    x,w = torch.randn(512, 200),torch.randn(100, 200)
    monkeypatch.setattr(products, 'is_mkl_slow', lambda: True)
    assert onednn_pays(x, w) and not onednn_pays(x[:64], w)
    with torch.backends.mkldnn.flags(enabled=False): assert not onednn_pays(x, w)

def test_older_vectors_are_left_to_mkl():
    code = 'from fastai_dropconnect.products import is_mkl_slow; print(is_mkl_slow())'
    env = dict(os.environ, ATEN_CPU_CAPABILITY='avx2')
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.strip()=='False'
