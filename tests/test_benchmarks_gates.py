import pandas as pd, pytest
pytest.importorskip('sklearn')
from benchmarks import gates
from benchmarks.accuracy.tables import Options


def test_noise_is_the_same_for_a_seed_and_says_nothing():
    df = pd.DataFrame(dict(a=range(500)))
    noisy = gates.with_noise(df, 1)
    assert list(df)==['a'] and sum(c.startswith('noise_cat') for c in noisy)==5==sum(c.startswith('noise_cont') for c in noisy)
    pd.testing.assert_frame_equal(noisy, gates.with_noise(df, 1))
    assert [noisy[f'noise_cat{i}'].nunique() for i in range(5)]==[*gates.LEVELS] and abs(noisy.noise_cont0.corr(noisy.a))<.2


def test_a_line_is_computed_once_and_the_report_names_the_chosen_price(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gates, 'PRICES', (0,50))
    lines = gates.Lines(tmp_path/'g.csv')
    kw = dict(gates={}, epochs=1, bs=32, lr=1e-2)
    gates.study('bulldozers', True, 1, lines, Options(rows=300), **kw)
    n = len(lines.known)
    assert n in (4,5) and len(pd.read_csv(tmp_path/'g.csv'))==n     # two to choose, two or three to test
    monkeypatch.setattr(gates, 'line', lambda *args, **kw: pytest.fail('computed again'))
    gates.study('bulldozers', True, 1, gates.Lines(tmp_path/'g.csv'), Options(rows=300), **kw)
    gates.report(tmp_path/'g.csv')
    out = capsys.readouterr().out
    assert out.count(' chosen')==1 and out.count('of noise')==n-2
