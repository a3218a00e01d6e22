"Tests of Learners pass where the model has memory of its own, as on a GPU; the device is simulated on the CPU"
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from simulated_device import compile_to

HERE = Path(__file__).parent
TESTS = ['test_callback_intervals.py::test_get_preds_with_interval[noisy_blend]', 'test_contract_learners.py::test_fits_under_autocast[best_average]',
    'test_uncertainty_learners.py::test_a_fit_ends_the_calibration_and_lr_find_does_not',
    'test_uncertainty_learners.py::test_a_calibration_remembers_which_snapshots_predicted[average]']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    if shutil.which('g++') is None: pytest.skip('g++ is not installed')
    library = compile_to(tmp_path_factory.mktemp('device'))
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = os.environ | dict(SIMULATED_DEVICE=str(library), PYTHONPATH=paths)
    return lambda *args: subprocess.run([sys.executable,'-W','ignore',*args], cwd=HERE, env=env, capture_output=True, text=True)


def test_tensors_must_be_on_one_device(run):
    code = '''
import simulated_device, torch
from torch import nn
layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
before = [p for p in layer.parameters()]
layer.to('simulated')
assert all(p is q and p.device.type=='simulated' for p,q in zip(before, layer.parameters()))
x = torch.randn(5, 3)
layer(x.to('simulated')).sum().backward()
assert layer[1].running_mean.cpu().abs().sum()>0
for wrong in (lambda: layer(x), lambda: x.to('simulated')+x, lambda: x[torch.tensor([0], device='simulated')], lambda: before[0].detach().numpy()):
    try: wrong()
    except (RuntimeError,TypeError) as e: assert 'device' in str(e), e
    else: raise AssertionError('no error')
'''
    res = run('-c', code)
    assert res.returncode==0, res.stderr[-3000:]


def test_learners(run):
    res = run('-m', 'pytest', '-q', '-p', 'simulated_device', '-p', 'no:cacheprovider', '--tb=short', *TESTS)
    assert res.returncode==0 and ' passed' in res.stdout and 'skipped' not in res.stdout, res.stdout[-6000:]
