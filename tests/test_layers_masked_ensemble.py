"A masked ensemble is K plain networks, and it predicts the mean of their predictions"
import copy, pickle
import pandas as pd, pytest, torch, torch.nn.functional as F
from conftest import make_dls, make_table
from fastai.tabular.all import (AMPMode, BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, EarlyStoppingCallback, GradientAccumulation,
                                GradientClip, L1LossFlat, MSELossFlat, MixedPrecision, RocAuc, SaveModelCallback, TabularModel, accuracy,
                                load_learner, rmse, set_seed)
from torch import nn

from fastai_dropconnect.all import *
from fastai_dropconnect.nn_utils import hidden_linears
from fastai_dropconnect.tabular.model import each_member
from fastai_dropconnect.layers.masked_ensemble import masked_weights, pack_masks, unpack_masks

TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])
K = 4
LAYERS = [pytest.param(cls, shared, id=f'{cls.__name__}{"-shared" if shared else ""}') for cls in (EnsembleLinear,MaskedEnsembleLinear) for shared in (False,True)]
layers = pytest.mark.parametrize('cls,shared', LAYERS)


def quiet(learn): return learn.no_bar(),learn.no_logging()
def fit(learn, n=1, lr=1e-2, **kw):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, lr, **kw)
    return learn
def preds(learn, dl=None, **kw):
    with learn.no_bar(): return learn.get_preds(dl=dl, **kw)
def learner(dls=None, seed=0, cbs=None, path=None, loss_func=None, metrics=None, **kw):
    set_seed(seed)
    config = tabular_dropconnect_config(**{'members':K, **kw})
    return tabular_learner(dls or make_dls(), layers=[20,10], config=config, cbs=cbs, path=path, loss_func=loss_func, metrics=metrics)
def class_dls(n_classes=3):
    df = make_table()
    df['y'] = pd.qcut(df.y, n_classes, labels=list('abcdef')[:n_classes]).astype(str)
    return make_dls(df)

# The layers

@pytest.mark.parametrize('n', [1, 7, 8, 9, 17])
def test_masks_are_packed_and_unpacked(n):
    masks = torch.rand(n, 5, 3) > .4
    bits = pack_masks(masks)
    assert bits.dtype==torch.uint8 and len(bits)==-(-n//8) and torch.equal(unpack_masks(bits, n).bool(), masks)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('n,shape', [(1, (3,5)), (8, (17,33)), (11, (4,7)), (3, (0,5)), (9, (1,1))], ids=str)
def test_compiled_loops_mask_and_sum_as_torch_does(n, shape, dtype, monkeypatch):
    bits,g = pack_masks(torch.rand(n, *shape) > .4),torch.randn(n, *shape, dtype=dtype)
    weight = torch.randn(shape[::-1], dtype=dtype).t().requires_grad_()      # not contiguous
    results = []
    for backend in ('numba','torch'):
        monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', backend)
        out = masked_weights(weight, bits, n)
        first, = torch.autograd.grad((out*out*g).sum(), weight, create_graph=True)
        results.append((out, first, *torch.autograd.grad(first.sum(), weight)))
    for ours,theirs in zip(*results, strict=True): torch.testing.assert_close(ours, theirs)
    assert ('_MaskedWeights' in str(results[0][0].grad_fn)) == (dtype!=torch.bfloat16)


def test_a_masked_infinite_weight_does_no_harm():
    weight = torch.full((2,3), float('inf'), requires_grad=True)
    masks = torch.zeros(4, 2, 3, dtype=torch.bool)
    masks[1] = True
    out = masked_weights(weight, pack_masks(masks), 4)
    assert not out[0].any() and out[1].isinf().all()
    out[0].sum().backward()
    assert not weight.grad.any()


@layers
@pytest.mark.parametrize('bias', [True, False])
def test_each_member_is_a_plain_layer(cls, shared, bias):
    layer = cls(7, 5, n_members=K, bias=bias, shared_input=shared, dtype=torch.float64)
    xs = [torch.randn(6, 7, dtype=torch.float64) for _ in range(K)]
    if shared: xs = xs[:1]*K
    y = layer(xs[0] if shared else torch.cat(xs, 1)).chunk(K, 1)
    for k in range(K):
        member = layer.member(k)
        assert type(member) is nn.Linear and member.weight.shape == (5,7)
        torch.testing.assert_close(y[k], member(xs[k]))
    assert (layer.member(0).weight != layer.member(1).weight).any()
    if bias: assert (layer.member(0).bias != layer.member(1).bias).all()


def test_a_traced_ensemble_takes_batches_of_any_size():
    model = TabularDropConnectModel(**TAB, members=K).eval()
    batch = lambda n: (torch.randint(0, 5, (n,2)), torch.randn(n, 3))
    traced,rows = torch.jit.trace(model, batch(8)),batch(5)
    torch.testing.assert_close(traced(*rows), model(*rows))
    exported = torch.export.export(model, batch(8), dynamic_shapes=({0: torch.export.Dim('n')},)*2).module()
    torch.testing.assert_close(exported(*rows), model(*rows))


@layers
@pytest.mark.parametrize('shape', [(1,), (0,), (3,), (), (2,3), (2,0)], ids=str)
def test_shapes(cls, shared, shape):
    layer = cls(7, 5, n_members=K, shared_input=shared)
    x = torch.randn(*shape, 7 if shared else 7*K, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 5*K)
    y.sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@layers
@pytest.mark.parametrize('p', [0., 0.3])
def test_gradients(cls, shared, p):
    layer = cls(4, 3, n_members=2, shared_input=shared, p=p, dtype=torch.float64)
    x = torch.randn(5, 4 if shared else 8, dtype=torch.float64, requires_grad=True)
    def f(x, w, b):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, dict(weight=w, bias=b), x)
    assert torch.autograd.gradcheck(f, (x, *[q.detach().clone().requires_grad_() for q in layer.parameters()]))


@layers
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cls, shared, dtype):
    layer,x = cls(12, 5, n_members=K, shared_input=shared),torch.randn(32, 12 if shared else 12*K)
    with torch.autocast('cpu', dtype=dtype): y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert (y.float()-layer(x)).abs().mean() < 0.02*layer(x).abs().mean()


@pytest.mark.parametrize('sparsity', [0, .3, .5, .9])
def test_masks_are_exact_differ_and_stay(sparsity):
    layer = MaskedEnsembleLinear(40, 30, n_members=8, sparsity=sparsity)
    masks = unpack_masks(layer.masks, 8)
    assert (masks.sum(-1) == 40-round(sparsity*40)).all()
    if sparsity:
        flat = masks.flatten(1).double().corrcoef().fill_diagonal_(0)
        assert flat.abs().max() < 5/1200**.5
    before = layer.masks.clone()
    opt = torch.optim.SGD(layer.parameters(), .1)
    layer(torch.randn(8, 320)).square().sum().backward()
    opt.step()
    assert torch.equal(before, layer.masks)
    assert layer.masks.numel()*layer.masks.element_size() == layer.weight.numel()


def test_outputs_start_as_large_as_those_of_a_full_layer():
    x = torch.randn(4000, 400)
    stds = [(MaskedEnsembleLinear(400, 50, n_members=2, sparsity=s, bias=False, shared_input=True)(x)).std().item() for s in (0, .5, .9)]
    for s in stds: assert abs(s/(1/3)**.5 - 1) < 0.05


def test_dropconnect_of_members_has_the_right_mean_and_variance():
    p,layer,x = 0.3,MaskedEnsembleLinear(10, 4, n_members=2, p=0.3, bias=False, dtype=torch.float64),torch.randn(20, dtype=torch.float64)
    with torch.no_grad(): y,plain,w = layer(x.expand(20000, -1)),layer.eval()(x),layer.member_weights()
    var = torch.cat([p/(1-p)*(w[k]*x.chunk(2)[k]).square().sum(1) for k in range(2)])
    assert ((y.mean(0)-plain).abs() < 5*(var/20000).sqrt()).all()
    assert ((y.var(0)/var - 1).abs() < 0.1).all()


@pytest.mark.parametrize('cls', [EnsembleLinear, MaskedEnsembleLinear])
def test_settings_are_given_by_keyword(cls):
    with pytest.raises(TypeError, match='positional'): cls(3, 2, 2)
    with pytest.raises(TypeError, match='n_members'): cls(3, 2)


def test_dropconnect_layers_keep_their_settings_in_an_ensemble():
    model = masked_ensemble_(nn.Sequential(DropConnectLinear(6, 8, p=.3, mode='batch', drop_bias=True), nn.ReLU(), DropConnectLinear(8, 2, p=.1, bias=False)), 3)
    assert [(m.p, m.mode, m.drop_bias) for m in (model[0], model[2])] == [(.3, 'batch', True), (.1, 'example', False)]
    assert model[0].bias.shape==(24,) and model[2].bias is None
    x = torch.randn(5, 6)
    assert (model(x) != model(x)).any() and torch.equal(model.eval()(x), model(x))


def test_batch_norms_are_widened_with_their_statistics():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    for _ in range(3): model(torch.randn(20, 6))
    first,mean,var = model[0],model[2].running_mean.clone(),model[2].running_var.clone()
    masked_ensemble_(model, 3)
    assert model[0] is first and torch.equal(model[2].running_mean, mean.repeat(3)) and torch.equal(model[2].running_var, var.repeat(3))
    assert model[2].num_batches_tracked==3 and model(torch.randn(20, 6)).shape==(20,6)

# The model

@pytest.mark.parametrize('lin_first', [True, False])
@pytest.mark.parametrize('kw', [dict(), dict(y_range=(0,1)), dict(bn_final=True, ps=.1), dict(use_bn=False)], ids=str)
def test_the_model_is_the_mean_of_plain_ones(kw, lin_first):
    torch.manual_seed(0)
    model = TabularDropConnectModel(**TAB, members=K, lin_first=lin_first, **kw)
    x = torch.randint(0, 5, (16,2)),torch.randn(16, 3)
    for _ in range(5): model(*x)       # statistics of the batch norms
    model.eval()
    outs = []
    for k in range(K):
        plain = TabularModel(**TAB, lin_first=lin_first, **kw).eval()
        for (name,m),(_,q) in zip(model.named_modules(), plain.named_modules(), strict=True):
            if isinstance(m, EnsembleLinear): q.load_state_dict(m.member(k).state_dict())
            elif isinstance(m, nn.BatchNorm1d) and m.num_features != q.num_features:
                q.load_state_dict({n: v.chunk(K)[k] if v.ndim else v for n,v in m.state_dict().items()})
            elif isinstance(m, (nn.BatchNorm1d,nn.Embedding)): q.load_state_dict(m.state_dict())
        outs.append(plain(*x))
    with each_member(model): each = model(*x)
    torch.testing.assert_close(each, torch.stack(outs, 1))
    torch.testing.assert_close(model(*x), torch.stack(outs).mean(0))
    assert each.std(1).min() > 1e-4


@pytest.mark.parametrize('layers', [[], [20], [20,10,5]])
def test_any_depth_any_rows_and_only_one_kind_of_column(layers):
    for emb_szs,n_cont in (([(10,4)], 3), ([(10,4)], 0), ([], 3)):
        model = TabularDropConnectModel(emb_szs, n_cont, 2, layers, members=K).eval()
        for n in (0, 1, 2): assert model(torch.zeros(n, len(emb_szs)).long(), torch.randn(n, n_cont)).shape == (n,2)


def test_one_member_with_all_weights_is_a_plain_network():
    x = torch.randint(0, 5, (16,2)),torch.randn(16, 3)
    model,plain = TabularDropConnectModel(**TAB, members=MaskedMembers(1, sparsity=0)).eval(),TabularModel(**TAB).eval()
    plain.load_state_dict({k: v for k,v in model.state_dict().items() if not k.endswith('masks')})
    torch.testing.assert_close(model(*x), plain(*x))


def test_few_more_parameters():
    count = lambda **kw: sum(p.numel() for p in TabularDropConnectModel([], 100, 1, [200,100], **kw).parameters())
    assert count(members=16) < 1.6*count() 


def test_callbacks_select_the_shared_weights():
    model = TabularDropConnectModel(**TAB, members=K)
    assert list(hidden_linears(model)) == ['layers.0.0', 'layers.1.0']
    assert all(type(m) is MaskedEnsembleLinear for m in hidden_linears(model).values())
    assert type(model.layers[-1][0]) is EnsembleLinear


def test_an_ensemble_does_not_convert_to_or_from_one_layer():
    for layer in (EnsembleLinear(3, 2, n_members=2), MaskedEnsembleLinear(3, 2, n_members=2)):
        with pytest.raises(TypeError, match='`linear` must be a plain Linear'): DropConnectLinear.from_linear(layer)
        with pytest.raises(TypeError, match='use `masked_ensemble_`'): type(layer).from_linear(nn.Linear(3, 2))
        with pytest.raises(TypeError, match=r'has 2 members.*use `member\(k\)`'): layer.to_linear()


@pytest.mark.parametrize('kw,match', [(lambda: dict(members=0), 'members=0'), (lambda: dict(members=MaskedMembers(2, sparsity=1)), 'sparsity=1'),
                                      (lambda: dict(members=MaskedMembers(2, average='max')), "average='max'")])
def test_errors_name_the_argument(kw, match):
    with pytest.raises(ValueError, match=match): tabular_dropconnect_config(**kw())
    with pytest.raises(ValueError, match=match): TabularDropConnectModel(**TAB, **kw())
    with pytest.raises(TypeError, match='members=1.5'): tabular_dropconnect_config(members=1.5)

# Loss and average

@pytest.mark.parametrize('loss,n_out,targ', [(MSELossFlat(), 2, lambda: torch.randn(6, 2)), (CrossEntropyLossFlat(), 3, lambda: torch.randint(0, 3, (6,1))),
                                             (CrossEntropyLossFlat(weight=torch.tensor([1.,2,5])), 3, lambda: torch.randint(0, 3, (6,))),
                                             (BCEWithLogitsLossFlat(), 2, lambda: torch.randint(0, 2, (6,2))), (L1LossFlat(), 1, lambda: torch.randn(6)), (F.mse_loss, 2, lambda: torch.randn(6, 2))],
                         ids=['mse','ce','weighted','bce','l1','function'])
@pytest.mark.parametrize('reduction', ['mean', 'none', 'sum'])
def test_the_loss_is_the_mean_of_the_members_losses(loss, n_out, targ, reduction):
    loss,y,x = copy.deepcopy(loss),targ(),torch.randn(6, K, n_out)
    kw = {} if hasattr(loss, 'reduction') else dict(reduction=reduction)
    ens = EnsembleLoss(loss)
    if not kw: ens.reduction = reduction
    want = torch.stack([torch.as_tensor(loss(x[:,k].contiguous(), y, **kw)).flatten() for k in range(K)]).mean(0)
    torch.testing.assert_close(torch.as_tensor(ens(x, y, **kw)).flatten(), want)
    assert torch.equal(torch.as_tensor(ens(x[:,0].contiguous(), y, **kw)), torch.as_tensor(loss(x[:,0].contiguous(), y, **kw)))


def test_the_loss_can_be_copied_and_shows_what_it_wraps():
    loss = EnsembleLoss(CrossEntropyLossFlat())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert other(torch.ones(2, 3), torch.tensor([0,1])) > 0
    assert 'CrossEntropy' in repr(loss) and loss.y_int and not hasattr(EnsembleLoss(F.mse_loss), 'activation')


def test_averages_are_stable():
    x = torch.tensor([[[1e4,-1e4], [1e4,-1e4]]])
    for a in ('softmax','sigmoid'): assert average_members(x, a).isfinite().all()

# The learner

def test_members_differ_and_their_mean_is_the_answer():
    learn = fit(learner(metrics=rmse), 2)
    (p,y),(each,_) = preds(learn),learn.get_member_preds()
    assert each.shape == (len(p),K,1) and torch.allclose(each.mean(1), p, atol=1e-6) and each.std(1).mean() > 0.01
    assert rmse(p, y).item() < min(rmse(e, y).item() for e in each.unbind(1))
    with learn.no_bar(): loss,metric = learn.validate()
    assert abs(loss-F.mse_loss(p, y.view_as(p))) < 1e-5 and abs(metric-loss**.5) < 1e-4


def test_probabilities_are_averaged():
    learn = fit(learner(class_dls(), metrics=[accuracy,RocAuc()]), 2)
    loss,acc,auc = learn.recorder.values[-1][1:]
    (p,y),(each,_) = preds(learn),learn.get_member_preds()
    assert learn.model.average == 'softmax'
    assert torch.allclose(p.sum(1), torch.ones(len(p))) and torch.allclose(each.mean(1), p, atol=1e-6)
    assert abs(loss-F.nll_loss(p.log(), y.flatten().long())) < 1e-4 and abs(acc-(p.argmax(1)==y.flatten()).float().mean()) < 1e-6 and auc > .6
    _,dec,probs = learn.predict(make_table().iloc[0])
    assert dec == probs.argmax() and torch.allclose(probs, preds(learn, learn.dls.test_dl(make_table().drop(columns='y')))[0][0], atol=1e-5)
    with learn.no_bar(): learn.show_results()


def test_the_average_may_be_chosen():
    assert learner(class_dls(), members=MaskedMembers(K, average='mean')).model.average == 'mean'
    assert learner().model.average == 'mean'


def test_training_minimises_the_mean_of_the_losses():
    seen = []
    class Look(Callback):
        def after_loss(self):
            if self.training: seen.append((self.loss.item(), sum(F.mse_loss(self.pred[:,k], self.y.view(-1,1)).item() for k in range(K))/K))
    fit(learner(cbs=Look()))
    for a,b in seen: assert abs(a-b) < 1e-5*max(1, b)


@pytest.mark.parametrize('kw', [dict(), dict(num_embeddings=PLE(bins=8)), dict(num_embeddings='periodic')], ids=['plain','ple','periodic'])
def test_save_load_export(kw, tmp_path):
    learn = fit(learner(path=tmp_path, metrics=rmse, **kw))
    learn.save('w')
    other = learner(seed=3, path=tmp_path, **kw)
    other.load('w')
    assert torch.equal(preds(other)[0], preds(learn)[0])
    assert torch.equal(other.model.layers[0][0].masks, learn.model.layers[0][0].masks)
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    test = make_table(40, seed=5).drop(columns='y')
    a,b = [preds(l, l.dls.test_dl(test))[0] for l in (learn, again)]
    assert a.shape == (40,1) and torch.equal(a, b) and torch.equal(again.get_member_preds(dl=again.dls.test_dl(test))[0].mean(1), a)
    assert torch.equal(again.predict(test.iloc[3])[2], learn.predict(test.iloc[3])[2])
    fit(learn), fit(other)


@pytest.mark.parametrize('cbs', [lambda: FrozenZeroInit(0.5), lambda: DropConnect(0.3), lambda: DropConnect(0.3, mode='gaussian'), lambda: RecalibrateBN(), lambda: GradientClip(0.1),
                                 lambda: MixedPrecision(amp_mode=AMPMode.BF16), lambda: GradientAccumulation(64), lambda: SaveModelCallback(), lambda: EarlyStoppingCallback()],
                         ids=['frozen','dropconnect','gaussian','recalibrate','clip','bf16','accumulate','save','stop'])
def test_callbacks(cbs, tmp_path):
    learn = fit(learner(cbs=cbs(), path=tmp_path), 2)
    assert learn.recorder.values[-1][1] < 2 and preds(learn)[0].isfinite().all()
    assert type(learn.model.layers[0][0]) is MaskedEnsembleLinear


def test_frozen_weights_stay_zero_in_all_members():
    learn = fit(learner(cbs=FrozenZeroInit(0.5)), 2)
    w = learn.model.layers[0][0].weight
    assert (w==0).float().mean() == round(.5*w.numel())/w.numel()
    assert (learn.model.layers[0][0].member_weights()[:,w==0] == 0).all()


def test_dropconnect_callback_equals_the_layers_own():
    a = fit(learner(cbs=DropConnect(0.3)))
    b = fit(learner(weight_p=0.3))
    assert torch.equal(preds(a)[0], preds(b)[0]) and not torch.equal(preds(a)[0], preds(fit(learner()))[0])


def test_mixup_composes():
    from fastai.callback.mixup import MixHandler
    class RowMix(MixHandler):
        "Mixup of the numbers only, as categories cannot be mixed"
        def before_batch(self):
            lam = self.distrib.sample((len(self.y),))
            self.lam = torch.stack([lam, 1-lam], 1).max(1)[0]
            idx = torch.randperm(len(self.y))
            self.yb1 = (self.y[idx],)
            self.learn.xb = (self.xb[0], torch.lerp(self.xb[1][idx], self.xb[1], self.lam[:,None]))
    learn = fit(learner(class_dls(), cbs=RowMix(0.4)), 2)
    assert learn.recorder.values[-1][1] < 1.5


def test_lr_find_and_fine_tune():
    learn = learner()
    with learn.no_bar(),learn.no_logging():
        learn.lr_find(show_plot=False, num_it=20)
        learn.fine_tune(1)
    assert preds(learn)[0].isfinite().all()


def test_weight_dropout_takes_the_layer():
    layer = MaskedEnsembleLinear(12, 5, n_members=K)
    wrapped,x = WeightDropout(layer, 0.5, 'weight'),torch.randn(8, 12*K)
    assert (wrapped(x) != wrapped(x)).any() and torch.equal(wrapped.eval()(x), layer.eval()(x))


def test_seeds_repeat_a_fit():
    assert torch.equal(preds(fit(learner(seed=4)))[0], preds(fit(learner(seed=4)))[0])
    assert not torch.equal(preds(fit(learner(seed=4)))[0], preds(fit(learner(seed=5)))[0])


def test_compiles_without_a_graph_break():
    model,x = masked_ensemble_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)), 3),torch.randn(16, 6)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), model(x))
