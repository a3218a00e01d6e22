"Pictures of calibration: what is drawn, on few rows and for odd Learners"
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from fastai.tabular.all import CategoryBlock, Categorify, FillMissing, Normalize, TabularDataLoaders, set_seed
from conftest import make_dls, make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import distribution      # noqa: F401, gives every Learner `predict_distribution`
from fastai_dropconnect.callback.show_calibration import equal_groups, share_error

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def fitted(**kwargs):
    set_seed(0)
    learn = tabular_learner(make_dls(make_table(120), bs=16), layers=[8], **kwargs)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    return learn

@pytest.mark.parametrize('kwargs', [dict(noise='quantile'), dict(noise='gaussian', config=tabular_dropconnect_config(members=2)), dict()])
def test_what_is_drawn_for_numbers(kwargs):
    learn = fitted(**kwargs)
    if not kwargs: learn.calibrate(level=.8)
    axs = learn.show_calibration()
    assert axs.shape==(2,3)
    observed = axs[0,0].lines[1].get_ydata()
    assert (np.diff(observed)>=0).all() and 0<=observed[0] and observed[-1]<=1
    heights = [p.get_height() for p in axs[0,1].patches[:10]]
    assert sum(heights)==pytest.approx(10, abs=1e-6)       # of a density over ten bins
    assert axs[0,2].lines[0].get_ydata()[0]==(.9 if kwargs else .8)

def test_coverage_is_that_of_the_interval():
    learn = fitted(noise='quantile')
    learn.calibrate()
    df = make_table(120).iloc[96:]
    axs = learn.show_calibration(df, by='b')
    frame = learn.predict_distribution(df)
    inside = ((frame.lower<=df.y) & (df.y<=frame.upper)).to_numpy()
    drawn = axs[1,0].lines[1].get_ydata()
    assert drawn.tolist()==pytest.approx([inside[g].mean() for g in equal_groups(df.b.to_numpy(), 8)])

@pytest.mark.parametrize('n', [1, 2, 7])
@pytest.mark.parametrize('by', [None,'day','color'])
def test_few_rows_and_periods_of_any_type(n, by):
    learn = fitted(noise='gaussian')
    df = make_table(n).assign(day=pd.date_range('2011-01-01', periods=n), color='red')
    assert len(learn.show_calibration(df, by=by)[1,0].lines)>0

@pytest.mark.parametrize('n_classes', [2, 3])
def test_what_is_drawn_for_classes(n_classes):
    df = make_table(120)
    df['y'] = pd.qcut(df.y, n_classes, labels=[f'c{i}' for i in range(n_classes)]).astype(str)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['color','code'], cont_names=['a','b'],
                                     y_names='y', y_block=CategoryBlock(), valid_idx=range(80, 120), bs=16)
    learn = tabular_learner(dls, layers=[8])
    assert learn.show_calibration().shape==(2,)
    learn.calibrate()
    assert [t.get_text() for t in learn.show_calibration()[0].get_legend().texts]==['as predicted','calibrated']

def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match='call `learn.calibrate` first'): fitted().show_calibration()
    with pytest.raises(ValueError, match="'y'"): fitted(noise='quantile').show_calibration(make_table(20).drop(columns='y'))
    with pytest.raises(ValueError, match="'day'"): fitted(noise='quantile').show_calibration(make_table(20), by='day')

def test_errors_of_shares():
    rng = np.random.default_rng(0)
    shares = rng.binomial(200, .9, 2000)/200
    assert .91 < (np.abs(shares-.9)<=share_error(shares, np.full(2000, 200))).mean() < .98
    assert share_error(np.array([1.]), np.array([50]))[0]>0

def test_groups_are_those_of_the_rows_with_and_without_a_frame():
    set_seed(0)
    df = make_table(600)
    learn = tabular_learner(make_dls(df), layers=[8], noise='quantile')
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    learn.calibrate(group='color', df=df)
    cal = learn.keep_calibration.record.value
    for i,k in enumerate(cal.group_q): cal.group_q[k] += i
    widths = (lambda f: (f.upper-f.lower).mean())(learn.predict_distribution(df[480:]))
    for kwargs in (dict(), dict(df=df[480:])):
        drawn = learn.show_calibration(**kwargs)[1,1].get_legend().texts[0].get_text()
        assert drawn==f'mean {widths:.3g}', kwargs
    with pytest.raises(ValueError, match=r"\['color'\] are missing"): learn.show_calibration(df.drop(columns='color'))


@pytest.mark.parametrize('noise', ['mixture',None])
def test_each_target_has_pictures_of_its_own(noise):
    df = make_table(300).assign(z=lambda d: 1e3*d.b-d.y)
    set_seed(0)
    learn = tabular_learner(make_dls(df, ['y','z']), layers=[8], noise=noise)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
    learn.calibrate(.8)
    new = make_table(200, seed=1).assign(z=lambda d: 1e3*d.b-d.y)
    frame = learn.predict_distribution(new)
    for target,name in ((0,'y'), ('y','y'), (np.int64(1),'z'), ('z','z')):
        axs = learn.show_calibration(new, by='b', target=target)
        inside = ((frame[f'{name}_lower']<=new[name]) & (new[name]<=frame[f'{name}_upper'])).to_numpy()
        drawn = axs[1,0].lines[1].get_ydata().tolist()
        assert drawn==pytest.approx([inside[g].mean() for g in equal_groups(new.b.to_numpy(), 8)])
        assert [ax.get_title().startswith(f'{name}: ') for ax in axs.flat]==[True]*6
    assert fitted(noise='gaussian').show_calibration()[0,1].get_title()=='PIT'
    for wrong in (2, -1, 'x', True, 1., None):
        with pytest.raises(ValueError, match='`target` must be one of.*got target='): learn.show_calibration(target=wrong)
