"The benchmarks of the layers: fair measurements, comparable contestants, complete tables"
import importlib.util, os, subprocess, sys
from contextlib import nullcontext
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
    "A fake clock of CPU time and wall time, which only work moves"
    def __init__(self): self.cpu = self.wall = 0.
    def __call__(self): return self.cpu,self.wall
    def work(self, *seconds, slower=2.):
        "Return a function that takes these CPU times in turn, and `slower` times as much wall time"
        calls = [0]
        def f():
            took = seconds[calls[0]%len(seconds)]
            self.cpu,self.wall,calls[0] = self.cpu+took,self.wall+slower*took,calls[0]+1
        return f


def test_ratio_is_one_against_itself_and_right_against_another():
    clock = Clock()
    for took,ratio in ((1.,1.), (3.,3.), (.001,.001)):
        res = contestants.summary(contestants.in_turns(clock.work(took, slower=4.), clock.work(1.), clock, 20.))
        assert res['ratio'] == pytest.approx(ratio) and res['ratio_wall'] == pytest.approx(2*ratio) and res['ratio_best'] == pytest.approx(ratio)
        assert res['ms'] == pytest.approx(1e3*took) and res['ms_plain'] == pytest.approx(1e3) and res['pairs']>1


def test_the_summary_of_three_pairs():
    pairs = [([2.,20.], [1.,5.]), ([9.,30.], [3.,5.]), ([14.,80.], [2.,4.])]      # of each: CPU and wall time of one and of the other
    assert contestants.summary(pairs) == dict(ratio=3., ratio_wall=6., ratio_best=2., ms=9000., ms_plain=2000., pairs=3)


def test_a_turn_is_the_median_of_its_calls():
    clock = Clock()
    assert contestants.turn(clock.work(1., 2., 30.), 3, clock) == [2.,4.]


def test_each_goes_first_in_every_second_pair():
    clock,order = Clock(),[]
    def player(name):
        f = clock.work(1.)
        return lambda: (order.append(name), f())
    contestants.in_turns(player('a'), player('b'), clock, 12.)
    assert ''.join(order) == 'ab'+'ab'+'ba'+'ab'      # once to see how long they take; then three pairs of 4 seconds


def test_short_calls_are_repeated_in_a_turn():
    clock,calls = Clock(),[]
    f = clock.work(.001)
    contestants.in_turns(lambda: (calls.append(0), f()), clock.work(1.), clock, 0., turn_sz=.01)
    assert len(calls) == 1+5     # 2 ms each on the wall


def test_a_busy_machine_does_not_move_the_ratio():
    clock = Clock()
    now_and_then = [.004]*17 + [1.] + [.004]*13
    res = contestants.summary(contestants.in_turns(clock.work(*now_and_then), clock.work(*[t/2 for t in now_and_then[3:]]), clock, 100.))
    assert res['ratio'] == pytest.approx(2.)


def test_even_the_slowest_is_measured_once():
    clock = Clock()
    assert len(contestants.in_turns(clock.work(60.), clock.work(1.), clock, 3.)) == 1


def test_the_clock_gives_cpu_time_and_wall_time(monkeypatch):
    monkeypatch.setattr(contestants.time, 'thread_time', lambda: 1.)
    monkeypatch.setattr(contestants.time, 'perf_counter', lambda: 2.)
    assert contestants.clock_of('cpu')() == (1.,2.)


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason="needs Linux's peak of memory")
def test_peak_memory_is_that_of_the_call_alone():
    def take(mb): torch.ones(mb*2**18).sum()
    take(400)       # before the call
    assert 95 < contestants.peak_mb(lambda: take(100), 'cpu') < 150


class Watched(nn.Linear):
    def forward(self, x):
        self.x = x
        return super().forward(x)


def test_a_training_step_makes_the_gradients_of_one_batch():
    layer = Watched(3, 2)
    f,grads = contestants.training_step(layer, 5, 3, 2, 'cpu'),[]
    for _ in range(2):
        f()
        grads.append([t.grad.clone() for t in (layer.x, layer.weight, layer.bias)])
    assert layer.x.shape == (5,3) and all(g.any() for g in grads[0])
    for a,b in zip(*grads): assert torch.equal(a, b)     # the second does not add to the first


def test_a_step_is_compared_with_the_plain_layer_of_its_shape(monkeypatch):
    made = []
    def training_step(layer, *args):
        made.append((type(layer).__name__, tuple(layer.weight.shape), *args))
        return lambda: None
    monkeypatch.setattr(contestants, 'training_step', training_step)
    res = contestants.step('Flipout', 7, 3, 2, .5, seconds=0)
    assert made == [('Flipout',(8,16),8,16,8,'cpu'), ('Flipout',(2,3),7,3,2,'cpu'), ('Linear',(2,3),7,3,2,'cpu')]
    assert set(res) == {'peak_mb','ratio','ratio_wall','ratio_best','ms','ms_plain','pairs'}


@pytest.mark.parametrize('name,mode,backend', [('example, torch','example','torch'), ('gaussian','gaussian',''), ('nn.Linear',None,'')])
def test_an_epoch_is_compared_with_the_plain_learner(monkeypatch, name, mode, backend):
    made,fits = [],[]
    class Learner:
        no_bar = staticmethod(nullcontext)
        def __init__(self, config): self.config = config
        def fit(self, n): fits.append((self.config, n))
    def tabular_learner(dls, layers, config):
        made.append((len(dls.train_ds), dls.bs, layers, config))
        return Learner(config)
    monkeypatch.setattr('fastai_dropconnect.tabular.learner.tabular_learner', tabular_learner)
    monkeypatch.setenv('FASTAI_DROPCONNECT_BACKEND', '')
    contestants.epoch(name, rows=64, bs=16, layers=(6,4), p=.25, seconds=0)
    config = mode and dict(weight_p=.25, mode=mode)
    assert [m[:3] for m in made] == [(64, 16, [6,4])]*2 and made[1][3] is None and os.environ['FASTAI_DROPCONNECT_BACKEND'] == backend
    assert made[0][3] == config if config is None else config.items() <= made[0][3].items()
    assert {n for _,n in fits} == {1} and [c for c,_ in fits[:2]] == [made[0][3], None]


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


def test_each_contestant_has_a_row():
    assert list(contestants.contestants) == layers.contestants and contestants.reference == layers.reference


def test_bounds():
    assert layers.bound('example, numba', 'cpu', 64) == 2.8 and layers.bound('example, numba', 'cpu') == 2 and layers.bound('example, torch', 'cpu', 64) == 30
    assert layers.bound('batch', 'cpu', 256) is None and layers.bound('batch', 'cpu', 512) == 1.5 and layers.bound('Flipout', 'cpu', 512) is None
    rows = layers.table([dict(name='gaussian', n=64, ratio=2.6), dict(name='gaussian', n=64, ratio=2.5), dict(name='gaussian', n=64, note='x'),
                         dict(name='Flipout', n=64, ratio=9.)], ['ratio','note'])
    assert list(layers.judge(rows, 'cpu').kept) == [False,True,None,None] and layers.judge(rows, 'cuda').kept.isna().all()


def test_memory_is_that_beyond_the_plain_layer_of_the_same_shape():
    asked = []
    def run(job, **row):
        asked.append((job, *row.values()))
        return dict(ratio=2., peak_mb=row['n'] + 10*row['n_in'] + 100*row['n_out'] + (row['name']=='batch')*(5+row['p']))
    res = layers.measure_layers(['nn.Linear','batch'], [(1,2,3), (3,2,1)], [.25,.5], run)
    assert asked == [('step',name,*shape,p) for shape in ((1,2,3),(3,2,1)) for name,p in (('nn.Linear',.5),('batch',.25),('batch',.5))]
    assert list(res.columns)[:6] == ['name','n','n_in','n_out','p','extra_mb'] and list(res.extra_mb) == [0.,5.25,5.5]*2


def test_growth_is_reported_per_product_and_per_number():
    def run(job, name, p, n, n_in, n_out): return dict(ms=2e-9*n*n_in*n_out, peak_mb=3*(n*n_in+n_in*n_out+n*n_out)/2**20, ratio=1.)
    res = layers.measure_growth('batch', [2,6,8], run)
    assert list(zip(res.axis, res.n, res.n_in, res.n_out)) == [('n',2,2,2), ('n',6,2,2), ('n',8,2,2), ('n_in',2,2,2), ('n_in',2,6,2), ('n_in',2,8,2),
                                                              ('n_out',2,2,2), ('n_out',2,2,6), ('n_out',2,2,8)]
    assert res.ps_per_product.values == pytest.approx(2.) and res.bytes_per_number.values == pytest.approx(3.)


def some_results():
    "Results of three contestants and two shapes; one misses a bound, one has no result"
    rows = [dict(name=name, n=n, n_in=4, n_out=2, p=.5, extra_mb=mb, ratio=ratio, note=note) for name,n,mb,ratio,note in
            (('nn.Linear',64,0.,1.1,None), ('batch',64,12.,120.4,None), ('Flipout',64,None,None,'takes too long'),
             ('nn.Linear',600,0.,1.,None), ('batch',600,11.,1.7,None), ('Flipout',600,7.,9.,None))]
    return layers.judge(layers.table(rows, ['ms']), 'cpu')


def test_the_table_has_a_row_for_each_contestant_and_a_column_for_each_shape():
    res = layers.layers_table(some_results())
    assert list(res.index) == [('nn.Linear',.5), ('batch',.5), ('Flipout',.5)] and list(res.columns) == ['(64,4,2)','(600,4,2)']
    assert res.values.tolist() == [['1.1x     +0 MB','1.0x     +0 MB'], ['120x    +12 MB','1.7x!   +11 MB'], ['-','9.0x     +7 MB']]


def test_the_report_counts_missed_bounds_and_prints_notes(capsys):
    epochs = layers.judge(layers.table([dict(name='example, numba', ratio=r) for r in (1.5,2.)], layers.times), 'cpu')
    grown = layers.table([dict(name='batch', axis='n', note='out of memory')], [])
    layers.report(some_results(), grown, epochs)
    text = capsys.readouterr().out
    assert '1 of 3 bounds missed' in text and 'Flipout: takes too long' in text and 'batch: out of memory' in text


def test_the_figure_shows_ratios_memory_and_growth(tmp_path):
    layers.save(pd.concat([some_results(), some_results().assign(p=.1, ratio=3.)]), tmp_path/'layers.csv', ['a machine'])      # the largest p is shown
    layers.save(pd.DataFrame([dict(name='batch', axis=a, n=n, n_in=10, n_out=10, ms=m) for a,n,m in (('n',1e6,3.), ('n',2e6,5.), ('n_in',3e6,7.))]), tmp_path/'growth.csv', [])
    ratio,memory,growth = layers.draw(tmp_path).axes
    dots = lambda ax: [(list(o.get_xdata()), list(o.get_ydata())) for o in ax.lines if o.get_marker()=='o']
    assert [t.get_text() for t in ratio.get_yticklabels()] == ['Flipout','batch']
    assert dots(ratio) == [([120.4],[1]), ([1.7,9.],[1,0])] and dots(memory) == [([12.],[1]), ([11.,7.],[1,0])]      # 64 rows, 600 rows
    assert dots(growth) == [([.1,.2],[3.,5.]), ([.3],[7.])]
    assert [o.get_xdata() for o in ratio.lines if o.get_marker()=='|'] == [[1.5]]


def test_a_process_that_cannot_finish_leaves_a_note():
    kw = dict(name='dense einsum', n=4096, n_in=1024, n_out=1024, p=.5)
    assert 'memory' in layers.alone('step', 120, 2, **kw)['note']
    assert layers.alone('step', .01, 2, **kw)['note'] == 'takes more than 0 s'


def test_a_process_returns_its_last_line_or_a_note(monkeypatch):
    def told(returncode, stdout='', stderr=''):
        monkeypatch.setattr(layers.subprocess, 'run', lambda *args, **kw: subprocess.CompletedProcess(args, returncode, stdout, stderr))
        return layers.alone('step', 1, 0)
    assert told(0, 'a warning\n{"ratio": 1.5}\n') == dict(ratio=1.5)
    assert told(1, '{"ratio": 1.5}', 'Traceback\nKeyError: 1\n') == dict(note='KeyError: 1') and told(-9) == dict(note='ended with -9')


def test_quick_run_makes_tables_and_a_figure(tmp_path):
    names = [layers.reference, 'example, numba', 'Flipout']
    flags = '--quick', '--only', ';'.join(names), '--against', ROOT/'fastai_dropconnect', '--out', tmp_path
    res = subprocess.run([sys.executable, ROOT/'benchmarks'/'layers.py', *flags], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    steps,grown,epochs = (pd.read_csv(tmp_path/f'{o}.csv', comment='#') for o in ('layers','growth','epochs'))
    assert list(steps.name) == names and steps.ratio.notna().all() and (steps.pairs>0).all() and (steps.n==8).all()
    assert set(steps) == {'name','n','n_in','n_out','p','extra_mb','peak_mb','ratio','ratio_wall','ratio_best','ms','ms_plain','pairs','bound','kept','note'}
    assert list(grown.axis) == ['n','n_in','n_out'] and grown.ms.notna().all()
    assert list(epochs.name) == names[:2] and (epochs.ms>0).all()
    first = (tmp_path/'layers.csv').read_text().splitlines()
    assert first[0].startswith('# ') and first[1].startswith('# kernel numba for ') and 'torch' in first[2]
    kernels = pd.read_csv(tmp_path/'kernels.csv', comment='#')
    assert (kernels.ratio>0).all() and (kernels.pairs>0).all()
    assert (tmp_path/'layers.png').stat().st_size > 10_000
    for name in names: assert name in res.stdout
    assert 'bounds missed' in res.stdout
