"The contestants of the benchmarks do the same thing, and the tables have a line for each of them"
import importlib.util, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch
from torch import nn

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/'benchmarks'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

contestants,layers = load('contestants'),load('layers')


class Clock:
    "Time that passes only when something is done, CPU time and twice as much wall time"
    def __init__(self): self.now = 0.
    def __call__(self): return self.now,2*self.now
    def work(self, *seconds):
        "A function that takes these times, one after the other and again"
        calls = [0]
        def f():
            self.now += seconds[calls[0]%len(seconds)]
            calls[0] += 1
        return f


def test_ratio_is_one_against_itself_and_right_against_another():
    clock = Clock()
    for took,ratio in ((1.,1.), (3.,3.), (.001,.001)):
        res = contestants.summary(contestants.in_turns(clock.work(took), clock.work(1.), clock, 20.))
        assert res['ratio'] == pytest.approx(ratio) and res['ratio_wall'] == pytest.approx(ratio) and res['ratio_best'] == pytest.approx(ratio)
        assert res['ms'] == pytest.approx(1e3*took) and res['ms_plain'] == pytest.approx(1e3) and res['pairs']>1


def test_a_busy_machine_does_not_move_the_ratio():
    clock = Clock()
    now_and_then = [.004]*17 + [1.] + [.004]*13
    res = contestants.summary(contestants.in_turns(clock.work(*now_and_then), clock.work(*[t/2 for t in now_and_then[3:]]), clock, 100.))
    assert res['ratio'] == pytest.approx(2.)


def test_even_the_slowest_takes_its_turn():
    clock = Clock()
    assert len(contestants.in_turns(clock.work(60.), clock.work(1.), clock, 3.)) == 1


@pytest.mark.parametrize('p', [.1,.5])
@pytest.mark.parametrize('name', [o for o in layers.contestants if o != 'example, triton'])
def test_contestants_have_the_mean_of_a_linear_layer_and_the_variance_of_dropconnect(name, p):
    n,n_in,n_out,draws = 2,5,3,2000
    try: layer = contestants.contestants[name](n_in, n_out, p=p)
    except ImportError as e: pytest.skip(str(e))
    weights = dict(layer.named_parameters())
    weight,bias = (next(v for k,v in weights.items() if what in k).detach() for what in ('weight','bias'))
    x = torch.randn(n, n_in)
    with torch.no_grad(): ys = torch.stack([layer(x) for _ in range(draws)])
    want = nn.functional.linear(x, weight, bias)
    var = p/(1-p)*(x**2 @ (weight**2).t()) if name != layers.reference else torch.zeros_like(want)
    assert ((ys.mean(0)-want).abs() <= 5*(var/draws).sqrt() + 1e-5).all()
    spread = ((2 + max(1/(p*(1-p))-6, 0))/draws)**.5     # a sum has less excess kurtosis than a term of it, 1/(p(1-p))-6
    assert ((ys.var(0)-var).abs() <= 5*spread*var + 1e-8).all()


def test_each_contestant_has_a_line():
    assert list(contestants.contestants) == layers.contestants and contestants.reference == layers.reference


def test_bounds():
    assert layers.bound('example, numba', 'cpu', 64) == 3 and layers.bound('example, numba', 'cpu') == 2 and layers.bound('example, torch', 'cpu', 64) == 30
    assert layers.bound('batch', 'cpu', 256) is None and layers.bound('batch', 'cpu', 512) == 1.5 and layers.bound('Flipout', 'cpu', 512) is None
    rows = layers.table([dict(name='gaussian', n=64, ratio=2.6), dict(name='gaussian', n=64, ratio=2.4), dict(name='gaussian', n=64, note='x'),
                         dict(name='Flipout', n=64, ratio=9.)], ['ratio','note'])
    assert list(layers.judge(rows, 'cpu').kept) == [False,True,None,None] and layers.judge(rows, 'cuda').kept.isna().all()


def test_a_process_that_cannot_finish_leaves_a_note():
    kw = dict(name='dense einsum', n=4096, n_in=1024, n_out=1024, p=.5)
    assert 'memory' in layers.alone('step', 120, 2, **kw)['note']
    assert layers.alone('step', .01, 2, **kw)['note'] == 'takes more than 0 s'


def test_quick_run_makes_tables_and_a_figure(tmp_path):
    names = [layers.reference, 'example, numba', 'Flipout']
    res = subprocess.run([sys.executable, ROOT/'benchmarks'/'layers.py', '--quick', '--only', ';'.join(names), '--out', tmp_path], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    steps,grown,epochs = (pd.read_csv(tmp_path/f'{o}.csv', comment='#') for o in ('layers','growth','epochs'))
    assert list(steps.name) == names and steps.ratio.notna().all() and (steps.pairs>0).all() and (steps.n==8).all()
    assert set(steps) == {'name','n','n_in','n_out','p','extra_mb','peak_mb','ratio','ratio_wall','ratio_best','ms','ms_plain','pairs','bound','kept','note'}
    assert list(grown.axis) == ['n','n_in','n_out'] and grown.ms.notna().all()
    assert list(epochs.name) == names[:2] and (epochs.ms>0).all()
    first = (tmp_path/'layers.csv').read_text().splitlines()
    assert first[0].startswith('# ') and 'torch' in first[1]
    assert (tmp_path/'layers.png').stat().st_size > 10_000
    for name in names: assert name in res.stdout
    assert 'bounds missed' in res.stdout
