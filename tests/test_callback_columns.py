"Columns of the average in the table of a fit"
import contextlib, pickle
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.tabular.all import (Callback, CancelEpochException, CrossEntropyLossFlat, CSVLogger, EarlyStoppingCallback,
                                F1Score, Metric, R2Score, ReduceLROnPlateau, SaveModelCallback, mae)
from fastcore.foundation import L
from ensemble_learners import *
from fastai_dropconnect.all import *

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


def test_the_table_shows_each_snapshot_and_the_average():
    learn = make_learn(metrics=mae)
    learn.fit_zero_restarts(3, 2)
    names = learn.recorder.metric_names
    assert list(names) == ['epoch','train_loss','valid_loss','mae','average_loss','average_mae','time']
    rows = pd.DataFrame(list(learn.recorder.values), columns=names[1:-1])
    assert rows.average_loss.isna().tolist() == [True,False]*3 and rows.average_loss[1]!=rows.average_loss[3]
    assert abs(rows.valid_loss[3]-rows.average_loss[3])>1e-4                 # `valid_loss` is that of the network
    report = ensemble(learn).report()
    assert report.index.tolist()==[0,1,2] and report.valid_loss.tolist()==rows.valid_loss[1::2].tolist()
    assert report.average_mae.iloc[0] == pytest.approx(report.mae.iloc[0])
    for c in range(3):
        with ensemble(learn).using(c): assert list(learn.validate()) == pytest.approx(report.loc[c, ['valid_loss','mae']].tolist(), rel=1e-4)
    assert list(learn.validate()) == pytest.approx(report.loc[2, ['average_loss','average_mae']].tolist(), rel=1e-4)
    assert len(learn.metrics)==1


class Absolute:
    "A metric's own object, which keeps what it has seen"
    def __init__(self): self.reset()
    def reset(self): self.total,self.n = 0.,0


class Keeps(Metric):
    name = 'keeps'
    def __init__(self, learn): self.kept,self.learn = Absolute(),learn
    def reset(self): self.kept.reset()
    def accumulate(self, learn):
        assert learn is self.learn          # a copy of the metric has no copy of the Learner
        self.kept.total += (learn.pred-learn.y).abs().sum().item()
        self.kept.n += len(learn.y)
    @property
    def value(self): return self.kept.total/self.kept.n if self.kept.n else None


def test_metrics_that_keep_objects():
    learn = make_learn(metrics=mae)
    learn.metrics = [*learn.metrics, Keeps(learn)]
    learn.fit_zero_restarts(3, 1)
    report = ensemble(learn).report()
    np.testing.assert_allclose(report.keeps, report.mae, rtol=1e-5)
    np.testing.assert_allclose(report.average_keeps, report.average_mae, rtol=1e-5)
    assert (report.keeps!=report.average_keeps).tolist()==[False,True,True]


def test_metrics_of_several_numbers(tmp_path):
    learn = make_learn(dls=data(target=classes), model=make_model(3), loss_func=CrossEntropyLossFlat(), metrics=F1Score(average=None), path=tmp_path)
    learn.fit_zero_restarts(3, 1, path='snaps')
    report = ensemble(learn).report()
    want = learn.validate()[1]
    assert len(want)==3 and report.average_f1_score[2]==pytest.approx(list(want)) and all(len(v)==3 for v in report.f1_score)
    learn.save('m')
    again = make_learn(SnapshotEnsemble(), dls=learn.dls, model=make_model(3), loss_func=CrossEntropyLossFlat(), path=tmp_path).load('m')
    assert ensemble(again).report().equals(report)


@pytest.mark.parametrize('event', ['before_epoch','before_train'])
@pytest.mark.parametrize('order', [-20, 0])
def test_an_epoch_that_is_skipped_changes_no_row(event, order):
    def skip(self):
        if self.learn.epoch==1: raise CancelEpochException
    Skip = type('Skip', (Callback,), {'order': order, event: skip})
    learn = make_learn(Skip(), metrics=mae)
    learn.fit_zero_restarts(3, 1)
    assert list(ensemble(learn).record)==[0,2] and list(ensemble(learn).report().index)==[0,2]
    assert ensemble(learn).report().notna().all(axis=None)


def test_other_callbacks_see_the_columns(tmp_path):
    learn = make_learn(path=tmp_path)
    with contextlib.redirect_stdout(None):
        learn.fit_zero_restarts(3, 1, cbs=[CSVLogger(), SaveModelCallback(monitor='average_loss', fname='best')])
    assert 'average_loss' in pd.read_csv(tmp_path/'history.csv')
    best = ensemble(learn).report().average_loss.idxmin()
    assert list(ensemble(learn).record)==list(range(best+1)) and ensemble(learn).use=='average'


class Bf16(MixedPrecision):
    "MixedPrecision on the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False),L()


def test_mixed_precision_with_a_metric_of_numpy():
    learn = make_learn(Bf16(), metrics=R2Score())
    learn.fit_zero_restarts(2, 1)
    assert learn.validate()[1] == pytest.approx(ensemble(learn).report().average_r2_score[1], rel=1e-3)


def fitted(*cbs, cycle_len=2, n_cycles=3, **kw):
    learn = make_learn(**kw)
    with contextlib.redirect_stdout(None): learn.fit_zero_restarts(n_cycles, cycle_len, cbs=cbs, seed=1)
    return learn

class Losses(Callback):
    "Let the loss of the average at the end of each cycle be one of `values`"
    def __init__(self, *values): self.values = values
    def before_fit(self):
        column = next((m for m in self.learn.metrics if m.name=='average_loss'), None)
        if column is not None: column.metric = FixedLoss(self.values)

class FixedLoss(Metric):
    name = 'loss'
    def __init__(self, values): self.values = iter(values)
    @property
    def value(self): return next(self.values)

def test_cells_without_news_are_empty_in_the_table_and_in_files(tmp_path):
    shown = []
    learn = make_learn(path=tmp_path)
    learn.logger = shown.append
    learn.fit_zero_restarts(2, 2, cbs=CSVLogger())
    cells = [[f'{v:.6f}' if isinstance(v, float) else str(v) for v in row] for row in shown]      # as fastai writes them
    assert [row[3]=='' for row in cells] == [True,False,True,False]
    lines = (tmp_path/'history.csv').read_text().splitlines()
    assert [line.split(',')[3]=='' for line in lines[1:]] == [True,False,True,False]
    assert pd.read_csv(tmp_path/'history.csv').average_loss.isna().tolist() == [True,False,True,False]


def test_the_recorder_plots_and_pickles_with_empty_cells():
    learn = fitted()
    values = pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1])
    assert values.dtypes.eq(float).all() and values.average_loss.isna().tolist() == [True,False]*3
    learn.recorder.plot_loss()
    again = pickle.loads(pickle.dumps(list(learn.recorder.values)))
    assert str(again[0][2])=='' and again[1]==list(learn.recorder.values[1])


def test_early_stopping_on_the_average_counts_cycles():
    stop = lambda patience: fitted(Losses(.5, .4, .6, .3, .6, .7), EarlyStoppingCallback('average_loss', patience=patience), n_cycles=6)
    assert list(ensemble(stop(1)).record)==[0,1,2]
    assert list(ensemble(stop(2)).record)==[0,1,2,3,4,5]
    learn = stop(1)
    assert len(learn.recorder.values)==6 and ensemble(learn).use=='average' and len(learn.metrics)==0


def test_early_stopping_on_the_network_counts_epochs():
    class Worse(Callback):
        "Let each epoch of the network be worse than the one before"
        order = 55
        def after_epoch(self): self.learn.recorder.values[-1][1] = float(len(self.learn.recorder.values))
    learn = fitted(Worse(), EarlyStoppingCallback('valid_loss', patience=1))
    assert len(learn.recorder.values)==2 and list(ensemble(learn).record)==[0]


def test_the_best_average_is_saved(tmp_path):
    learn = fitted(Losses(.5, .2, .6), SaveModelCallback('average_loss', fname='best'), path=tmp_path)
    assert list(ensemble(learn).record)==[0,1] and ensemble(learn).use=='average'
    each,_ = learn.get_member_preds()
    torch.testing.assert_close(preds(learn), each.mean(1))


def test_the_best_network_is_saved_with_the_snapshots_before_it(tmp_path):
    class Best(Callback):
        "Let the fourth epoch be the best of the network"
        order = 55
        def after_epoch(self): self.learn.recorder.values[-1][1] = float(len(self.learn.recorder.values)!=4)
    learn = fitted(Best(), SaveModelCallback('valid_loss', fname='best'), path=tmp_path)
    assert list(ensemble(learn).record)==[0,1]


def test_the_learning_rate_falls_after_cycles_without_progress():
    class Rates(Callback):
        order = 70
        def before_fit(self): self.rates = []
        def after_epoch(self): self.rates.append(self.opt.hypers[-1]['lr'])
    plateau = ReduceLROnPlateau('average_loss', patience=1)
    learn = make_learn(ZeroRestarts(2), rates := Rates(), Losses(.5, .6, .7), plateau)
    with contextlib.redirect_stdout(None): learn.fit(6, 1e-2)
    assert rates.rates == pytest.approx([1e-2]*3+[1e-3]*2+[1e-4])


@pytest.mark.parametrize('at_end', [False,True])
def test_saving_each_epoch_or_at_the_end_ignores_empty_cells(tmp_path, at_end):
    fitted(SaveModelCallback('average_loss', every_epoch=not at_end, at_end=at_end), path=tmp_path)
    names = sorted(f.stem for f in (tmp_path/'models').iterdir())
    assert names == (['model'] if at_end else [f'model_{i}' for i in range(6)])


def test_watching_callbacks_run_again_after_an_interruption():
    stop = EarlyStoppingCallback('valid_loss', patience=100)
    watch = EarlyStoppingCallback('average_loss', patience=100)
    learn = make_learn(ZeroRestarts(2), stop)
    with contextlib.suppress(KeyboardInterrupt): learn.fit_zero_restarts(3, 2, cbs=[watch,StopAt(3)])
    assert watch.run and stop.run and not len(learn.metrics)
