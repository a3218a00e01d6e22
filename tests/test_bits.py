"Statistical tests of benchmarks/bits.py with few samples; they must also find a weakened generator"
import importlib.util, os, sys
from pathlib import Path
import numpy as np, pytest, torch
from fastai_dropconnect.masks import mask_counters, mask_keys, mask_words
numba = pytest.importorskip('numba')
if numba.config.DISABLE_JIT: pytest.skip('these loops need compiled code', allow_module_level=True)

def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent/'benchmarks'/f'{name}.py')
    sys.modules[name] = res = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(res)
    return res

@pytest.fixture(scope='module')
def bits(): return load('bits')

scale = .003
lowest = 1e-6   # about 2000 tests with fixed seeds: with good bits the chance that any is below is 1 in 500

def test_the_generator_under_test_is_that_of_the_masks(bits): bits.check_twins()

@pytest.mark.parametrize('order,axes', [('inputs',(0,1,2,3,4)), ('outputs',(0,1,2,4,3)), ('rows',(0,3,4,1,2)), ('seeds',(1,2,3,4,0))])
def test_the_stream_is_the_numbers_of_the_masks(bits, order, axes, capsysbinary):
    "`axes` orders (seed, block, row of a block, output, input), the fastest last"
    S,B,O,I = bits.orders[order][0]
    bits.stream('ours', order, n_bytes=2*(S*B*8*O*I))      # two pieces of bytes
    def numbers(s): return mask_words(mask_keys(s, range(B), O), mask_counters(s, range(B), I)).view(torch.uint8)
    def piece(first):
        res = torch.stack([numbers(torch.tensor(s)) for s in range(first, first+S)]).view(S, B, 2, O, I//16, 4, 16)
        return res.permute(0, 1, 2, 5, 3, 4, 6).reshape(S, B, 8, O, I)
    want = torch.stack([piece(first).permute(axes).flatten() for first in (1, 1+S)]).flatten()
    assert np.array_equal(np.frombuffer(capsysbinary.readouterr().out, np.uint8), want.numpy())

@pytest.mark.skipif(os.name!='posix', reason='the stand-in for dieharder is a shell script')
def test_what_dieharder_calls_weak_runs_again_on_what_follows(bits, tmp_path, monkeypatch):
    fake = tmp_path/'dieharder'
    fake.write_text('''#!/bin/sh
dd bs=8 count=1 2>/dev/null >>got
if [ $6 = 100 ]; then a=WEAK; else a=PASSED; fi
echo "   sts_runs|   2|    100000|    $6|0.00123400|  $a  "
''')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    rows = list(load('dieharder').measure('ours', 'rows', [('101',100), ('101',1)]))
    assert rows == [('ours','rows','sts_runs',2,100000,n,.001234,a) for n,a in ((100,'WEAK'), (400,'PASSED'), (1,'PASSED'))]
    first = bits.deciding(bits.make('ours', [1], 3, 1, 1)[0,:,:,0,0])       # rows are the fastest
    assert (tmp_path/'got').read_bytes() == first.tobytes()

@pytest.mark.parametrize('name', ['single', 'joint', 'seeds', 'avalanche', 'sums', 'rank', 'spectrum', 'runs', 'all_pairs'])
def test_bits_pass(bits, name):
    worst = min(bits.battery('ours', scale, [name]), key=lambda r: r.p_value)
    assert worst.p_value>lowest, worst

@pytest.mark.parametrize('name,details', [('joint', ['']), ('all_pairs', ['1024 inputs','4096 inputs'])])
def test_a_generator_without_the_xorshift_fails(bits, name, details):
    rows = bits.battery('no_xorshift', scale, [name])
    for detail in details: assert min(r.p_value for r in rows if detail in r.detail)<lowest**2

bound = .015     # 15 times the standard error

def test_no_two_inputs_have_similar_masks(bits): assert np.abs(bits.weak_pairs('ours')).max(initial=0)<bound

def test_fixed_counters_have_pairs_with_similar_masks(bits): assert np.abs(bits.weak_pairs('fixed_counters')).max()>2*bound
