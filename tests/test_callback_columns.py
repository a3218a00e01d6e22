"Columns of the average in the table of a fit"
import contextlib, io
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
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
