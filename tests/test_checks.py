"Checks of arguments: what passes, what is refused, and how the message reads"
import datetime, math
from decimal import Decimal
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastcore.foundation import L
from fastai_dropconnect import checks
from fastai_dropconnect.checks import (check_choice, check_date, check_int, check_layers, check_lr, check_p, check_path,
                                       check_positive, check_seed, check_values)


@pytest.mark.parametrize('p', [0, .3, np.float32(.5), np.float64(.25), np.int64(0), 1-1e-16])
def test_probabilities_become_floats(p):
    assert check_p(p)==p and type(check_p(p)) is float


@pytest.mark.parametrize('p', [1, -.1, 1.5, math.nan, math.inf, np.float64('nan')])
def test_probabilities_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match='`out_p` must be a number with 0 <= out_p < 1, got out_p='): check_p(p, 'out_p')


@pytest.mark.parametrize('p', ['0.5', None, True, np.bool_(True), [.5], 1j, Decimal('.5')])
def test_a_probability_must_be_a_number(p):
    with pytest.raises(TypeError, match='`p` must be a number'): check_p(p)


@pytest.mark.parametrize('n', [1, np.int64(3), np.uint8(7)])
def test_counts_become_ints(n):
    assert check_int(n, 'n')==n and type(check_int(n, 'n')) is int


@pytest.mark.parametrize('n,error', [(0, ValueError), (-3, ValueError), (1., TypeError), (True, TypeError), ('2', TypeError), (None, TypeError)])
def test_wrong_counts_are_refused(n, error):
    with pytest.raises(error, match='`n` must be an integer of at least 1, got n='): check_int(n, 'n')


@pytest.mark.parametrize('x,error', [(0, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (True, TypeError), ('1', TypeError)])
def test_wrong_scales_are_refused(x, error):
    with pytest.raises(error, match='`x` must be a positive number, got x='): check_positive(x, 'x')


@pytest.mark.parametrize('seed', [None, 0, -5, np.int64(7)])
def test_seeds(seed): assert check_seed(seed) is seed


@pytest.mark.parametrize('seed', [True, 1., 'a'])
def test_wrong_seeds_are_refused(seed):
    with pytest.raises(TypeError, match='`seed` must be None or an int, got seed='): check_seed(seed)


@pytest.mark.parametrize('lr', [0, 1e-3, np.float32(.1), slice(1e-4, 1e-2), slice(1e-3), [1e-3, 1e-2], (.1,), L(.1, .2), np.array([.1, .2])])
def test_learning_rates(lr): assert check_lr(lr, 'lr') is lr


@pytest.mark.parametrize('lr,error', [
    (-1, ValueError), (math.nan, ValueError), (slice(-1, 1), ValueError), ([.1, math.inf], ValueError),
    (True, TypeError), ('high', TypeError), (None, TypeError), ([], TypeError), (slice(None), TypeError), ([.1, '1'], TypeError)])
def test_wrong_learning_rates_are_refused(lr, error):
    with pytest.raises(error, match='`lr` must be a finite number of at least 0, a slice or a list of those, got lr='): check_lr(lr, 'lr')


@pytest.mark.parametrize('value', ['rows', None, ['batch'], np.array(['batch']), 0, True, b'batch'])
def test_a_wrong_choice_lists_the_options(value):
    with pytest.raises(ValueError, match="`mode` must be one of 'example', 'batch', 1, got mode="):
        check_choice(value, 'mode', ('example', 'batch', 1))


def test_choices():
    assert check_choice('b', 'name', {'a': 1, 'b': 2})=='b'
    assert check_choice(None, 'name', ['a'], none=True) is None
    with pytest.raises(ValueError, match="must be None or one of 'a', got name='c'"): check_choice('c', 'name', ['a'], none=True)


@pytest.mark.parametrize('path', [None, 'a', Path('a')])
def test_paths(path): assert check_path(path) is path


@pytest.mark.parametrize('path', [3, ['a'], b'a'])
def test_wrong_paths_are_refused(path):
    with pytest.raises(TypeError, match='`path` must be None, a str or a Path, got path='): check_path(path)


@pytest.mark.parametrize('x', ['2011-10-01', '20111001', '2011-10', datetime.date(2011, 10, 1), datetime.datetime(2011, 10, 1),
                               pd.Timestamp('2011-10-01'), pd.Timestamp('2011-10-01', tz='Europe/Rome')])
def test_dates(x): assert check_date(x, 'valid_from')==pd.Timestamp(2011, 10, 1)


@pytest.mark.parametrize('x', ['soon', '', '01.10.2011', '2011-13-01', 20111001, None, pd.NaT])
def test_wrong_dates_are_refused(x):
    with pytest.raises(ValueError, match="`valid_from` must be a date such as '2011-10-01', got valid_from="): check_date(x, 'valid_from')


def test_layers():
    everything = lambda name, module: True
    assert check_layers(None) is None and check_layers(everything) is everything
    assert check_layers('a')==['a'] and list(check_layers(('a','b')))==['a','b']


@pytest.mark.parametrize('layers', [3, [], ['a', 3], True, [None]])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(TypeError, match='`layers` must be None, a function of'): check_layers(layers)


def test_values_of_layers():
    f = lambda name, module: .5
    assert check_values(f, 'sparsity') is f and check_values(0, 'sparsity')==0. and check_values({'a': .5}, 'sparsity')=={'a': .5}
    assert check_values(.5, 'sparsity', ['a'])==.5


@pytest.mark.parametrize('value,layers,message', [
    (1., None, 'got sparsity=1.0'), ({}, None, 'got sparsity={}'), ({'a': 1}, None, 'got sparsity=1'),
    ({'a': .5}, ['a'], '`layers` must be None if `sparsity` is a dictionary of layers')])
def test_wrong_values_are_refused(value, layers, message):
    with pytest.raises(ValueError, match=message): check_values(value, 'sparsity', layers)


def test_layer_names_of_a_dictionary_are_strings():
    with pytest.raises(TypeError, match='`layers` must be'): check_values({3: .5}, 'sparsity')


def test_every_message_says_the_value():
    "The rule and the value are in each message of the module"
    source = Path(checks.__file__).read_text()
    messages = [l for l in source.splitlines() if 'must be' in l]
    assert len(messages)>=10 and all('got ' in l and ('!r}' in l) for l in messages), messages
