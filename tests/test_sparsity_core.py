"Masks as bits, weights held under any optimizer in a plain torch loop, and masks that travel with a `state_dict`"
import copy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Adam, Lamb, ranger
from fastai.optimizer import OptimWrapper
from torch import nn
from fastai_dropconnect.masks import exact_mask
from fastai_dropconnect.sparsity.core import (HeldWeights, MaskRecord, as_bits, bit_mask, clean_optimizer, fill_masked_,
                                              zero_at_random, zeros_as_mask)

TORCH = dict(SGD=dict(lr=.1, momentum=.9, weight_decay=.1), AdamW=dict(lr=.01, weight_decay=.1), Adam=dict(lr=.01, amsgrad=True), RMSprop=dict(lr=.01, momentum=.9),
             Adagrad=dict(lr=.1), Adadelta={}, Adamax={}, NAdam={}, RAdam={}, ASGD={}, Rprop={})
OPTS = {n: partial(getattr(torch.optim, n), **kw) for n,kw in TORCH.items()}
OPTS |= {'fastai.Adam': partial(Adam, lr=.01, wd=.1), 'Lamb': partial(Lamb, lr=.01), 'ranger': partial(ranger, lr=.01, wd=.1),
         'OptimWrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}
every_opt = pytest.mark.parametrize('make_opt', OPTS.values(), ids=OPTS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

def network(n_in=6): return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, 1))

def backward(net, x, y):
    net.zero_grad()
    F.mse_loss(net(x), y).backward()

@pytest.fixture
def batch(): return torch.randn(32, 6),torch.randn(32, 1)

# Bits

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('value', [0., 1., -2.5])
def test_masked_entries_get_the_value_whatever_was_there(dtype, value):
    bad = torch.tensor([float('nan'), float('inf'), -float('inf'), -0., 3.], dtype=dtype)
    w,mask = bad.repeat(2),torch.arange(10) >= 5
    fill_masked_(w, bit_mask(mask, w), value)
    assert (w[:5]==value).all() and w.dtype==dtype and torch.equal(as_bits(w[5:]), as_bits(bad))
    if value==0: assert not w[:5].signbit().any()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('wide', DTYPES, ids=str)
def test_a_mask_serves_tensors_of_every_width(dtype, wide):
    mask,t = torch.tensor([True,False,True]),torch.ones(3, dtype=wide)
    fill_masked_(t, bit_mask(mask, torch.ones(3, dtype=dtype)), 0.)
    assert torch.equal(t, mask.to(wide))


def test_bits_share_memory_and_take_any_strides():
    w = torch.randn(4, 6).t()
    mask = torch.rand(6, 4) > .5
    as_bits(w).bitwise_and_(bit_mask(mask, w))
    assert torch.equal(w!=0, mask)

# Held weights

@every_opt
@pytest.mark.parametrize('zero', [True, False], ids=['zero','value'])
def test_weights_are_held_after_every_step(make_opt, zero, batch):
    net = network()
    opt,weights = make_opt(net.parameters()),[net[0].weight, net[2].weight]
    for _ in range(3):      # the optimizer has a past
        backward(net, *batch)
        opt.step()
    masks = [exact_mask(w.shape, .5) for w in weights]
    held = HeldWeights(dict(zip(weights, masks)), zero)
    start = [w.detach().clone() for w in weights]
    for _ in range(8):
        backward(net, *batch)
        held.step(opt)
        for w,m,s in zip(weights, masks, start): assert torch.equal(w[~m], s[~m])
    for w,m,s in zip(weights, masks, start):
        assert (w[m]!=s[m]).any() and (w[~m]==0).all().item()==zero


@every_opt
def test_an_input_that_is_held_at_zero_might_as_well_not_be_there(make_opt, batch):
    "The rest of the network trains as if the masked weights did not exist"
    x,y = batch
    full,small = network(6),network(4)
    with torch.no_grad():
        for p,q in zip(small.parameters(), full.parameters()): p.copy_(q[:,:4] if p.shape!=q.shape else q)
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:,4:] = False
    held = HeldWeights({full[0].weight: mask})
    opts = [make_opt(n.parameters()) for n in (full, small)]
    for _ in range(10):
        backward(full, x, y)
        held.step(opts[0])
        backward(small, x[:,:4], y)
        opts[1].step()
    torch.testing.assert_close(full[0].weight[:,:4], small[0].weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(full(x), small(x[:,:4]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_and_infinity_are_masked(dtype):
    w = nn.Parameter(torch.tensor([1., float('nan'), 2., float('inf')], dtype=dtype))
    held,opt = HeldWeights({w: torch.tensor([True,False,True,False])}),torch.optim.SGD([w], .5)
    assert w.tolist() == [1, 0, 2, 0]
    w.grad = torch.tensor([1., float('inf'), 2., float('nan')], dtype=dtype)
    held.mask_grads()
    assert w.grad.tolist() == [1, 0, 2, 0]
    w.grad[1] = float('nan')        # an optimizer or a hook puts it there
    opt.step()
    held.after_step(opt)
    assert w.tolist() == [.5, 0, 1, 0]


def test_the_optimizer_is_cleaned_after_the_first_step_and_every_thousand(batch):
    net = network()
    w,mask,opt = net[0].weight,exact_mask((8,6), .5),torch.optim.AdamW(net.parameters(), 1e-3)
    held = HeldWeights({w: mask})
    def squares():
        backward(net, *batch)
        held.step(opt)
        return opt.state[w]['exp_avg_sq'][~mask]
    assert (squares()==1).all() and (squares()<1).all()
    held.n_steps = 999
    assert (squares()<1).all() and (squares()==1).all()
    held.clean(opt)
    assert all((opt.state[w][k][~mask]==0).all() and (opt.state[w][k][mask]!=0).all() for k in ('exp_avg','exp_avg_sq'))


def test_weights_without_a_gradient_stay_held_too():
    w = nn.Parameter(torch.randn(3, 4))
    held = HeldWeights({w: exact_mask((3,4), .5)})
    held.mask_grads()
    held.step(torch.optim.SGD([w], .1))
    assert (w==0).sum()==6 and len(held)==1


def test_nothing_to_hold(batch):
    net,held = network(),HeldWeights({})
    opt = torch.optim.SGD(net.parameters(), .1)
    backward(net, *batch)
    held.step(opt)
    held.clean(opt)
    assert not held


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r'`masks`.*\(3, 4\), got \(4, 3\)'): HeldWeights({nn.Linear(4, 3).weight: torch.ones(4, 3).bool()})


def test_a_weight_that_has_changed_its_shape_is_refused():
    "The kernel of the masks knows only addresses: the second half of this memory is not the weight's any more"
    memory = torch.ones(200, 4)
    w = nn.Parameter(memory)
    held = HeldWeights({w: torch.zeros(200, 4, dtype=torch.bool)})
    for other in (memory[:100], torch.ones(400, 4), torch.ones(4, 200)):
        memory.fill_(1)
        w.data = other
        with pytest.raises(RuntimeError, match='must match'): held.mask_weights()
        assert (memory[100:]==1).all() and (other==1).all()


def test_a_copy_of_model_and_holder_holds_its_own_weights(batch):
    net = network()
    held = HeldWeights({net[0].weight: exact_mask((8,6), .5)})
    net2,held2 = copy.deepcopy((net, held))
    opt,before = torch.optim.SGD(net2.parameters(), .1),net[0].weight.clone()
    backward(net2, *batch)
    held2.step(opt)
    assert (net2[0].weight==0).sum()==24 and torch.equal(net[0].weight, before) and (net2[0].weight!=before).any()


def test_only_tensors_of_the_weights_shape_are_cleaned():
    w = nn.Parameter(torch.ones(2, 2))
    opt = torch.optim.SGD([w], .1)
    opt.state[w] = dict(step=torch.tensor(5.), name='x', momentum_buffer=torch.ones(2, 2))
    clean_optimizer(opt, {w: bit_mask(torch.eye(2)==1, w)})
    assert opt.state[w]['step']==5 and torch.equal(opt.state[w]['momentum_buffer'], torch.eye(2))

# Records

@pytest.mark.parametrize('shape', [(7,), (3,5), (2,3,4), (1,1)], ids=str)
def test_masks_travel_with_the_state_dict(shape):
    mask,record,found = torch.rand(shape) > .5,MaskRecord(),MaskRecord()
    models = [nn.ParameterDict(dict(w=nn.Parameter(torch.randn(shape)))) for _ in range(2)]
    record.attach(models[0])
    found.attach(models[1])
    record['w'] = mask
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(found['w'], mask) and list(found)==['w'] and 'w' in found and 'v' not in found
    found.clear()
    assert not list(found)


def test_two_records_of_one_model():
    net,a,b,both = network(),MaskRecord(),MaskRecord(),MaskRecord()
    a['0.weight'],b['2.weight'] = exact_mask((8,6), .5),exact_mask((1,8), .5)
    a.attach(net)
    b.attach(net)
    other = network()
    both.attach(other)
    other.load_state_dict(net.state_dict())
    assert set(both)=={'0.weight','2.weight'}


@pytest.mark.parametrize('per', ['tensor','row'])
def test_zeros_are_read_as_the_mask_that_made_them(per):
    w,mask = torch.randn(20, 10),exact_mask((20,10), .3, per)
    assert zeros_as_mask(w, .3, per) is None and zeros_as_mask(w, 0., per) is None
    assert torch.equal(zeros_as_mask(w*mask, .3, per), mask)
    assert zeros_as_mask(w*mask, .4, per) is None


def test_random_zeros_repeat_with_the_seed_and_reach_slow_weights(batch):
    net = network()
    opt = ranger(net.parameters(), lr=.01)
    backward(net, *batch)
    opt.step()
    weights = {'0.weight': (net[0].weight, .5), '2.weight': (net[2].weight, .25)}
    masks = zero_at_random(weights, 3, opt)
    slow = dict(zip(sum(map(list, opt.param_lists), []), sum(map(list, opt.slow_weights), [])))
    for n,(p,s) in weights.items():
        assert torch.equal(p!=0, masks[n]) and (p==0).sum()==round(s*p.numel()) and torch.equal(slow[p]!=0, masks[n])
    again = zero_at_random(weights, 3)
    assert all(torch.equal(again[n], m) for n,m in masks.items())
    assert not torch.equal(zero_at_random(weights, 4)['0.weight'], masks['0.weight'])
