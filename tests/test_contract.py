"What every layer and model promises, checked for every public class, mode and kernel"
import copy, importlib.util, io, os, pickle
import pytest, torch, torch.nn.functional as F
from fastai.tabular.all import Embedding, TabularModel
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastai_dropconnect.all import *
from fastai_dropconnect.layers.drop_path import DropPath
from fastai_dropconnect.layers.gates import FeatureGate, GatedLinear, HardConcreteLinear
from fastai_dropconnect.layers.variational import VariationalDropConnectLinear
from fastai_dropconnect.tabular.resnet import TabularResNetModel
from fastai_dropconnect.masks import draw_seed, drop_probability, drop_threshold
from fastai_dropconnect.kernels import torch as kernels
from fastai_dropconnect.masks import example_mask

MODES = ['example', 'batch', 'gaussian']
LAYERS = [pytest.param(mode, drop_bias, id=f'{mode}{"-drop_bias" if drop_bias else ""}') for mode in MODES for drop_bias in (False, True)]
TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])


def linear(mode='example', drop_bias=False, p=0.3, n_in=12, n_out=5, **kw): return DropConnectLinear(n_in, n_out, p=p, mode=mode, drop_bias=drop_bias, **kw)
def tabular_args(n=16): return torch.randint(0, 5, (n,2)),torch.randn(n, 3)

def case_linear(mode, drop_bias=False): return linear(mode, drop_bias),nn.Linear(12, 5),(torch.randn(16, 12),)
def case_tabular(mode): return TabularDropConnectModel(**TAB, weight_p=0.3, out_p=0.2, mode=mode, embed_weight_p=0.2),TabularModel(**TAB),tabular_args()
def case_embedding(): return DropConnectEmbedding(10, 4, p=0.3),nn.Embedding(10, 4),(torch.randint(0, 10, (16,)),)

CASES = ([pytest.param(lambda m=m,b=b: case_linear(m, b), id=f'linear-{m}{"-drop_bias" if b else ""}') for m in MODES for b in (False,True)]
         + [pytest.param(lambda m=m: case_tabular(m), id=f'tabular-{m}') for m in MODES] + [pytest.param(case_embedding, id='embedding')])
cases = pytest.mark.parametrize('case', CASES)

# Layers and models without a plain counterpart
def case_ensemble(cls, mode, **kw): return cls(12, 5, n_members=3, p=0.3, mode=mode, **kw),None,(torch.randn(16, 12 if kw.get('shared_input') else 36),)
def case_weight_dropout(): return WeightDropout(nn.Linear(12, 5), 0.3, 'weight'),None,(torch.randn(16, 12),)
def case_embedding_dropout(): return EmbeddingDropout(nn.Embedding(10, 4), 0.3),None,(torch.randint(0, 10, (16,)),)
def case_inputs(**kw): return TabularDropConnectModel(**TAB, weight_p=0.3, **kw),None,tabular_args()
EXTRAS = ([pytest.param(lambda c=c,m=m: case_ensemble(c, m), id=f'{c.__name__}-{m}') for c in (EnsembleLinear,MaskedEnsembleLinear) for m in MODES]
          + [pytest.param(lambda: case_ensemble(MaskedEnsembleLinear, 'example', shared_input=True, drop_bias=True), id='MaskedEnsembleLinear-shared_input')]
          + [pytest.param(lambda m=m: case_inputs(members=3, mode=m), id=f'members-{m}') for m in MODES]
          + [pytest.param(lambda: case_inputs(num_embeddings=PLE(bins=6, weight_p=0.2).fitted(torch.randn(50, 3))), id='ple'),
             pytest.param(lambda: case_inputs(num_embeddings='periodic', members=2), id='periodic-members'),
             pytest.param(case_weight_dropout, id='weight_dropout-batch'), pytest.param(case_embedding_dropout, id='embedding_dropout')])
# 'batch' and 'gaussian' in their names: they have no kernels of 'example'
def case_simple(layer): return layer,None,(torch.randn(16, 12),)
EXTRAS += [pytest.param(f, id=name) for name,f in {
    'hard_concrete-batch': lambda: case_simple(HardConcreteLinear(12, 5, p0=.5)), 'hard_concrete_inputs-batch': lambda: case_simple(HardConcreteLinear(12, 5, per='input', p0=.5)),
    'gated-batch': lambda: case_simple(GatedLinear(12, 5, p0=.5)), 'feature_gate-batch': lambda: case_simple(FeatureGate([4,8], p0=.5)),
    'variational-gaussian': lambda: case_simple(VariationalDropConnectLinear(12, 5)), 'drop_path-batch': lambda: case_simple(nn.Sequential(nn.Linear(12, 5), DropPath(.4))),
    'resnet-batch': lambda: (TabularResNetModel(**TAB, width=8, weight_p=.3, mode='batch', path_p=.3),None,tabular_args())}.items()]
more_cases = pytest.mark.parametrize('case', CASES+EXTRAS)


# Triton's interpreter takes half a second for a pass, so it runs only the tests that make few of them; copies know no kernel
INTERPRETED = '''test_shapes test_small_layers test_non_contiguous_inputs test_dtypes test_autocast test_p_0_is_plain_in_training test_training_is_noisy
    test_example_equals_the_dense_expression_with_the_same_mask test_only_the_gradients_that_are_asked_for test_a_row_of_zeros_has_finite_gradients
    test_a_dropped_infinite_weight_does_no_harm_and_backward_uses_the_forward_mask test_torch_manual_seed_repeats_a_pass
    test_activation_checkpointing'''.split()
BACKENDS = [b for b in ('numba','triton','torch') if importlib.util.find_spec(b)]


def pytest_generate_tests(metafunc):
    interpreted = os.environ.get('TRITON_INTERPRET')=='1' and metafunc.function.__name__ in INTERPRETED
    metafunc.parametrize('_backend', [b for b in BACKENDS if b!='triton' or interpreted], indirect=True)


@pytest.fixture(autouse=True)
def _backend(request, monkeypatch):
    "Run every test with each kernel"
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', request.param)


def reseeded(f, *args, seed=5):
    torch.manual_seed(seed)
    return f(*args)

# 1. Same parameters

@cases
def test_state_dict_is_that_of_the_plain_module_and_loads_both_ways(case):
    ours,plain,args = case()
    assert {k: v.shape for k,v in ours.state_dict().items()} == {k: v.shape for k,v in plain.state_dict().items()}
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(*args), plain.eval()(*args))
    with torch.no_grad():
        for p in ours.parameters(): p.add_(0.1)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(*args), plain(*args))


@pytest.mark.parametrize('mode', MODES)
def test_conversion_keeps_the_parameters_and_gives_the_trained_values_back(mode):
    plain,x = nn.Linear(12, 5),torch.randn(16, 12)
    opt = torch.optim.Adam(plain.parameters(), 0.1)
    layer = DropConnectLinear.from_linear(plain, 0.4, mode)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    before = plain.weight.detach().clone()
    layer(x).square().mean().backward()
    opt.step()
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight is plain.weight
    assert (back.weight != before).any() and torch.equal(back(x), layer.eval()(x))
    assert set(vars(back)) == set(vars(nn.Linear(2, 2)))


def test_embedding_conversion():
    plain = Embedding(10, 4)    # fastai's subclass
    ours = DropConnectEmbedding.from_embedding(plain, 0.3)
    assert ours.weight is plain.weight and ours.to_embedding().weight is plain.weight


def test_conversion_keeps_the_mode_and_the_hooks():
    plain,calls = nn.Linear(12, 5).eval(),[]
    handle = plain.register_forward_hook(lambda *a: calls.append(1))
    layer = DropConnectLinear.from_linear(plain, 0.4)
    assert not layer.training
    layer(torch.randn(2, 12))
    assert calls == [1]
    handle.remove()
    layer(torch.randn(2, 12))
    assert calls == [1]


@pytest.mark.parametrize('bad', [nn.Conv1d(2, 3, 1), nn.Identity(), None, nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Bilinear(2, 3, 4)])
def test_only_plain_layers_are_converted(bad):
    with pytest.raises(TypeError, match='`linear` must be a plain Linear'): DropConnectLinear.from_linear(bad)


@pytest.mark.parametrize('mode', MODES)
def test_initial_weights_and_arguments_are_those_of_the_plain_model(mode):
    import inspect
    ours = reseeded(lambda: TabularDropConnectModel(**TAB, mode=mode))
    after = torch.rand(1)
    plain = reseeded(lambda: TabularModel(**TAB))
    assert torch.equal(after, torch.rand(1)), 'not the same random numbers were drawn'
    for (k,p),(l,q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True): assert k==l and torch.equal(p, q)
    args = [inspect.signature(m.__init__).parameters for m in (TabularDropConnectModel, TabularModel)]
    assert list(args[0])[:len(args[1])] == list(args[1])
    for k,v in args[1].items(): assert repr(args[0][k].default) == repr(v.default)

# 2. Eval is plain, p=0 is plain

@cases
def test_eval_is_plain(case):
    ours,plain,args = case()
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(*args), plain.eval()(*args))


@pytest.mark.parametrize('mode', MODES)
def test_p_0_is_plain_in_training(mode):
    x,layer = torch.randn(16, 12),linear(mode, True, p=0.)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    model,plain = TabularDropConnectModel(**TAB, weight_p=0, mode=mode),TabularModel(**TAB)
    plain.load_state_dict(model.state_dict())
    args = tabular_args()
    assert torch.equal(model.train()(*args), plain.train()(*args))


@more_cases
def test_training_is_noisy(case):
    ours,_,args = case()
    assert (ours.train()(*args) != ours(*args)).any()

# 3. Shapes and types

SHAPES = [(1,12), (0,12), (3,12), (12,), (2,3,12), (2,3,4,12), (2,0,12)]

@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_shapes(mode, drop_bias, shape):
    x,layer = torch.randn(shape, requires_grad=True),linear(mode, drop_bias)
    y = layer(x)
    assert y.shape == F.linear(x, layer.weight).shape
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    if not x.numel(): assert not layer.weight.grad.any()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('n_in,n_out,bias', [(1,1,True), (1,7,False), (7,1,True), (3,1,False)])
def test_small_layers(mode, n_in, n_out, bias):
    layer = linear(mode, True, n_in=n_in, n_out=n_out, bias=bias)
    assert layer(torch.randn(4, n_in)).shape == (4,n_out)


@pytest.mark.parametrize('mode', MODES)
def test_non_contiguous_inputs(mode):
    layer,x = linear(mode),torch.randn(12, 16).t()
    torch.testing.assert_close(reseeded(layer, x), reseeded(layer, x.contiguous()))
    layer.weight.data = torch.randn(12, 5).t()
    assert reseeded(layer, x).shape == (16,5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_dtypes(mode, drop_bias, dtype):
    x,layer = torch.randn(16, 12, dtype=dtype, requires_grad=True),linear(mode, drop_bias, dtype=dtype)
    y = layer(x)
    assert y.dtype == F.linear(x, layer.weight, layer.bias).dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_autocast(mode, drop_bias, dtype):
    x,layer = torch.randn(64, 12, requires_grad=True),linear(mode, drop_bias)
    with torch.autocast('cpu', dtype=dtype):
        y = reseeded(layer, x)
        assert y.dtype == F.linear(x, layer.weight, layer.bias).dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    full = reseeded(layer, x)
    assert (y.float()-full).abs().mean() < 0.02*full.abs().mean()   # the same mask, rounded
    x64,layer64 = x.detach().double(),linear(mode, drop_bias, dtype=torch.float64)
    with torch.autocast('cpu', dtype=dtype): assert layer64(x64).dtype == F.linear(x64, layer64.weight).dtype


@more_cases
def test_layers_and_models_under_autocast(case):
    "Training gives finite gradients in the parameters' type, and eval what full precision gives, rounded"
    model,_,args = case()
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16): loss = model(*args).float().square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.isfinite() and grads and all(g.dtype==torch.float32 and g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    model.eval()
    want = model(*args)
    with torch.autocast('cpu', torch.bfloat16): got = model(*args)
    assert got.shape==want.shape and (got.float()-want).abs().mean() < .03*want.abs().mean()
    assert torch.equal(model(*args), want)      # nothing of half precision stays


def test_gaussian_of_small_weights_keeps_its_noise_in_half_precision():
    layer,x = linear('gaussian', n_in=100, n_out=1, bias=False),torch.ones(4000, 100)
    with torch.no_grad(): layer.weight.fill_(1e-4)      # its square is 0 in float16
    with torch.autocast('cpu', dtype=torch.float16): y = layer(x).float()
    assert abs(y.std() / (1e-4*(100*.3/.7)**.5) - 1) < 0.1


@pytest.mark.parametrize('mode', MODES)
def test_model_takes_any_number_of_rows_and_only_one_kind_of_column(mode):
    kw = dict(weight_p=0.3, mode=mode, embed_weight_p=0.2)
    model = TabularDropConnectModel(**TAB, **kw).eval()
    for n in (0, 1, 2): assert model(*tabular_args(n)).shape == (n,2)
    assert TabularDropConnectModel([], 3, 2, [20], **kw)(torch.empty(4, 0).long(), torch.randn(4, 3)).shape == (4,2)
    assert TabularDropConnectModel([(10,4)], 0, 2, [20], **kw)(torch.zeros(4, 1).long(), torch.empty(4, 0)).shape == (4,2)
    assert TabularDropConnectModel([(10,4)], 0, 2, [], **kw)(torch.zeros(4, 1).long(), torch.empty(4, 0)).shape == (4,2)
    for lin_first in (True,False):
        assert TabularDropConnectModel(**TAB, **kw, lin_first=lin_first, bn_final=True, ps=[.1,.2])(*tabular_args(4)).shape == (4,2)

# 4. Copies

def clone_pickle(m): return pickle.loads(pickle.dumps(m))
def clone_torch(m):
    f = io.BytesIO()
    torch.save(m, f)
    f.seek(0)
    return torch.load(f, weights_only=False)

@pytest.mark.parametrize('clone', [copy.deepcopy, clone_pickle, clone_torch])
@more_cases
def test_copies_train_on_their_own_weights(case, clone):
    ours,_,args = case()
    twin = clone(ours)
    assert repr(twin) == repr(ours) and torch.equal(reseeded(twin, *args), reseeded(ours, *args))
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in twin.parameters()}
    before = [p.detach().clone() for p in ours.parameters()]
    opt = torch.optim.SGD(twin.parameters(), 0.1)
    twin.train()(*args).square().sum().backward()
    opt.step()
    assert all(torch.equal(p, q) and p.grad is None for p,q in zip(ours.parameters(), before))
    assert any((p != q).any() for p,q in zip(twin.parameters(), before))
    assert (twin.eval()(*args) != ours.eval()(*args)).any()


@more_cases
def test_train_eval_train(case):
    ours,_,args = case()
    a,b = ours.eval()(*args),ours.eval()(*args)
    assert torch.equal(a, b)
    for _ in range(2):
        assert (ours.train()(*args) != ours(*args)).any()
        ours.eval()(*args)

# 5. Gradients

def test_example_equals_the_dense_expression_with_the_same_mask():
    x,layer = torch.randn(37, 41, dtype=torch.float64, requires_grad=True),linear(n_in=41, n_out=23, dtype=torch.float64)
    g = torch.randn(37, 23, dtype=torch.float64)
    y = reseeded(layer, x)
    grads = torch.autograd.grad(y, [x,*layer.parameters()], g)
    m = example_mask(reseeded(draw_seed), 0.3, 37, 23, 41).double() / (1-drop_probability(drop_threshold(0.3)))
    dense = torch.einsum('ri,oi,roi->ro', x, layer.weight, m) + layer.bias
    torch.testing.assert_close(y, dense)
    for a,b in zip(grads, torch.autograd.grad(dense, [x,*layer.parameters()], g), strict=True): torch.testing.assert_close(a, b)


@pytest.mark.parametrize('p', [0.01, 0.3, 0.9])
@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_gradcheck(mode, drop_bias, p):
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5,6), (4,6), (4,))]
    assert torch.autograd.gradcheck(lambda x,w,b: reseeded(linear_dropconnect, x, w, b, p, mode, True, drop_bias), args)


@pytest.mark.parametrize('mode', MODES)
def test_only_the_gradients_that_are_asked_for(mode):
    x,layer = torch.randn(8, 12, requires_grad=True),linear(mode)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    layer = linear(mode)
    layer(torch.randn(8, 12)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize('mode', MODES)
def test_a_row_of_zeros_has_finite_gradients(mode):
    x,layer = torch.zeros(4, 12, requires_grad=True),linear(mode)
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_backward_may_be_called_twice():
    layer,x = linear(),torch.randn(6, 12, requires_grad=True)
    loss = layer(x).square().sum()
    first = torch.autograd.grad(loss, [x,*layer.parameters()], retain_graph=True)
    for a,b in zip(first, torch.autograd.grad(loss, [x,*layer.parameters()])): assert torch.equal(a, b)


def test_a_dropped_infinite_weight_does_no_harm_and_backward_uses_the_forward_mask():
    layer,x = linear(p=0.5, n_in=1, n_out=1, bias=False),torch.ones(200, 1, requires_grad=True)
    with torch.no_grad(): layer.weight.fill_(float('inf'))
    y = layer(x)
    assert set(y.flatten().tolist()) == {0., float('inf')}
    y.sum().backward()
    assert torch.equal(y, x.grad)

def test_inference_by_sampling_is_asked_for_explicitly():
    "Wan et al. 2013, section 3.2: draws from the Gaussian of the training noise, in eval"
    x,n = torch.randn(1, 12),4000
    for mode in MODES:
        layer = linear(mode).eval()
        mean,var = layer(x)[0],0.3/0.7*(x[0]**2 @ layer.weight.T**2)
        assert torch.equal(layer(x)[0], mean)
        layer.sample_eval = True
        with torch.no_grad(): draws = layer(x.expand(n, -1))
        assert ((draws.mean(0)-mean).abs() < 5*(var/n).sqrt()).all()
        torch.testing.assert_close(draws.var(0)/var, torch.ones(5), rtol=0, atol=5*(2/n)**.5)
        assert torch.equal(layer.to_linear()(x)[0], mean) and 'sample_eval' not in vars(layer.to_linear())


# 6. Statistics

@pytest.mark.parametrize('p', [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_mean_and_variance(mode, drop_bias, p):
    n,reps,copies = (1,20,1000) if mode=='batch' else (20000,1,1)      # a pass has one mask, so each weight stands in it a thousand times
    x,layer = torch.randn(12, dtype=torch.float64),linear(mode, drop_bias, p=p, n_out=5*copies, dtype=torch.float64)
    with torch.no_grad():
        weight,bias = layer.weight[:5].clone(),layer.bias[:5].clone()
        layer.weight.copy_(weight.repeat(copies, 1))
        layer.bias.copy_(bias.repeat(copies))
        y = torch.cat([layer(x.expand(n, -1)).view(-1, 5) for _ in range(reps)])
        plain = F.linear(x, weight, bias)
        terms = torch.cat([weight*x, bias[:,None]*drop_bias], 1)
    var = p/(1-p)*terms.square().sum(1)
    assert ((y.mean(0)-plain).abs() < 5*(var/len(y)).sqrt()).all()
    # variance of a sample variance, from the fourth moment of the terms' noise
    m4 = (p**4*(1-p) + p*(1-p)**4)/(1-p)**4 if mode!='gaussian' else 3*(p/(1-p))**2
    kurt = ((m4-3*(p/(1-p))**2)*terms.pow(4).sum(1) + 3*var**2)
    assert ((y.var(0)-var).abs() < 5*((kurt-var**2)/len(y)).sqrt() + 1e-3*var).all()


@pytest.mark.parametrize('mode', ['example', 'gaussian'])
def test_rows_are_uncorrelated_and_outputs_too(mode):
    layer,x = linear(mode),torch.randn(12)
    with torch.no_grad(): y = layer(x.expand(40000, -1)).view(20000, 2, 5).flatten(1)
    off = y.T.corrcoef().fill_diagonal_(0)
    assert off.abs().max() < 5/20000**.5


def test_batch_mode_shares_one_mask():
    layer,x = linear('batch', n_in=30),torch.ones(8, 30)
    y = layer(x)
    assert torch.allclose(y, y[:1].expand_as(y)) and (y != layer(x)).any()


def test_drop_rates_of_positions_and_of_pairs():
    p,reps,shape = 0.3,2000,(6,4,5)
    dropped = torch.stack([~example_mask(draw_seed(), p, *shape) for _ in range(reps)]).flatten(1).double()
    counts = dropped.sum(0)
    assert stats.chi2.sf(((counts-reps*p)**2/(reps*p*(1-p))).sum(), counts.numel()) > 1e-4
    both = (dropped.T@dropped)[tuple(torch.triu_indices(120, 120, 1))]
    z2 = (both-reps*p*p)**2/(reps*p*p*(1-p*p))
    assert stats.chi2.sf(z2.max(), 1)*len(z2) > 1e-4      # the worst of all pairs, after Bonferroni
    assert abs(z2.mean()-1) < 0.1


def test_all_bits_of_the_seed_count():
    base = 0x123456789abcdef
    masks = torch.stack([example_mask(torch.tensor(base ^ (1 << bit)), 0.5, 20, 20, 20) for bit in range(0, 63, 6)]).flatten(1).double()
    off = masks.corrcoef().fill_diagonal_(0)
    assert off.abs().max() < 5/8000**.5


def test_whole_rows_of_an_embedding_are_dropped_for_all_of_the_batch():
    emb,x = DropConnectEmbedding(2000, 3, p=0.25),torch.arange(2000).repeat(2)
    y = emb(x)
    alive = y[:2000].ne(0)
    assert torch.equal(y[:2000], y[2000:]) and torch.equal(alive.any(1), alive.all(1))
    assert abs((~alive[:,0]).double().mean()-0.25) < 5*(0.25*0.75/2000)**.5
    torch.testing.assert_close(y[:2000][alive[:,0]], emb.weight[alive[:,0]]/0.75)

# 7. Repeatable

@more_cases
def test_torch_manual_seed_repeats_a_pass(case):
    ours,_,args = case()
    ours = ours.train()
    state = copy.deepcopy(ours.state_dict())
    runs = []
    for _ in range(2):
        ours.load_state_dict(state)
        ours.zero_grad()
        y = reseeded(ours, *args)
        y.square().sum().backward()
        runs.append([y.detach(), *[p.grad.clone() for p in ours.parameters()]])
    for a,b in zip(*runs, strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_activation_checkpointing(mode, reentrant):
    layer,x = linear(mode),torch.randn(16, 12, requires_grad=True)
    grads = []
    for f in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x.grad,layer.weight.grad = None,None
        reseeded(f, x).square().sum().backward()
        grads.append((x.grad.clone(), layer.weight.grad.clone()))
    for a,b in zip(*grads): torch.testing.assert_close(a, b)

# 8. torch.compile (fastai's features: test_tabular_learner.py and the tests of the callbacks)

@pytest.mark.parametrize('mode,drop_bias', LAYERS)
def test_compiles_without_a_graph_break(mode, drop_bias):
    layer,x = nn.Sequential(linear(mode, drop_bias), nn.ReLU(), linear(mode, n_in=5, n_out=1)),torch.randn(16, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    runs = []
    for f in (layer, compiled):
        layer.zero_grad()
        y = reseeded(f, x)
        y.square().sum().backward()
        runs.append([y.detach(), *[p.grad.clone() for p in layer.parameters()]])
    for a,b in zip(*runs, strict=True): torch.testing.assert_close(a, b)


def test_operators_are_registered_right():
    ops,(x,w,g) = torch.ops.fastai_dropconnect,[torch.randn(s, requires_grad=True) for s in ((4,6), (3,6), (4,3))]
    rest = draw_seed(),1000,None
    torch.library.opcheck(ops.example_forward, (x, w, *rest))
    g,x,w = g.detach(),x.detach(),w.detach()
    for op,ts in ((ops.example_grad_input, (g,w)), (ops.example_grad_weight, (g,x)), (ops.example_grads, (g,x,w))):
        torch.library.opcheck(op, (*ts, *rest))


class LargestTensor(TorchDispatchMode):
    "Remembers the size of the largest tensor that any operation returns"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *[t.numel() for t in (res if isinstance(res, (tuple,list)) else [res]) if isinstance(t, torch.Tensor)]])
        return res


def test_no_tensor_has_the_size_of_the_mask():
    n,n_in,n_out,seed = 512,400,300,draw_seed()
    x,w,g = torch.randn(n, n_in),torch.randn(n_out, n_in),torch.randn(n, n_out)
    with LargestTensor() as largest:
        kernels.forward(x, w, seed, 20000)
        kernels.grad_input(g, w, seed, 20000)
        kernels.grad_weight(g, x, seed, 20000)
    assert largest.numel <= max(2*kernels.piece_sz, n*n_in, n_out*n_in) < n*n_out*n_in/25


def test_autograd_keeps_the_inputs_and_one_integer():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): linear(bias=False)(torch.randn(64, 12))
    assert sorted(t.numel() for t in kept if t.numel()) == [1, 60, 64*12]

# 9. Errors

BAD_P = [(1.5, ValueError), (1, ValueError), (-0.1, ValueError), (float('nan'), ValueError), ('0.3', TypeError), (None, TypeError), (True, TypeError)]

@pytest.mark.parametrize('bad,error', BAD_P, ids=str)
def test_a_wrong_probability_is_named(bad, error):
    calls = {'p': [lambda: linear(p=bad), lambda: DropConnectLinear.from_linear(nn.Linear(2, 2), bad), lambda: dropconnect(torch.ones(2), bad),
                   lambda: linear_dropconnect(torch.ones(2, 2), torch.ones(2, 2), p=bad), lambda: DropConnectEmbedding(3, 2, p=bad),
                   lambda: DropConnectEmbedding.from_embedding(nn.Embedding(3, 2), bad), lambda: EnsembleLinear(3, 2, n_members=2, p=bad),
                   lambda: MaskedEnsembleLinear(3, 2, n_members=2, p=bad)],
             'sparsity': [lambda: MaskedEnsembleLinear(3, 2, n_members=2, sparsity=bad), lambda: masked_ensemble_(nn.Sequential(nn.Linear(2, 2)), 2, bad)],
             'embed_p': [lambda: EmbeddingDropout(nn.Embedding(3, 2), bad)],
             'weight_p': [lambda: WeightDropout(nn.Linear(3, 2), bad, 'weight'),
                          lambda: TabularDropConnectModel(**TAB, weight_p=bad), lambda: TabularDropConnectModel(**TAB, weight_p=[0.1,bad]),
                          lambda: tabular_dropconnect_config(weight_p=bad), lambda: tabular_dropconnect_config(weight_p=[bad])],
             'out_p': [lambda: TabularDropConnectModel(**TAB, out_p=bad), lambda: tabular_dropconnect_config(out_p=bad)],
             'embed_weight_p': [lambda: TabularDropConnectModel(**TAB, embed_weight_p=bad), lambda: tabular_dropconnect_config(embed_weight_p=bad)]}
    for name,fs in calls.items():
        for f in fs:
            with pytest.raises(error) as e: f()
            assert f'`{name}`' in str(e.value) and repr(bad) in str(e.value)


@pytest.mark.parametrize('bad', ['rows', '', None, 3])
def test_a_wrong_mode_is_named(bad):
    for f in (lambda: linear(bad), lambda: DropConnectLinear.from_linear(nn.Linear(2, 2), 0.1, bad), lambda: TabularDropConnectModel(**TAB, mode=bad),
              lambda: tabular_dropconnect_config(mode=bad), lambda: linear_dropconnect(torch.ones(2, 2), torch.ones(2, 2), mode=bad)):
        with pytest.raises(ValueError, match="'example', 'batch', 'gaussian'") as e: f()
        assert repr(bad) in str(e.value)


def test_wrong_counts_shapes_and_names():
    with pytest.raises(ValueError, match=r'one per hidden layer \(2\).*weight_p=\[0.1\]'): TabularDropConnectModel(**TAB, weight_p=[0.1])
    with pytest.raises(TypeError, match="'weight_q'"): tabular_dropconnect_config(weight_q=0.1)
    with pytest.raises(ValueError, match=r'x.shape=\(4, 3\)'): linear()(torch.ones(4, 3))
    with pytest.raises(TypeError, match='x.dtype=torch.float64'): linear()(torch.ones(4, 12).double())
    for bad in (1, -0.5, 'x'):
        with pytest.raises((ValueError,TypeError), match='sparsity'): exact_mask((3,4), bad)
    with pytest.raises(ValueError, match="per='col'"): exact_mask((3,4), 0.5, per='col')


@pytest.mark.parametrize('shape,sparsity', [((30,40),0.3), ((7,),0.5), ((3,4,5),0.25), ((10,10),0.999), ((0,4),0.5), ((1,1),0.4)])
def test_exact_masks_have_exact_counts(shape, sparsity):
    m = exact_mask(shape, sparsity)
    assert m.shape == shape and m.dtype == torch.bool and (~m).sum() == round(sparsity*m.numel())
    rows = exact_mask(shape, sparsity, per='row')
    if rows.numel(): assert ((~rows).flatten(1).sum(1) == round(sparsity*rows[0].numel())).all() if len(shape)>1 else (~rows).sum() in (0, len(rows))
