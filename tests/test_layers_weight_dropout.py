"What `WeightDropout` and `EmbeddingDropout` promise: any parameter of any module, use in fastai's AWD-LSTM, independent copies"
import copy, io, pickle, sys, warnings
from unittest.mock import patch
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, L, noop, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.callback.rnn import rnn_cbs
from fastai.callback.schedule import *
from fastai.text.data import LMDataLoader
from fastai.text.models import awdlstm
from fastai.text.models.core import get_language_model
from torch import nn
from fastai_dropconnect.layers.weight_dropout import EmbeddingDropout, WeightDropout
from fastai_dropconnect.functional import dropconnect

torch.set_num_threads(1)

def lstm(**kw): return nn.LSTM(4, 6, batch_first=True, **kw)
seq = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))

kinds = {
    'lstm': (lstm, 'weight_hh_l0', (seq,)),
    'lstm2bi': (lambda: lstm(num_layers=2, bidirectional=True), ['weight_hh_l0','weight_hh_l0_reverse','weight_hh_l1','weight_ih_l1_reverse'], (seq,)),
    'lstm_proj': (lambda: lstm(proj_size=3), ['weight_hr_l0'], (seq,)),
    'gru': (lambda: nn.GRU(4, 6, batch_first=True), L('weight_hh_l0'), (seq,)),
    'rnn': (lambda: nn.RNN(4, 6, batch_first=True), ('weight_ih_l0',), (seq,)),
    'linear': (lambda: nn.Linear(4, 6), ['weight','bias'], (seq,)),
    'conv': (lambda: nn.Conv1d(5, 6, 2), 'weight', (seq,)),
    'embedding': (lambda: nn.Embedding(9, 6, padding_idx=0), 'weight', (torch.arange(9).view(3,3),)),
    'attention': (lambda: nn.MultiheadAttention(4, 2, batch_first=True), ['in_proj_weight','out_proj.weight'], (seq,seq,seq)),
    'nested': (lambda: nn.Sequential(nn.Linear(4,5), nn.ReLU(), nn.Linear(5,2)), ['0.weight','2.weight'], (seq,)),
}
every_kind = pytest.mark.parametrize('make,names,args', kinds.values(), ids=kinds)

def first(y): return y[0] if isinstance(y, tuple) else y

def with_weights(m, names, p, seed):
    "A copy of `m` in which the named parameters are those of a pass of `WeightDropout` after `seed`"
    m = copy.deepcopy(m)
    torch.manual_seed(seed)
    with torch.no_grad():
        for n in ([names] if isinstance(names, str) else names): m.get_parameter(n).copy_(dropconnect(m.get_parameter(n).clone(), p))
    return m


@every_kind
def test_it_is_the_module_with_other_weights(make, names, args):
    m = make()
    keys,ids = list(m.state_dict()),[id(p) for p in m.parameters()]
    wd = WeightDropout(m, .5, names)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', message='LSTM with projections')      # torch's own
        for seed in range(3):
            want = first(with_weights(m, names, .5, seed)(*args))
            torch.manual_seed(seed)
            assert torch.equal(first(wd(*args)), want)
        assert torch.equal(first(wd.eval()(*args)), first(m(*args)))
        assert not torch.equal(first(wd.train()(*args)), first(wd.eval()(*args)))
    assert [f'module.{k}' for k in keys]==list(wd.state_dict()) and ids==[id(p) for p in wd.parameters()]
    assert torch.equal(first(WeightDropout(m, 0., names)(*args)), first(m(*args)))


@every_kind
def test_gradients_reach_the_real_weights(make, names, args):
    wd = WeightDropout(make(), .5, names)
    torch.manual_seed(4)
    first(wd(*args)).square().sum().backward()
    twin = with_weights(wd.module, names, .5, 4)
    first(twin(*args)).square().sum().backward()
    torch.manual_seed(4)
    for n in wd.layer_names: 
        scale = dropconnect(torch.ones_like(wd.module.get_parameter(n)), .5)
        torch.testing.assert_close(wd.module.get_parameter(n).grad, twin.get_parameter(n).grad*scale)
    for n,p in wd.module.named_parameters():
        if n not in wd.layer_names: torch.testing.assert_close(p.grad, twin.get_parameter(n).grad)


@every_kind
def test_copies_in_the_middle_of_a_training_are_copies(make, names, args):
    wd = WeightDropout(make(), .5, names)
    first(wd(*args)).sum().backward()
    buf = io.BytesIO()
    torch.save(wd, buf); buf.seek(0)
    for twin in (copy.deepcopy(wd), pickle.loads(pickle.dumps(wd)), torch.load(buf, weights_only=False)):
        before = first(wd.eval()(*args))
        assert torch.equal(first(twin.eval()(*args)), before)
        for p in twin.parameters(): p.data.add_(.1)
        assert torch.equal(first(wd(*args)), before) and not torch.equal(first(twin(*args)), before)
        first(twin.train()(*args)).sum().backward()
        twin.load_state_dict(wd.state_dict())
        assert torch.equal(first(twin.eval()(*args)), before)
        first(wd.train()(*args)).sum().backward()


def test_training_moves_what_the_forward_uses():
    "An RNN keeps a list of its weights of its own: after a pass it must be that of the parameters"
    wd = WeightDropout(lstm(), .5)
    opt = torch.optim.SGD(wd.parameters(), lr=.1)
    for _ in range(3):
        opt.zero_grad()
        wd(seq)[0].square().sum().backward()
        assert all(a is b for a,b in zip(wd.module._flat_weights, wd.module.parameters()))
        assert 'flatten_parameters' not in vars(wd.module)
        before = wd.eval()(seq)[0]
        opt.step()
        assert not torch.equal(wd(seq)[0], before)
        wd.train()
    plain = lstm()
    plain.load_state_dict(wd.module.state_dict())
    assert torch.equal(wd.eval()(seq)[0], plain(seq)[0])


def test_an_error_in_the_module_leaves_it_as_it_was():
    wd = WeightDropout(lstm(), .5)
    with pytest.raises(Exception): wd(torch.randn(3, 5, 7))
    assert all(a is b for a,b in zip(wd.module._flat_weights, wd.module.parameters())) and 'flatten_parameters' not in vars(wd.module)


def test_packed_sequences_hidden_states_and_keywords():
    m = lstm()
    packed = nn.utils.rnn.pack_padded_sequence(seq, [5,3,2], batch_first=True)
    h = torch.zeros(1,3,6),torch.ones(1,3,6)
    torch.manual_seed(0)
    out,(hn,cn) = WeightDropout(m, .5)(packed, h)
    want,_ = with_weights(m, 'weight_hh_l0', .5, 0)(packed, h)
    assert torch.equal(out.data, want.data)
    att = WeightDropout(nn.MultiheadAttention(4, 2, batch_first=True), .5, 'in_proj_weight')
    assert att(query=seq, key=seq, value=seq, need_weights=False)[1] is None


def test_values_are_dropped_at_the_rate_and_the_rest_is_scaled():
    wd = WeightDropout(nn.Linear(200, 300, bias=False), .3, 'weight')
    seen = wd(torch.eye(200)).T/wd.module.weight.detach()
    assert (seen==0).float().mean().item()==pytest.approx(.3, abs=.01) and torch.allclose(seen[seen!=0], torch.tensor(1/.7))


@pytest.mark.parametrize('kw,error,says', [
    (dict(layer_names='weight_hh'), ValueError, "weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0.*layer_names='weight_hh'"),
    (dict(layer_names=['weight_hh_l0','x']), ValueError, "'x'"), (dict(layer_names=[]), ValueError, r'layer_names=\[\]'),
    (dict(weight_p=1.), ValueError, 'weight_p=1.0'), (dict(weight_p='a'), TypeError, "weight_p='a'")])
def test_errors(kw, error, says):
    with pytest.raises(error, match=says): WeightDropout(**dict(module=lstm(), weight_p=.5) | kw)
    with pytest.raises(ValueError, match='embed_p=2'): EmbeddingDropout(nn.Embedding(2,2), 2)
    with pytest.raises(TypeError, match='got Linear'): EmbeddingDropout(nn.Linear(2,2), .1)


def test_embedding_dropout():
    emb = nn.Embedding(50, 3, padding_idx=0)
    ed,words = EmbeddingDropout(emb, .4),torch.arange(50).repeat(2)
    was = emb.weight.clone()
    out = ed(words)
    gone = (out==0).all(1)
    assert torch.equal(out[:50], out[50:]) and 10 < gone[:50].sum() < 32
    assert torch.allclose(out[~gone], emb(words)[~gone]/.6)
    out.sum().backward()
    assert torch.equal((emb.weight.grad!=0).any(1), ~gone[:50])
    for mode in (ed.eval(), ed.train()): mode(words, scale=.1); mode(words, .1)
    assert torch.equal(emb.weight, was) and torch.equal(ed.eval()(words, scale=.1), emb(words)*.1) and torch.equal(ed(words), emb(words))
    theirs = awdlstm.EmbeddingDropout(nn.Embedding(50, 3, padding_idx=0), .4).eval()
    theirs.load_state_dict(ed.state_dict())
    assert torch.equal(theirs(words), ed(words))

# In fastai's language model

text = ('the cat sat on the mat and the dog sat on the log . '*60).split()
vocab = sorted(set(text))
ids = torch.tensor([vocab.index(w) for w in text])

def model(ours=True, bidir=False):
    set_seed(0)
    config = dict(awdlstm.awd_lstm_lm_config, emb_sz=8, n_hid=12, n_layers=2, weight_p=.5, bidir=bidir)
    if not ours: return get_language_model(awdlstm.AWD_LSTM, len(vocab), config)
    with patch.object(awdlstm, 'WeightDropout', WeightDropout), patch.object(awdlstm, 'EmbeddingDropout', EmbeddingDropout):
        return get_language_model(awdlstm.AWD_LSTM, len(vocab), config)

def learner(path, **kw):
    dls = DataLoaders(*[LMDataLoader([ids], bs=4, seq_len=8) for _ in range(2)])
    learn = Learner(dls, model(**kw), CrossEntropyLossFlat(), cbs=rnn_cbs(), path=path, splitter=awdlstm.awd_lstm_lm_split)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def answers(m):
    m.eval().reset()
    return m(ids[:16].view(2, 8))[0]


def test_a_language_model_trains_saves_and_is_exported(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = learner(tmp_path)
        start = learn.validate()[0]
        learn.fit_one_cycle(5, 3e-2)
        learn.freeze(); learn.fit(1, 1e-2); learn.unfreeze()
    assert learn.validate()[0] < start*.8
    before = answers(learn.model)
    learn.save('m')
    again = learner(tmp_path)
    again.load('m')
    assert torch.equal(answers(again.model), before)
    pickle.dumps(learn.model)
    assert torch.equal(answers(copy.deepcopy(learn.model)), before) and torch.equal(answers(learn.model), before)
    learn.fit(1, 1e-2)
    assert not torch.equal(answers(learn.model), before)


@pytest.mark.parametrize('bidir', [False,True])
def test_weights_that_fastai_saved(tmp_path, bidir):
    theirs = model(ours=False, bidir=bidir)
    for p in theirs.parameters(): p.data.uniform_(-.5, .5)
    want = answers(theirs)
    state = theirs.state_dict()
    assert any(k.endswith('_raw') for k in state)
    ours = model(bidir=bidir)
    ours.load_state_dict(state)
    assert torch.equal(answers(ours), want)
    old = dict(state)      # older files hold both names
    for k in state:
        if k.endswith('_raw'): old[k.replace('weight_hh_l0_raw', 'module.weight_hh_l0')] = torch.zeros_like(state[k])
    ours = model(bidir=bidir)
    ours.load_state_dict(old)
    assert torch.equal(answers(ours), want)


def test_learner_that_loads_fastais_file(tmp_path):
    theirs = learner(tmp_path, ours=False)
    theirs.fit(1, 1e-2)
    theirs.save('theirs', with_opt=False)
    ours = learner(tmp_path)
    ours.load('theirs', with_opt=False)
    assert torch.equal(answers(ours.model), answers(theirs.model))


def test_the_same_initial_weights_and_nothing_of_vision():
    ours,theirs = model(),model(ours=False)
    assert torch.equal(answers(ours), answers(theirs))
    assert not [m for m in sys.modules if m.startswith('fastai.vision')]


class TwoNames(nn.Module):
    def __init__(self): super().__init__(); self.a = self.b = nn.Linear(20, 20)
    def forward(self, x): return self.b(self.a(x))

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Embedding(20, 8),nn.Linear(8, 20); self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x))

@pytest.mark.parametrize('module,x', [(TwoNames(), torch.ones(3, 20)), (Tied(), torch.arange(20))], ids=['two names','tied'])
def test_what_is_registered_twice_is_exchanged_once_and_put_back(module, x):
    weight = module.a.weight
    wd,seen = WeightDropout(module, .5, 'a.weight'),[]
    for m in (module.a, module.b): m.register_forward_pre_hook(lambda m, args: seen.append(m.weight))
    wd(x).sum().backward()
    assert module.a.weight is weight and module.b.weight is weight and weight.grad.abs().sum() > 0
    assert len(seen)>=2 and all(w is seen[0] for w in seen) and .3 < (seen[0]==0).float().mean() < .7       # 160 weights or more: 5 standard deviations
    before = weight.detach().clone()
    torch.optim.SGD(wd.parameters(), 1.).step()
    assert not torch.equal(module.b.weight, before)


def test_a_pass_on_the_cpu_leaves_the_filters_of_warnings_alone():
    wd,before = WeightDropout(lstm(), .5),list(warnings.filters)
    wd(seq)
    assert warnings.filters == before
