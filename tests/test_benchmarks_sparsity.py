"The benchmark of small networks runs each method, counts what is left, and draws its figure"
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pandas as pd, pytest, torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.sparsity import __main__ as command, report
from benchmarks.sparsity.methods import METHODS, TARGETS
from benchmarks.sparsity.run import COLUMNS, n_epochs, run
from benchmarks.sparsity.tasks import TASKS, Missing

OPTIONS = SimpleNamespace(mnist='no/such/folder', data='no/such.csv', wheel='no/such.whl')

@pytest.fixture(autouse=True)
def small_numbers():
    "The commands let the processor take the smallest numbers for zero, and hypothesis refuses to work like that"
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize('name', [n for n,m in METHODS.items() if not m.only or 'regression' in m.only])
def test_each_method_makes_a_row(name):
    row = run(TASKS['regression'](OPTIONS, False, 0), name, 35., 0, epochs=20)
    assert set(COLUMNS) <= {*row, 'rows'} and 0 <= row['live'] <= row['weights']==105
    if name in ('pruned','structured','shrinking'): assert row['live']<=3
    assert torch.tensor(row['error']).isfinite()


def test_gates_know_the_columns_of_a_table():
    from fastai.tabular.model import TabularModel
    task = TASKS['regression'](OPTIONS, False, 0)
    names = [f'x{i}' for i in range(20)]
    task.train,task.test = [(torch.zeros(len(y), 0).long(), x, y) for x,y in (task.train, task.test)]
    task.n_in,task.bs,task.settings = 2,25,dict(cont_names=names)
    task.model = lambda: TabularModel([], 20, 1, [5])
    row = run(task, 'gates', 1., 0, epochs=30, settings=dict(price=3, gate_lr=.2))
    assert 0 < row['live'] < row['weights']


@pytest.mark.parametrize('task', ['lenet300','lenet5','autoencoder','adult','california','bulldozers'])
def test_missing_data_are_named(task):
    with pytest.raises(Missing, match='no/such'): TASKS[task](OPTIONS, False, 0)
    assert task in TARGETS


def test_the_command_resumes_and_reports(tmp_path):
    out = tmp_path/'r.csv'
    def go(): command.main(tasks='regression,lenet300', methods='plain,pruned', seeds=1, epochs=2, mnist='no/such', out=str(out))
    go()
    first = out.read_text()
    assert len(pd.read_csv(out))==2
    go()
    assert out.read_text()==first
    command.main(tasks='regression', methods='plain', seeds=1, epochs=3, out=str(out))      # longer: another row
    assert list(pd.read_csv(out).epochs)==[2,2,3] and out.read_text().startswith(first)
    table = report.summary(pd.read_csv(out))
    assert list(table.method)==['plain','pruned','plain'] and '| regression | pruned |' in report.markdown(table)
    report.figure(table).savefig(tmp_path/'r.png')
    with pytest.raises(ValueError, match="`tasks` must be 'all' or some of"): command.names('x', TASKS, 'tasks')


def test_a_run_with_the_usual_epochs_counts_as_done(tmp_path, monkeypatch):
    "Whether they are given or not, and where a method has its own number"
    calls = []
    def fake(task, m, target, seed, epochs):
        calls.append(m)
        return dict(task=task.name, method=m, target=target, seed=seed, epochs=n_epochs(m, task.name, task.epochs, epochs), metric='x', error=1., live=1, weights=1,
                    times=1., macs_times=1., units='', seconds=1., settings={})
    monkeypatch.setattr(command, 'run', fake)
    monkeypatch.setitem(METHODS, 'l1', replace(METHODS['l1'], changes=dict(regression=dict(epochs=7))))
    task,out = TASKS['regression'](OPTIONS, False, 0),str(tmp_path/'r.csv')
    def go(**kw):
        calls.clear()
        command.main(tasks='regression', methods='plain,l1', seeds=1, out=out, **kw)
        return list(calls)
    assert go()==['plain','l1'] and go()==[]
    assert go(epochs=task.epochs)==['l1'] and go(epochs=7)==['plain'] and go(epochs=7)==[]
