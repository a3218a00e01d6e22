"Utilities for modules"
import ast, copy, sys
from pathlib import Path
import pytest, torch
from fastai.collab import EmbeddingDotBias
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import LinearDecoder, SequentialRNN
from torch import nn
from fastai_dropconnect import nn_utils
from fastai_dropconnect.nn_utils import (ModelRecord, call_with, call_with_state, copy_state, inner_model, layer_values, load_state_,
                                         mean_state, select_layers, select_weights)


def test_the_inner_model_of_a_compiled_model_in_a_wrapper():
    net = nn.Linear(2, 1)
    assert inner_model(torch.compile(nn.DataParallel(net))) is net
    assert inner_model(nn.DataParallel(torch.compile(net))) is net


def test_the_module_needs_only_torch():
    imports = [n for n in ast.walk(ast.parse(Path(nn_utils.__file__).read_text())) if isinstance(n, (ast.Import,ast.ImportFrom))]
    names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in imports if isinstance(n, ast.ImportFrom) and not n.level}
    assert {n.split('.')[0] for n in names} - sys.stdlib_module_names <= {'torch','fastcore'}


def message(model, layers=None):
    with pytest.raises(ValueError) as e: select_layers(model, layers)
    return str(e.value)


def test_a_model_of_embeddings_says_which_layers_it_has():
    assert message(EmbeddingDotBias(8, 20, 30))==(
        "`layers` must be given: the model has no hidden nn.Linear; it has 4 nn.Embedding ('u_weight', 'i_weight', ...); "
        "pass for example layers=['u_weight', 'i_weight']")


def test_a_language_model_says_which_layers_it_has():
    msg = message(SequentialRNN(AWD_LSTM(50, 8, 12, 2), LinearDecoder(50, 8, .1)))
    for part in ('no hidden nn.Linear (the last one is the output layer)', "1 nn.Embedding ('0.encoder')", "2 nn.LSTM ('0.rnns.0.module', ",
                 "2 WeightDropout ('0.rnns.0', '0.rnns.1')", "1 nn.Linear ('1.decoder')"): assert part in msg, msg


@pytest.mark.parametrize('model', [EmbeddingDotBias(8, 20, 30), nn.Linear(3, 1), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)),
                                   SequentialRNN(AWD_LSTM(50, 8, 12, 2), LinearDecoder(50, 8, .1))])
def test_the_example_in_the_message_selects_layers(model):
    layers = ast.literal_eval(message(model).split('layers=')[1])
    assert list(select_layers(model, layers))==layers


@pytest.mark.parametrize('model', [nn.ReLU(), nn.BatchNorm1d(3), nn.Sequential()])
def test_a_model_without_weight_matrices_says_so(model):
    assert message(model)=='`layers` must be given: the model has no hidden nn.Linear, nor any other layer with a weight matrix'


def test_layers_that_select_nothing_are_shown():
    model = TabularModel([(10,4), (5,3)], 3, 1, [200,100])
    assert "which has 2 nn.Embedding ('embeds.0', 'embeds.1'), 3 nn.Linear" in message(model, lambda n,m: False)
    assert message(model, ['x']).endswith("got ['x']")
    assert 'which has no layer with a weight matrix, got layers=<function' in message(nn.ReLU(), lambda n,m: False)


def test_layers_come_in_the_order_of_the_names():
    model = TabularModel([], 3, 1, [20,10])
    assert list(select_layers(model, ['layers.1.0', 'layers.0.0']))==['layers.1.0', 'layers.0.0']
    assert [v for _,v in layer_values(model, {'layers.1.0': .2, 'layers.0.0': .1}).values()]==[.2,.1]


def test_a_subclass_of_linear_counts_as_one():
    class Mine(nn.Linear): pass
    assert list(select_layers(nn.Sequential(Mine(3,3), nn.Linear(3,1))))==['0']


def tied():
    net = nn.Sequential(nn.Linear(3,3), nn.BatchNorm1d(3), nn.Linear(3,3), nn.Linear(3,1))
    net[2].weight = net[0].weight
    return net


def test_a_state_runs_and_loads_with_shared_parameters():
    net,x = tied(),torch.randn(8, 3)
    state = {n: t+1 for n,t in copy_state(net).items()}
    assert '0.weight' in state and '2.weight' not in state
    out = call_with_state(net.eval(), state, x)
    other = copy.deepcopy(net)
    load_state_(other, state)
    assert torch.equal(other(x), out) and not torch.equal(net(x), out)


def test_call_with_keeps_the_module():
    lin,x = nn.Linear(3, 2),torch.randn(4, 3)
    before = copy_state(lin)
    w = torch.zeros(2, 3, requires_grad=True)
    call_with(lin, {lin.weight: w}, (x,)).sum().backward()
    assert w.grad is not None and lin.weight.grad is None
    assert all(torch.equal(t, before[n]) for n,t in copy_state(lin).items())


def test_the_mean_state_keeps_types():
    a,b = copy_state(tied()),copy_state(tied())
    mean = mean_state([a, b])
    assert {n:t.dtype for n,t in mean.items()}=={n:t.dtype for n,t in a.items()}
    torch.testing.assert_close(mean['0.weight'], (a['0.weight']+b['0.weight'])/2)


def test_integer_parameters_are_not_selected():
    net = nn.Sequential(nn.Linear(3,3), nn.Linear(3,1))
    net[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match='`params` must name a parameter'): select_weights(layer_values(net, .5))


class Record(ModelRecord):
    value = None
    def write(self, metadata): metadata['record'] = self.value
    def read(self, metadata): self.value = metadata.get('record')


def test_a_record_travels_with_saved_weights(tmp_path):
    net,other,written,read = tied(),tied(),Record(),Record()
    written.attach(net)
    read.attach(other)
    written.value = 7
    torch.save(net.state_dict(), tmp_path/'net.pth')
    other.load_state_dict(torch.load(tmp_path/'net.pth'))
    assert read.value==7
    written.detach()
    other.load_state_dict(net.state_dict())
    assert read.value is None


@pytest.mark.parametrize('needs_all,expected', [(False,7), (True,None)])
def test_a_record_about_the_whole_model_needs_all_entries(needs_all, expected):
    net,other,written,read = tied(),tied(),Record(),Record()
    written.value,read.needs_all = 7,needs_all
    written.attach(net)
    read.attach(other)
    state = net.state_dict()
    del state['3.bias']
    other.load_state_dict(state, strict=False)
    assert read.value==expected
    with pytest.raises(RuntimeError, match='Missing key'): other.load_state_dict(state)
    assert read.value==expected
