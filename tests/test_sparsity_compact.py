"`compact` keeps the outputs of any network, whatever is zero in it, and `ChannelGraph` counts what has an effect"
import copy, pickle, warnings
import numpy as np, pytest, torch
from fastai.tabular.model import TabularModel
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai_dropconnect.all import *
from fastai_dropconnect.ensemble.averaging import AveragedModel
from fastai_dropconnect.serialize.parts import build_network, describe_network
from fastai_dropconnect.sparsity.compact import CompactModel, compact, sparsity_report
from fastai_dropconnect.sparsity.core import MaskRecord
from fastai_dropconnect.sparsity.graph import ChannelGraph

ACTS = [nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, lambda: nn.LeakyReLU(.1)]


class Residual(nn.Module):
    def __init__(self, n_in, n, act, norm):
        super().__init__()
        self.first,self.a,self.b,self.last = nn.Linear(n_in, n),nn.Linear(n, n),nn.Linear(n, n),nn.Linear(n, 2)
        self.act,self.norm = act,norm
    def forward(self, x):
        x = self.first(x)
        x = x + self.a(self.act(x))
        return self.last(self.norm(x - .5*self.act(self.b(x))))

def mlp(r):
    sizes,layers = r.integers(1, 9, r.integers(2, 5)).tolist(),[]
    for a,b in zip(sizes[:-1], sizes[1:]):
        layers.append(nn.Linear(a, b, bias=r.random()<.7))
        layers += [f() for f in (r.choice(ACTS), lambda: nn.BatchNorm1d(b), lambda: nn.LayerNorm(b), nn.Dropout) if r.random()<.4]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 2)),(torch.randn(7, sizes[0]),)

def conv(r):
    a,b,c = r.integers(1, 6, 3).tolist()
    pad,mode = int(r.integers(0, 2)),r.choice(['flat','pool'])
    layers = [nn.Conv2d(a, b, 3, padding=pad, bias=r.random()<.7), r.choice(ACTS)(), nn.BatchNorm2d(b), nn.MaxPool2d(2), nn.Conv2d(b, c, 3, padding=1), r.choice(ACTS)()]
    layers += [nn.AvgPool2d(2, padding=int(r.integers(0, 2)))] if r.random()<.3 else []
    if mode=='pool': layers.append(nn.AdaptiveAvgPool2d(1))
    x = torch.randn(3, a, 8, 8)
    n = nn.Sequential(*layers, nn.Flatten())(x).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, 6), nn.ReLU(), nn.Linear(6, 2)),(x,)

def table(r, cls=TabularModel, **kw):
    embs,n_cont = [(int(n), int(d)) for n,d in r.integers(1, 6, (r.integers(0, 4),2))],int(r.integers(0, 4))
    if not embs and not n_cont: n_cont = 2
    if not n_cont: kw.pop('num_embeddings', None)
    if callable(kw.get('num_embeddings')): kw['num_embeddings'] = kw['num_embeddings'](n_cont)
    model = cls(embs, n_cont, 2, r.integers(1, 9, r.integers(1, 3)).tolist(), use_bn=r.random()<.7, bn_final=r.random()<.2,
                y_range=(0, 3) if r.random()<.3 else None, **kw)
    codes = [torch.from_numpy(r.integers(0, n, 6)) for n,_ in embs]
    return model,(torch.stack(codes, 1) if embs else torch.zeros(6, 0, dtype=torch.long), torch.randn(6, n_cont))

def ple(n): return PLE(4, 3).fitted(torch.randn(20, n))
def members(r): return table(r, TabularDropConnectModel, members=int(r.integers(1, 5)), weight_p=.1)
def vectors(r): return table(r, TabularDropConnectModel, num_embeddings=r.choice([ple, lambda n: Periodic(4)]))
def both(r): return table(r, TabularDropConnectModel, num_embeddings=ple, members=2)

def residual(r):
    n_in,n = r.integers(1, 8, 2).tolist()
    return Residual(n_in, n, r.choice(ACTS)(), r.choice([nn.Identity, lambda: nn.BatchNorm1d(n), lambda: nn.LayerNorm(n)])()),(torch.randn(5, n_in),)

def blend(r):
    n = int(r.integers(1, 6))
    nets = [nn.Sequential(nn.Linear(n, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    return r.choice([BlendedModel, AveragedModel])(nets),(torch.randn(5, n),)

KINDS = mlp,conv,table,members,vectors,both,residual,blend

def with_zeros(model, r):
    "Random values everywhere, and zeros: single ones, rows, columns"
    with torch.no_grad():
        for m in model.modules():
            for n,t in [*m._parameters.items(), *m._buffers.items()]:
                if t is None or not t.is_floating_point() or isinstance(m, BlendedModel) or 'PiecewiseLinearEncoding' in type(m).__name__: continue
                if isinstance(m, (nn.BatchNorm1d,nn.BatchNorm2d,nn.LayerNorm)): t.copy_(torch.rand_like(t)+.2)
                if n!='weight' or t.dim()<2 or not isinstance(m, (nn.Linear,nn.Conv2d,nn.Embedding)): continue
                t.mul_(torch.rand_like(t)>r.choice([0,.3,.8]))
                if not isinstance(m, nn.Embedding): t[torch.rand(len(t))<r.choice([0,.4])] = 0
                t[:,torch.rand(t.shape[1])<r.choice([0,.4])] = 0
    return model.eval()

def outputs(model, args):
    with torch.no_grad(): return model(*args)

def assert_same(a, b, args, tol=1e-6):
    y,z = outputs(a, args),outputs(b, args)
    assert y.shape==z.shape and (y-z).abs().max() <= tol*y.abs().max().clamp(min=1)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_outputs_stay_for_any_network(seed, kind):
    torch.manual_seed(seed)
    r = np.random.default_rng(seed)
    model,args = kind(r)
    model = with_zeros(model, r)
    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter('error')      # each of these can be followed
        small = compact(model)
    assert_same(model, small, args)
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), before))
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters()) + 8*9      # new biases
    assert_same(small, compact(small), args)
    fast = compact(model, fold=True)
    assert_same(model, fast, args)
    assert not fast.training
    assert_same(model, compact(small, fold=True), args)


@pytest.mark.parametrize('kind', KINDS, ids=lambda k: k.__name__)
def test_copies_train_and_are_pickled_and_saved(kind, tmp_path):
    r = np.random.default_rng(3)
    torch.manual_seed(3)
    model,args = kind(r)
    small = compact(with_zeros(model, r))
    torch.save(small, tmp_path/'small.pth')
    for again in (torch.load(tmp_path/'small.pth', weights_only=False), pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(outputs(again, args), outputs(small, args))
    again.load_state_dict(small.state_dict())
    opt = torch.optim.SGD(again.parameters(), .1)
    again.train()(*args).square().mean().backward()
    opt.step()
    assert outputs(again.eval(), args).isfinite().all()


def test_what_is_live_is_what_has_an_effect():
    "Setting a weight to another value changes the outputs if and only if it is live or acts as a bias"
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    for m in net[::2]: m.weight.data.mul_(torch.rand_like(m.weight)>.6)
    x = torch.randn(20, 4)
    graph = ChannelGraph(net).update()
    live,adds = graph.live(),graph.constants()
    n_dead = 0
    for name,m in net.named_modules():
        if not isinstance(m, nn.Linear): continue
        for i in range(m.weight.numel()):
            w = m.weight.data.view(-1)
            if w[i]==0: continue
            y,old = outputs(net, (x,)),w[i].item()
            w[i] = 2*old
            change = (outputs(net, (x,))-y).abs().max()>0
            w[i] = old
            assert change==(live[f'{name}.weight'].view(-1)[i] or adds[f'{name}.weight'].view(-1)[i])
            n_dead += not change
    assert n_dead and graph.n_live()


def test_a_network_of_nothing_but_zeros_is_constant():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    for m in net[::2]: m.weight.data.zero_()
    small = compact(net)
    assert_same(net, small, (torch.randn(3, 4),))
    assert ChannelGraph(net).update().n_live()==0


def test_tied_and_reused_layers_keep_their_width():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 1))
    tied[2].weight = tied[0].weight
    tied[0].weight.data[0] = 0
    x = torch.randn(5, 4)
    assert_same(tied, compact(tied), (x,))
    one = nn.Linear(4, 4)
    one.weight.data[0] = 0
    twice = nn.Sequential(one, nn.ReLU(), one, nn.Linear(4, 1))
    assert_same(twice, compact(twice), (x,))


def test_what_cannot_be_followed_stays_with_a_warning():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 1)
        def forward(self, x): return self.lin(x) if x.sum()>0 else x
    with pytest.warns(UserWarning, match='Odd stays as it is'): small = compact(Odd())
    assert isinstance(small, Odd)


def test_records_and_modes_are_not_copied():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).train()
    net[0].weight.data[:,1] = 0
    record = MaskRecord()
    record.attach(net)
    record['0.weight'] = net[0].weight!=0
    small = compact(net)
    assert small.training and isinstance(small, CompactModel) and small.columns[0].tolist()==[0,2,3]
    assert not small.model._state_dict_hooks and not getattr(small.state_dict(), '_metadata', {}).get(MaskRecord.key)
    assert net._state_dict_hooks


def test_onnx(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    net[0].weight.data[:,1:3] = 0
    small,x = compact(net),torch.randn(4, 6)
    torch.onnx.export(small, (x,), tmp_path/'small.onnx', dynamo=False, input_names=['x'])
    out, = ort.InferenceSession(tmp_path/'small.onnx').run(None, {'x': x.numpy()})
    assert abs(out-outputs(net, (x,)).numpy()).max() < 1e-5


def test_report_counts():
    model = TabularModel([(5,3)], 2, 1, [6,4]).eval()
    for b in model.layers: b[0].weight.data.zero_()
    model.layers[0][0].weight.data[0,0] = model.layers[1][0].weight.data[0,0] = model.layers[2][0].weight.data[0,0] = 1.
    report = sparsity_report(model)
    assert report.loc['live_weights'].tolist()[:2]==[3,3] and report.loc['columns'].tolist()[:2]==[3,1]
    assert report.loc['multiply_adds'].tolist()[:2]==[5*6+6*4+4,3] and report.loc['units'].tolist()[:2]==[10,2]


def table_model(cls=TabularModel, **kw):
    torch.manual_seed(0)
    model = cls([(10,5), (20,8), (4,3)], 6, 1, [30,20], **kw)
    x = torch.randint(0, 4, (50,3)),torch.randn(50, 6)
    for _ in range(10): model(*x)
    for m in model.layers.modules():
        if isinstance(m, nn.Linear): m.weight.data.mul_(torch.rand_like(m.weight)>.5)
    model.layers[0][0].weight.data[:,[3,17]] = 0        # part of an embedding, and a number
    return model.eval(),x

@pytest.mark.parametrize('cls', [TabularModel,TabularDropConnectModel])
def test_a_folded_table_has_neither_norms_nor_embeddings(cls, tmp_path):
    model,args = table_model(cls, ps=[.1,.1])
    fast = compact(model, fold=True)
    kinds = {type(m).__name__ for m in fast.modules()}
    assert 'SummedCodes' in kinds and not any('Norm' in k or 'Drop' in k.replace('DropConnectLinear', '') or 'Embedding' in k for k in kinds)
    torch.save(fast, tmp_path/'fast.pth')
    for again in (torch.load(tmp_path/'fast.pth', weights_only=False), pickle.loads(pickle.dumps(fast)), compact(fast, fold=True), compact(fast)):
        assert torch.equal(outputs(again, args), outputs(fast, args))
    assert_same(model, fast, (args[0].int(), args[1]))
    for rows in (0, 1): assert outputs(fast, [a[:rows] for a in args]).shape==(rows,1)

def test_a_folded_table_refuses_unknown_codes():
    model,(cats,conts) = table_model()
    fast = compact(model, fold=True)
    for wrong in (-1, 20):
        cats[3,1] = wrong
        with pytest.raises(IndexError, match='x_cat'): outputs(fast, (cats, conts))

def test_a_folded_table_is_exported(tmp_path):
    model,args = table_model()
    fast,dims = compact(model, fold=True),({0: torch.export.Dim.DYNAMIC},)*2
    program = torch.export.export(fast, args, dynamic_shapes=(dims,) if isinstance(fast, CompactModel) else dims)
    assert_same(model, program.module(), [a[:7] for a in args])
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    torch.onnx.export(fast, args, tmp_path/'fast.onnx', dynamo=False, input_names=['cats','conts'], dynamic_axes={n: {0: 'n'} for n in ('cats','conts')})
    out, = ort.InferenceSession(tmp_path/'fast.onnx').run(None, dict(cats=args[0][:7].numpy(), conts=args[1][:7].numpy()))
    assert abs(out-outputs(model, args)[:7].numpy()).max() < 1e-5

def test_vectors_of_a_cut_column_leave_no_bins():
    "The column with the most bins goes; what is left is a layer that its class would make"
    torch.manual_seed(0)
    bins = [torch.linspace(-1, 1, n) for n in (4, 9, 6)]
    model = TabularDropConnectModel([(4,2)], 3, 1, [8], num_embeddings=PLE(4, bins)).eval()
    nn.init.normal_(model.num_embeds[1].module.linear.weight)
    for left in ([0,2], [0], [1,2]):
        some = copy.deepcopy(model)
        for i in set(range(3))-set(left): some.layers[0][0].weight.data[:,2+4*i:6+4*i] = 0
        small,args = compact(some),(torch.randint(0, 4, (20,1)), 2*torch.randn(20, 3))
        assert_same(some, small, args)
        want = PLE(4, [bins[i] for i in left]).layer(len(left)).state_dict()
        got = small.model.num_embeds.state_dict()
        assert {n:t.shape for n,t in got.items()}=={n:t.shape for n,t in want.items()}
        again = build_network(describe_network(small))
        again.load_state_dict(small.state_dict())
        assert torch.equal(outputs(again.eval(), args), outputs(small, args))

def test_a_folded_table_is_refused_where_its_file_could_not_be_read():
    with pytest.raises(TypeError, match='got SummedCodes'): describe_network(compact(table_model()[0], fold=True))

@pytest.mark.parametrize('names', [list('01234'), ['first','drop','norm','act','last']])
def test_folding_keeps_the_names_of_layers(names):
    "`forward` may find them in a sequence by number or by name"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential()
            for n,m in zip(names, (nn.Linear(4,8), nn.Dropout(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,2))): self.net.add_module(n, m)

        def forward(self, x):
            for n in names: x = getattr(self.net, n)(x)
            return self.net[4].bias+x
    model,x = Net(),torch.randn(20, 4)
    for _ in range(5): model(x)
    fast = compact(model.eval(), fold=True)
    assert_same(model, fast, (x,))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in fast.modules())

@pytest.mark.parametrize('cls', [TabularModel,TabularDropConnectModel])
def test_a_table_that_has_lost_its_numbers_is_one_of_its_class(cls):
    model,args = table_model(cls)
    model.layers[0][0].weight.data[:,16:] = 0
    small = compact(model)
    assert_same(model, small, args)
    again = build_network(describe_network(small))
    again.load_state_dict(small.state_dict())
    assert torch.equal(outputs(again.eval(), args), outputs(small, args))
    fast = compact(small, fold=True)
    assert_same(model, fast, args)
    assert any(type(m).__name__=='SummedCodes' for m in fast.modules())

def test_a_table_of_categories_alone_is_folded():
    model,codes = TabularModel([(10,5), (4,3)], 0, 1, [8]),torch.randint(0, 4, (20,2))
    for _ in range(5): model(codes)
    fast = compact(model.eval(), fold=True)
    assert type(fast).__name__=='SummedCodes'
    assert_same(model, fast, (codes,))
