"The benchmarks of large tables: what is written is what is claimed"
import sys
from pathlib import Path
import numpy as np, pandas as pd, pytest

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import growth, large


def test_the_power_of_growth():
    found = [dict(loader='fast', rows=n, cpu_seconds=3e-5*n, added_mb=n**.5) for n in (10,100,1000)]
    assert growth.slope(found, 'fast', 'cpu_seconds')==pytest.approx(1) and growth.slope(found, 'fast', 'added_mb')==pytest.approx(.5)
    assert np.isnan(growth.slope(found, 'fastai', 'added_mb'))


def test_made_up_rows_have_40_columns_and_gaps(tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    large.make(tmp_path/'t.parquet', 3000, 0, '')
    df = pq.read_table(tmp_path/'t.parquet').to_pandas()
    assert df.shape==(3000,41) and list(df)==[*large.CATS, *large.CONTS, 'y']
    assert df[large.CATS].nunique().tolist()==large.LEVELS
    assert (df[['x0','x1','x2']].isna().mean().between(.003, .03)).all() and df.x5.notna().all() and df.y.notna().all()


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    pytest.importorskip('pyarrow')
    large.main(rows=3000, bs=256, mode='batch', folder=str(tmp_path), out=str(tmp_path))
    df = pd.read_csv(tmp_path/'large.csv', comment='#')
    assert list(df.phase)==['make','encode','train'] and (df.peak_mb>df.anonymous_mb).all() and (df.rows_per_cpu_second>0).all()
    assert [f.name for f in tmp_path.iterdir()]==['large.csv']          # its own files are deleted
