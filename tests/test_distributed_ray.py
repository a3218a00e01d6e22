"Two workers of a local Ray cluster train one network, and Ray Tune drives `choose_recipe`"
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest

EXAMPLES = Path(__file__).parent.parent/'examples'
needs_ray = pytest.mark.skipif(not importlib.util.find_spec('ray'), reason="ray is not installed: pip install 'fastai_dropconnect[ray]'")

SCRIPT = '''
import json, sys
sys.path.insert(0, {examples!r})
from ray_train import *
start_ray(num_cpus=2)
trained = train_on_ray(n_rows=1503, epochs=4)
results = tune_recipes(['fastai','dropconnect-batch'], [1e-2], n_rows=600, epochs=3, seeds=2)
trials = [r.metrics | r.config for r in results]
open({out!r}, 'w').write(json.dumps([trained, trials, results.get_best_result().config], default=str))
'''

@needs_ray
def test_workers_train_and_trials_choose(tmp_path):
    out = tmp_path/'results.json'
    done = subprocess.run([sys.executable, '-c', SCRIPT.format(examples=str(EXAMPLES), out=str(out))], capture_output=True, text=True,
                          timeout=500, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1', RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S='300'))
    assert out.exists(), done.stdout+done.stderr
    trained,trials,best = json.loads(out.read_text())
    assert (trained['rank'],trained['world_size'],trained['rows']) == (0,2,300) and trained['rmse']<.95
    assert sorted(t['recipe'] for t in trials) == ['dropconnect-batch','fastai']
    assert best['recipe']==min(trials, key=lambda t: t['loss'])['recipe'] and all(t['sd']>0 for t in trials)
