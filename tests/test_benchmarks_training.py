"The benchmark of training: fair turns, ratios within a round, aims at the right rows"
import sys
from pathlib import Path
import pandas as pd, pytest

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import training


def test_jobs_take_turns_and_warm_up_once():
    order,now = [],[0.]
    def job(name, took): return lambda: (order.append(name), now.__setitem__(0, now[0]+took))
    times = training.in_rounds(dict(plain=job('p', 6.), exact=job('e', 2.), example=job('x', 3.)), 3, lambda: (now[0], 0.))
    assert ''.join(order) == 'pex'+'pex'+'exp'+'xpe'
    assert times == dict(plain=[6.]*3, exact=[2.]*3, example=[3.]*3)


def test_ratios_are_medians_within_a_round():
    res = training.compared(dict(plain=[4.,8.,60.], exact=[2.,2.,20.]), 2)
    assert res == dict(ms_plain=4000., ms_exact=1000., exact=3.)


def test_aims():
    rows = [('epoch','[200,100]',64), ('epoch','[200,100]',128), ('epoch, real sales','[500,250]',128), ('epoch, real sales','[500,250]',1024),
            ('members, eight','[200,100]',64), ('get_preds of 9 rows','[200,100]',64), ('predict of a row','[200,100]',64)]
    df = training.with_aims(pd.DataFrame(rows, columns=['case','layers','bs']))
    assert df.aim_exact.fillna(0).tolist() == [3,0,2.7,0,6.25,15,0]
    assert df.aim_example.fillna(0).tolist() == [2.2,0,1.3,0,0,0,0]


def test_members_are_compared_with_eight_networks(monkeypatch):
    monkeypatch.setattr(training, 'in_rounds', lambda jobs, rounds, clock: {name: [2.] for name in jobs})
    res = training.members(training.made_up_pandas(128, 64), (4,), 64, 1)
    assert (res['exact'], res['ms_plain'], res['ms_exact']) == (8., 8e3, 1e3)


@pytest.mark.slow
def test_a_quick_run(tmp_path, capsys):
    training.main(quick=True, out=str(tmp_path), data='missing.csv')
    df = pd.read_csv(tmp_path/'training.csv', comment='#')
    assert list(df.case) == ['epoch','epoch, synthetic sales','members, eight','predict of a row','get_preds of 600 rows'] and (df.exact>0).all() and 'aims missed' in capsys.readouterr().out
