"The command's intervals: the board, the predictions, the exported Learner, and the options"
import numpy as np, pandas as pd, pytest
from fastai.learner import load_learner
from fastai_dropconnect.all import *
from fastai_dropconnect.bulldozers.data import price_features
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from fastai_dropconnect.callback.calibrate import calibration_of
from fastai_dropconnect.cli import compare_on_bulldozers, dropconnect_bulldozers

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('noise')/'out'
    board = compare_on_bulldozers(rows=1500, models='fastai masked-ensemble zero-restarts extra-trees', epochs=2, cycles=2, layers='20', bs=64,
                                  seeds=2, noise='quantile', level=.8, out=out)
    return out,board

def test_the_board_scores_the_intervals(run):
    out,board = run
    assert board.coverage.between(.72, .88).all() and (board.winkler>2*board.rmse).all()
    saved = pd.read_csv(out/'leaderboard.csv')
    np.testing.assert_allclose(saved[['coverage','winkler']], board[['coverage','winkler']], atol=1e-6)

def test_predictions_have_the_interval_of_the_best_model(run):
    out,board = run
    preds = pd.read_csv(out/'predictions.csv')
    assert (preds.lower<=preds[board.model[0]]).mean()>.95 and (preds[board.model[0]]<=preds.upper).mean()>.95
    assert ((preds.lower<=preds.SalePrice) & (preds.SalePrice<=preds.upper)).mean() == pytest.approx(.8, abs=.08)

def test_the_exported_learner_is_calibrated(run):
    learn = load_learner(run[0]/'export.pkl')
    assert (calibration_of(learn).method,calibration_of(learn).level) == ('cqr',.8)
    got = learn.predict_distribution(price_features(synthetic_bulldozers(5, seed=1).drop(columns='SalePrice')))
    assert (got.lower<got['mean']).all() and (got['mean']<got.upper).all() and 'q05' in got

def test_wrong_options(capsys, tmp_path):
    for args,text in ((['--noise','normal'],"`noise` must be"),(['--level','90'],'`level` must be')):
        assert dropconnect_bulldozers([*args, '--out', str(tmp_path/'o')])==2
        assert text in capsys.readouterr().err
