"The made-up sales: columns, types, seeds, noise and gaps"
import random
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai_dropconnect.bulldozers import synthetic
from fastai_dropconnect.bulldozers.data import read_bulldozers
from fastai_dropconnect.bulldozers.synthetic import *

REAL = Path(__file__).parents[2]/'shared'/'data'/'bulldozers'
needs_real = pytest.mark.skipif(not (REAL/'TrainAndValid.csv').exists(), reason=f'Kaggle\'s file is not at {REAL}')


@pytest.fixture(scope='module')
def sales(): return synthetic_bulldozers(1500, seed=3)


def test_synthetic_has_kaggles_columns_and_types(sales):
    assert list(sales.columns) == list(KAGGLE_COLUMNS.index) and len(KAGGLE_COLUMNS) == 53
    assert sales.SalePrice.dtype == sales.YearMade.dtype == float and sales.saledate.dtype == 'datetime64[ns]'
    assert sales.ProductSize.cat.ordered and list(sales.ProductSize.cat.categories) == MACHINE_SIZES
    for c in columns_of('id', 'code', 'category'): assert sales[c].dropna().map(lambda v: isinstance(v, str)).all(), c
    assert (sales.SalePrice > 0).all() and sales.SalesID.is_unique

def test_synthetic_depends_on_the_seed_only_and_leaves_global_randomness_alone():
    np.random.seed(5); random.seed(5); torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    first = synthetic_bulldozers(200, seed=8)
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()
    assert (before[0] == after[0]).all() and before[1] == after[1] and torch.equal(before[2], after[2])
    np.random.seed(6)
    pd.testing.assert_frame_equal(first, synthetic_bulldozers(200, seed=8))
    assert not first.equals(synthetic_bulldozers(200, seed=9))

def test_synthetic_noise_is_what_it_says(sales, monkeypatch):
    monkeypatch.setattr(synthetic, 'SYNTHETIC_NOISE', 0.)
    noise = np.log(sales.SalePrice) - np.log(synthetic_bulldozers(1500, seed=3).SalePrice)
    assert noise.std() == pytest.approx(SYNTHETIC_NOISE, rel=.06) and abs(noise.mean()) < .015

def test_synthetic_gaps_follow_the_kind_of_machine(sales):
    for c in KAGGLE_COLUMNS.index[KAGGLE_COLUMNS.groups.str.len() > 0]:
        has = sales.ProductGroup.isin(KAGGLE_COLUMNS.groups[c])
        assert sales[c][~has].isna().all() and sales[c][has].notna().mean() > .9, c
    assert (sales.YearMade == 1000).mean() == pytest.approx(.1, abs=.03)
    assert (sales.MachineHoursCurrentMeter == 0).mean() == pytest.approx(.1, abs=.03)

@pytest.mark.parametrize('n', [1, 2, 7])
def test_synthetic_takes_any_size(n, tmp_path):
    df,path = synthetic_bulldozers(n, seed=1),tmp_path/'a.csv'
    df.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_bulldozers(path), df)

@pytest.mark.parametrize('kw,error,name', [(dict(n=0), ValueError, 'n=0'), (dict(n=2.), TypeError, 'n=2.0'), (dict(n=True), TypeError, 'n=True'),
    (dict(seed=-1), ValueError, 'seed=-1'), (dict(seed='x'), TypeError, "seed='x'")])
def test_synthetic_checks_its_arguments(kw, error, name):
    with pytest.raises(error, match=f'got {name}'): synthetic_bulldozers(**{'n': 5, **kw})


def test_column_types_leave_the_given_frame_alone():
    raw = pd.DataFrame(dict(saledate=['2006-11-16'], ProductSize=['Small'], SalePrice=[9500], state=[None]))
    before = raw.copy()
    typed = with_column_types(raw)
    pd.testing.assert_frame_equal(raw, before)
    assert typed.saledate[0] == pd.Timestamp('2006-11-16') and typed.SalePrice.dtype == float
    assert typed.ProductSize.cat.ordered and typed.state.isna().all()


# --- beside Kaggle's own file, where it is at hand

@needs_real
def test_synthetic_gaps_resemble_the_real_ones():
    real, made = read_bulldozers(REAL/'TrainAndValid.csv'), synthetic_bulldozers(3000)
    far = (real.isna().mean() - made.isna().mean()).abs()
    assert far.max() < .3 and far.mean() < .08, far.nlargest(5)
