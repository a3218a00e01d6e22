"`DropConnect` adds noise to training batches only, and leaves the model as it was, whatever happens"
import copy, contextlib, pickle, warnings
from functools import partial
from unittest.mock import patch as replaced
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.collab import CollabDataLoaders, EmbeddingDotBias, collab_learner
from fastai.tabular.all import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException,
                                DataLoaders, L, Learner, OptimWrapper, ProgressCallback, load_learner, noop, params, set_seed)
from torch import nn
from torch.utils.data import TensorDataset
from fastai_dropconnect.all import *

torch.set_num_threads(1)
modes = pytest.mark.parametrize('mode', ['example','batch','gaussian'])


def make_dls(n=64, bs=16):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g)
    ds = TensorDataset(x, x.prod(1, keepdim=True) + x[:,:1])
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=True, device='cpu', num_workers=0)

def make_learn(*cbs, seed=0, model=None, **kw):
    set_seed(seed)
    model = model or nn.Sequential(nn.Linear(4,12), nn.Tanh(), nn.Linear(12,8), nn.Tanh(), nn.Linear(8,1))
    learn = Learner(make_dls(), model, F.mse_loss, cbs=L(cbs), **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def state(model):
    "Everything in a model that the callback could change: classes, attributes, hooks, keys"
    return [(n, id(m), type(m), sorted(vars(m)), list(m._parameters), [len(h) for k,h in vars(m).items() if k.endswith('_hooks')])
            for n,m in model.named_modules()] + list(model.state_dict()) + [id(p) for p in model.parameters()]

def snapshot(learn): return [p.detach().clone() for p in learn.model.parameters()]
def seeded_fit(learn, *args):
    set_seed(1)
    learn.fit(*args)
    return learn

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

class Seen(Callback):
    "Record the drop probability of each linear layer, `None` where it is plain"
    order = 90
    def __init__(self): self.train,self.valid = [],[]
    def after_pred(self):
        (self.train if self.training else self.valid).append([getattr(m, '_dropconnect', {}).get('p') for m in self.learn.model if isinstance(m, nn.Linear)])


@modes
def test_a_fit_is_that_of_the_model_with_dropconnect_layers(mode):
    "A fit ends with the same weights as one with `DropConnectLinear` in the model"
    learn = make_learn(DropConnect(.4, mode))
    before = state(learn.model)
    seeded_fit(learn, 2, 1e-2)
    assert state(learn.model)==before
    model = make_learn().model
    for i in (0,2): model[i] = DropConnectLinear.from_linear(model[i], .4, mode)
    other,plain = [seeded_fit(l, 2, 1e-2) for l in (make_learn(model=model), make_learn())]
    assert same(snapshot(learn), snapshot(other)) and not same(snapshot(learn), snapshot(plain))
    assert [v[:2] for v in learn.recorder.values]==[v[:2] for v in other.recorder.values]


def test_nothing_in_validation_and_predictions():
    learn = make_learn(DropConnect(.5), seen := Seen())
    learn.fit(1)
    assert seen.train == [[.5,.5,None]]*4 and seen.valid == [[None]*3]*4
    x = torch.randn(8, 4)
    learn.model.train()
    assert torch.equal(learn.model(x), learn.model(x))
    preds,targs = learn.get_preds()
    assert torch.equal(preds, learn.model.eval()(learn.dls.valid_ds.tensors[0])) and learn.validate()[0]==pytest.approx(F.mse_loss(preds, targs).item())


def test_p_zero_is_plain_and_the_seed_repeats():
    runs = [make_learn(*cbs) for cbs in ([], [DropConnect(0.)], [DropConnect(.5)], [DropConnect(.5)])]
    for l in runs: seeded_fit(l, 1, 1e-2)
    plain,zero,a,b = map(snapshot, runs)
    assert same(plain, zero) and same(a, b) and not same(a, plain)


@pytest.mark.parametrize('weight_p,layers,want', [
    ({'0': .1, '4': .2}, None, [.1,None,.2]), (.3, ['4'], [None,None,.3]), (.3, lambda n,m: m.weight.shape[0]==8 if isinstance(m, nn.Linear) else False, [None,.3,None]),
    (lambda n,m: .1 if n=='0' else .6, None, [.1,.6,None])])
def test_layers_and_a_value_for_each(weight_p, layers, want):
    learn = make_learn(DropConnect(weight_p, layers=layers), seen := Seen())
    learn.fit(1)
    assert seen.train == [want]*4


def test_schedules():
    for sched,ends in ((SchedCos(0,.5), (0,.5)), (SchedLin(.4,0), (.4,0)), (combined_cos(.5,0,.3,0), (0,0))):
        learn = make_learn(DropConnect(sched), seen := Seen())
        learn.fit(5)
        ps = [p[0] for p in seen.train]
        assert len(ps)==20 and ps[0]==pytest.approx(ends[0]) and ps[-1]==pytest.approx(ends[1], abs=.06)
        assert ps == pytest.approx([sched(i/20) for i in range(20)], abs=1e-6)


@pytest.mark.parametrize('event', ['before_batch','after_pred','after_backward','after_step','after_batch','after_epoch'])
@pytest.mark.parametrize('how', [RuntimeError('no'), KeyboardInterrupt(), CancelBatchException(), CancelTrainException(), CancelEpochException(), CancelFitException()],
                         ids=lambda e: type(e).__name__)
def test_left_as_it_was_whatever_happens(event, how):
    def stop(self):
        if self.learn.train_iter>=2: raise how
    def run(learn, *cbs):
        with contextlib.suppress(RuntimeError, KeyboardInterrupt, CancelBatchException, CancelTrainException, CancelEpochException):
            learn.fit(2, cbs=[*cbs, Callback(**{event: stop})])
    learn = make_learn()
    before = state(learn.model)
    run(learn, DropConnect(.5))
    assert state(learn.model)==before and not {'_do_one_batch','drop_connect'} & set(vars(learn))
    learn = make_learn(DropConnect(.5))
    before = state(learn.model)
    run(learn)
    assert state(learn.model)==before
    learn.fit(1)
    assert state(learn.model)==before


def test_an_error_in_the_model_itself():
    class Bad(nn.Module):
        def forward(self, x): raise KeyboardInterrupt
    learn = make_learn(DropConnect(.5, layers=['0']), model=nn.Sequential(nn.Linear(4,8), Bad(), nn.Linear(8,1)))
    before = state(learn.model)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert state(learn.model)==before


def test_copies_in_the_middle_of_a_batch_are_plain():
    class Copy(Callback):
        def after_step(self): self.copies = [copy.deepcopy(self.learn.model), pickle.loads(pickle.dumps(self.learn.model)), pickle.loads(pickle.dumps(self.learn.model, 2))]
    learn = make_learn(DropConnect(.5), Copy())
    learn.fit(1)
    for m in learn.copy.copies:
        assert [type(l) for l in m]==[type(l) for l in learn.model] and same(m.parameters(), learn.model.parameters())
        assert not any('_dropconnect' in vars(l) for l in m)


def test_the_learner_itself_is_copied_and_goes_on():
    learn = make_learn(DropConnect(.5), Seen())
    learn.fit(1)
    for again in (pickle.loads(pickle.dumps(learn)), copy.deepcopy(learn)):
        again.fit(1, 1e-2)
        assert len(again.seen.train)==8 and again.seen.train[-1]==[.5,.5,None] and len(learn.seen.train)==4
        again.remove_cb(DropConnect)
        assert '_do_one_batch' not in vars(again) and '_do_one_batch' in vars(learn)


def test_the_optimizer_stays_and_two_at_once():
    learn = make_learn()
    learn.fit(1, 1e-2)
    opt,moments = learn.opt,learn.opt.state[learn.model[0].weight]['grad_avg']
    learn.fit(1, 1e-2, cbs=[DropConnect({'0':.2}), DropConnect({'2':.3}), seen := Seen()])
    assert seen.train == [[.2,.3,None]]*4
    assert learn.opt is opt and opt.state[learn.model[0].weight]['grad_avg'] is moments


@pytest.mark.parametrize('cb', [lambda: GradientAccumulation(40), lambda: MixedPrecision('bf16'), lambda: MixedPrecision(), lambda: GradientClip(.1),
                                lambda: FrozenZeroInit(.5), lambda: RecalibrateBN()], ids=['acc','bf16','fp16','clip','frozen','bn'])
@modes
def test_with_other_callbacks(cb, mode):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # fp16 says that there is no CUDA
        learn = make_learn(DropConnect(.5, mode), cb(), seen := Seen())
        learn.fit_one_cycle(2, 1e-2)
    assert len(seen.train)==8 and all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.parametrize('weight_p', [.5, SchedLin(0,.5)], ids=['number','schedule'])
@pytest.mark.parametrize('wrap', [True,False])
def test_a_compiled_model(wrap, weight_p):
    "A compiled model trains with the same noise as an uncompiled one and validates without it"
    def run(comp, *cbs):
        learn = make_learn(*cbs)
        if comp and wrap: learn.model = torch.compile(learn.model, backend='aot_eager')
        elif comp: learn.model.compile(backend='aot_eager')
        before = state(learn.model)
        seeded_fit(learn, 2, 1e-2)
        assert state(learn.model)==before
        learn.model.eval()
        assert same(learn.model(torch.ones(2,4)), learn.model(torch.ones(2,4)))
        return snapshot(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain,eager,comp = run(True),run(False, DropConnect(weight_p, 'gaussian')),run(True, DropConnect(weight_p, 'gaussian'))
    for a,b in zip(eager, comp): torch.testing.assert_close(a, b)
    assert not any(torch.equal(a, b) for a,b in zip(plain, comp))


def test_lr_find_and_fine_tune(tmp_path):
    learn = make_learn(DropConnect(.5), seen := Seen(), path=tmp_path, splitter=lambda m: [params(m[:2]), params(m[2:])])
    before,weights = state(learn.model),snapshot(learn)
    learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
    assert seen.train and same(snapshot(learn), weights)
    learn.fine_tune(1, 1e-2)
    learn.freeze(); learn.fit(1); learn.unfreeze()
    assert state(learn.model)==before and all(p==[.5,.5,None] for p in seen.train)


def test_checkpointed_blocks_get_the_same_mask_again():
    class Checkpointed(nn.Module):
        def __init__(self, m): super().__init__(); self.m = m
        def forward(self, x): return torch.utils.checkpoint.checkpoint(self.m, x, use_reentrant=False)
    def run(wrap):
        net = make_learn().model
        learn = make_learn(DropConnect(.5, layers=lambda n,m: isinstance(m, nn.Linear) and m.in_features==12), model=nn.Sequential(net[:2], wrap(net[2]), net[3:]))
        return snapshot(seeded_fit(learn, 1, 1e-2))
    assert same(run(noop), run(Checkpointed))


def test_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp,self.att,self.mid,self.out = nn.Linear(4,8),nn.MultiheadAttention(8,2,batch_first=True),nn.Linear(8,8),nn.Linear(8,1)
        def forward(self, x):
            x = self.inp(x)[:,None]
            return self.out(self.mid(self.att(x, x, x, need_weights=False)[0][:,0]))
    learn = make_learn(cb := DropConnect(.5), model=Net())
    learn.fit(1)
    assert [m for m,_ in cb._layer_ps]==[learn.model.inp, learn.model.mid]
    with pytest.raises(TypeError, match='att.out_proj'): make_learn(DropConnect(layers=['att.out_proj']), model=Net()).fit(1)


# Embeddings

is_embedding = lambda name,m: isinstance(m, nn.Embedding)

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def collab(*cbs, seed=0, **kw):
    "A `collab_learner` on a small frame of ratings"
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=r.integers(0, 12, 200), item=r.integers(0, 9, 200), rating=r.integers(1, 6, 200).astype('float32')))
    set_seed(seed)
    dls = CollabDataLoaders.from_df(df, bs=40, seed=1, device='cpu')
    return quiet(collab_learner(dls, cbs=L(cbs), **kw))

class Tables(Callback):
    "Record the class of each embedding, and whether the model repeats its output, in training and validation"
    order = 90
    def __init__(self): self.train,self.valid = [],[]
    def after_pred(self):
        model = self.learn.model
        classes = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Embedding)]
        (self.train if self.training else self.valid).append((classes, torch.equal(model(*self.xb), self.pred)))


def test_a_default_collab_learner_is_told_what_to_pass():
    learn = collab()
    before = state(learn.model)
    says = r"`layers` must be given for a model without a hidden nn.Linear: choose from \['u_weight', 'i_weight', 'u_bias', 'i_bias'\]"
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=DropConnect())
    learn.fit(1, cbs=DropConnect({'u_weight': .1}))
    assert state(learn.model)==before and not {'_do_one_batch','drop_connect'} & set(vars(learn))


@pytest.mark.parametrize('layers', [['u_weight','i_weight','u_bias','i_bias'], is_embedding], ids=['names','function'])
def test_a_collab_learner_trains_with_noise_and_validates_without(layers):
    learn = collab()
    assert isinstance(learn.model, EmbeddingDotBias)
    before = state(learn.model)
    learn.fit(2, 1e-2, cbs=[DropConnect(.3, layers=layers), seen := Tables()])
    assert seen.train == [(['NoisyEmbedding']*4, False)]*8 and seen.valid == [(['Embedding']*4, True)]*2
    assert state(learn.model)==before
    losses = [v[1] for v in learn.recorder.values]
    assert losses[1] < losses[0] and torch.equal(learn.get_preds()[0], learn.get_preds()[0])


def test_a_fit_with_embeddings_is_that_of_a_model_with_dropconnect_embeddings():
    learn,other,plain = collab(DropConnect(.4, layers=is_embedding)),collab(),collab()
    for n,m in list(other.model.named_children()): setattr(other.model, n, DropConnectEmbedding.from_embedding(m, .4))
    for l in (learn,other,plain): seeded_fit(l, 2, 1e-2)
    assert same(snapshot(learn), snapshot(other)) and not same(snapshot(learn), snapshot(plain))
    both = collab(DropConnect(0., layers=is_embedding))
    for n,m in list(both.model.named_children()): setattr(both.model, n, DropConnectEmbedding.from_embedding(m, .9))
    assert same(snapshot(seeded_fit(both, 2, 1e-2)), snapshot(plain))       # the callback's probability counts
    assert {m.p for m in both.model.children()}=={.9}


def test_embeddings_and_linear_layers_each_with_a_probability():
    learn = collab(use_nn=True, layers=[12,8])
    net = learn.model
    class Ps(Callback):
        def after_pred(self):
            if self.training: self.ps = [getattr(m, '_dropconnect', {}).get('p') for m in (*net.embeds, net.layers[0][0], net.layers[1][0], net.layers[2][0])]
    learn.fit(1, cbs=[DropConnect({'embeds.0': .1, 'layers.1.0': .5}), ps := Ps()])
    assert ps.ps == [.1,None,None,.5,None]
    learn.fit(1, cbs=[DropConnect(SchedLin(.2,.2), layers=lambda n,m: isinstance(m, (nn.Embedding,nn.Linear))), ps := Ps()])
    assert ps.ps == [pytest.approx(.2)]*5


def test_whole_rows_of_a_table_are_dropped_once_in_a_pass():
    model = nn.Embedding(200, 3)
    idx = torch.arange(200).repeat(2)
    rows = []
    class Rows(Callback):
        def after_pred(self):
            if self.training: rows.append(self.pred.detach().clone())
    learn = quiet(Learner(DataLoaders([(idx,torch.zeros(400,3))]*3, [(idx,torch.zeros(400,3))]), nn.Sequential(model), F.mse_loss))
    learn.fit(1, 0., cbs=[DropConnect(.4, 'gaussian', layers=['0']), Rows()])
    for r in rows:
        zero = (r==0).all(1)
        assert torch.equal(r[:200], r[200:]) and 50 < zero[:200].sum() < 110
        torch.testing.assert_close(r[~zero], model(idx)[~zero]/.6)


@pytest.mark.parametrize('kw', [dict(sparse=True), dict(max_norm=.5), dict(padding_idx=0), dict(scale_grad_by_freq=True)], ids=lambda kw: next(iter(kw)))
def test_kinds_of_embeddings(kw):
    "Sparse gradients stay sparse, norms are limited, padding stays zero"
    set_seed(0)
    table = nn.Embedding(30, 4, **kw)
    idx = torch.arange(30).repeat(2)
    grads = []
    class Grads(Callback):
        def after_backward(self): grads.append(table.weight.grad.clone())
    opt = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = quiet(Learner(DataLoaders([(idx,torch.ones(60,4))], [(idx,torch.ones(60,4))]), nn.Sequential(table), F.mse_loss, opt_func=opt))
    learn.fit(1, .1, cbs=[DropConnect(.5, layers=['0']), Grads()])
    assert grads[0].is_sparse == table.sparse
    dropped = (grads[0].to_dense()==0).all(1)
    assert 5 < dropped.sum() < 25
    if table.max_norm: assert (table(idx).norm(dim=1) <= .5001).all()
    if table.padding_idx==0: assert (table.weight[0]==0).all()
    assert type(table) is nn.Embedding


def test_copies_of_embeddings_in_the_middle_of_a_batch_are_plain(tmp_path):
    class Copy(Callback):
        def after_step(self): self.copies = [copy.deepcopy(self.learn.model), pickle.loads(pickle.dumps(self.learn.model))]
    learn = collab(DropConnect(.5, layers=is_embedding), Copy(), path=tmp_path)
    learn.fit(1)
    for m in learn.copy.copies:
        assert [type(l) for l in m.modules()]==[type(l) for l in learn.model.modules()] and same(m.parameters(), learn.model.parameters())
        assert not any('_dropconnect' in vars(l) for l in m.modules())
    learn.remove_cb(Copy)
    learn.drop_connect.layers = ['u_weight']
    learn.export(tmp_path/'learn.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'learn.pkl')
    again.dls = learn.dls
    again.fit(1, cbs=[seen := Tables()])
    assert seen.train[0] == (['NoisyEmbedding','Embedding','Embedding','Embedding'], False)


@pytest.mark.parametrize('cls,args', [(nn.Embedding,(12,3)), (nn.Linear,(3,3))], ids=['embedding','linear'])
def test_a_replaced_forward_is_refused(cls, args):
    class Other(cls):
        def forward(self, x): return super().forward(x)*2
    patched = cls(*args)
    patched.forward = lambda x: x
    for m in (Other(*args),patched):
        learn = make_learn(model=nn.Sequential(nn.Linear(4,3), m))
        with pytest.raises(TypeError, match=f'1 of type {type(m).__name__}, which has another `forward`'): learn.fit(1, cbs=DropConnect(layers=['1']))


def test_two_callbacks_for_one_layer_are_refused():
    learn = make_learn()
    before = state(learn.model)
    with pytest.raises(ValueError, match='two select the same Linear'): learn.fit(1, cbs=[DropConnect(.1), DropConnect(.2, layers=['0'])])
    assert state(learn.model)==before


def awd_lstm(ours=False):
    "fastai's language model on a small text, with its own dropout modules or ours"
    from fastai.callback.rnn import rnn_cbs
    from fastai.losses import CrossEntropyLossFlat
    from fastai.text.data import LMDataLoader
    from fastai.text.models import awdlstm
    from fastai.text.models.core import get_language_model
    text = ('the cat sat on the mat and the dog sat on the log . '*40).split()
    vocab = sorted(set(text))
    ids = torch.tensor([vocab.index(w) for w in text])
    set_seed(0)
    config = dict(awdlstm.awd_lstm_lm_config, emb_sz=8, n_hid=12, n_layers=2)
    with contextlib.ExitStack() as stack:
        if ours: [stack.enter_context(replaced.object(awdlstm, c.__name__, c)) for c in (WeightDropout,EmbeddingDropout)]
        model = get_language_model(awdlstm.AWD_LSTM, len(vocab), config)
    dls = DataLoaders(*[LMDataLoader([ids], bs=8, seq_len=10) for _ in range(2)])
    return quiet(Learner(dls, model, CrossEntropyLossFlat(), cbs=rnn_cbs()))

def test_a_language_model_is_told_what_to_pass():
    learn = awd_lstm()
    before = state(learn.model)
    with pytest.raises(ValueError, match=r"choose from \['1.decoder'\], for recurrent layers use `WeightDropout`"): learn.fit(1, cbs=DropConnect())
    with pytest.raises(TypeError, match='0.rnns.0.module of type LSTM, for a recurrent layer use `WeightDropout`'):
        learn.fit(1, cbs=DropConnect(layers=['0.rnns.0.module']))
    with pytest.raises(TypeError, match='0.encoder of type Embedding, which fastai\'s `EmbeddingDropout` never calls: use its `embed_p`'):
        learn.fit(1, cbs=DropConnect(layers=is_embedding))
    assert state(learn.model)==before


@pytest.mark.parametrize('ours,encoder', [(True,'NoisyEmbedding'), (False,'Embedding')])
def test_decoder_and_embedding_of_a_language_model(ours, encoder):
    "The decoder shares its weight with the table, which is called only inside our `EmbeddingDropout`"
    learn = awd_lstm(ours)
    noise = set()
    class Seen(Callback):
        def after_pred(self): noise.add((self.training, type(self.learn.model[0].encoder).__name__, type(self.learn.model[1].decoder).__name__))
    learn.fit(1, 1e-2, cbs=[DropConnect(.2, layers=['0.encoder','1.decoder'] if ours else ['1.decoder']), Seen()])
    assert noise == {(True,encoder,'NoisyLinear'), (False,'Embedding','Linear')}
    assert learn.model[0].encoder.weight is learn.model[1].decoder.weight


def test_an_embedding_in_our_embedding_dropout_can_be_selected():
    table = nn.Embedding(10, 3)
    idx = torch.arange(10)
    learn = quiet(Learner(DataLoaders([(idx,torch.zeros(10,3))], [(idx,torch.zeros(10,3))]), nn.Sequential(EmbeddingDropout(table, 0.)), F.mse_loss))
    learn.fit(1, cbs=[DropConnect(.5, layers=['0.emb']), seen := Tables()])
    assert seen.train[0] == (['NoisyEmbedding'], False) and seen.valid[0] == (['Embedding'], True)


def test_compiled_embeddings():
    learn,comp = collab(DropConnect(.4, layers=is_embedding)),collab(DropConnect(.4, layers=is_embedding))
    comp.model.compile(backend='aot_eager')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for l in (learn,comp): seeded_fit(l, 2, 1e-2)
    for a,b in zip(snapshot(learn), snapshot(comp)): torch.testing.assert_close(a, b)


@pytest.mark.parametrize('kw,error,says', [
    (dict(weight_p=1), ValueError, 'weight_p=1'), (dict(weight_p='x'), TypeError, "weight_p='x'"), (dict(mode='a'), ValueError, "mode='a'"),
    (dict(weight_p=SchedLin(0,1)), ValueError, r'weight_p\(1.0\)=1.0'), (dict(weight_p={'0':2}), ValueError, 'weight_p=2'), (dict(layers=0), TypeError, 'layers=0')])
def test_errors_come_from_the_constructor(kw, error, says):
    with pytest.raises(error, match=says): DropConnect(**kw)
