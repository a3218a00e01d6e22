"The statistical tests of benchmarks/bits.py with few samples, and that they find a weakened generator"
import importlib.util, sys
from pathlib import Path
import numpy as np, pytest
numba = pytest.importorskip('numba')
if numba.config.DISABLE_JIT: pytest.skip('these loops need compiled code', allow_module_level=True)

@pytest.fixture(scope='module')
def bits():
    spec = importlib.util.spec_from_file_location('bits', Path(__file__).parent.parent/'benchmarks'/'bits.py')
    sys.modules['bits'] = res = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(res)
    return res

scale = .003
lowest = 1e-6   # about 1250 tests with fixed seeds: good bits have a chance of 1 in 800 to be below with any of them

def test_the_generator_under_test_is_that_of_the_masks(bits): bits.check_twins()

@pytest.mark.parametrize('name', ['single', 'joint', 'seeds', 'avalanche', 'sums', 'rank', 'spectrum', 'runs', 'all_pairs'])
def test_bits_pass(bits, name):
    worst = min(bits.battery('ours', scale, [name]), key=lambda r: r.p_value)
    assert worst.p_value>lowest, worst

@pytest.mark.parametrize('name', ['joint', 'all_pairs'])
def test_a_generator_without_the_xorshift_fails(bits, name):
    assert min(r.p_value for r in bits.battery('no_xorshift', scale, [name]))<lowest**2

def weak_pairs(bits, kind, n=2048):
    "Correlation at p=0.5 of the masks of those pairs of inputs whose counters differ in upper bits only, the weak ones"
    d = bits.pairs(kind, n, 10)[0]
    return np.abs([bits.correlations(d, M, 2**16) for M in bits.multipliers(kind)])

bound = .015     # six times the standard error

def test_no_two_inputs_have_similar_masks(bits): assert weak_pairs(bits, 'ours').max(initial=0)<bound

def test_hashed_counters_have_pairs_with_similar_masks(bits): assert weak_pairs(bits, 'hashed_counters').max()>2*bound
