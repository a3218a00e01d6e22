"Fits of networks and trees on the same sales, and their figures"
import numpy as np, pandas as pd, pytest
from fastai.learner import Callback
from fastai_dropconnect import compare
from fastai_dropconnect.bulldozers.data import bulldozers_pandas, encode_sales
from fastai_dropconnect.bulldozers.settings import DEFAULT_MODELS, NetSettings
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from fastai_dropconnect.compare import *
from fastai_dropconnect.nn_utils import hidden_linears
from fastai_dropconnect.recipes import RECIPES


def test_every_recipe_can_be_compared():
    assert set(RECIPES) | set(TREES) | {'ensemble'} == set(MODELS) and len(set(MODELS)) == len(MODELS)
    assert set(DEFAULT_MODELS) | set(ENSEMBLE) <= set(MODELS)

def test_settings_reach_the_recipes_that_have_them():
    s = NetSettings(weight_p=.25, sparsity=.75, cycles=3)
    for name,recipe in RECIPES.items():
        want = dict(recipe.settings)
        if name.startswith('dropconnect') or name=='resnet': want |= dict(weight_p=.25)
        if name in ('frozen-zero','free-zero'): want |= dict(sparsity=.75)
        if 'restarts' in name: want |= dict(n_cycles=3, cycle_len=2)
        assert recipe_with(name, s).settings == want

def test_the_ensemble_is_the_mean_of_its_members():
    to = bulldozers_pandas(synthetic_bulldozers(200))
    new = encode_sales(to.train, synthetic_bulldozers(5, seed=1).drop(columns='SalePrice'))
    fits = fit_models(to, ['ensemble'], [3], NetSettings(epochs=1, layers=(5,)), new)
    assert [f.model for f in fits] == ['fastai','random-forest','extra-trees','hist-gradient-boosting','ensemble']
    np.testing.assert_allclose(fits[-1].preds, np.mean([f.preds for f in fits[:-1]], axis=0))
    np.testing.assert_allclose(fits[-1].new_preds, np.mean([f.new_preds for f in fits[:-1]], axis=0))
    assert list(leaderboard(fits, ['ensemble']).model) == ['ensemble']

def hidden_zeros(learn):
    "Share of exact zeros in the weights of the hidden layers"
    return [(m.weight == 0).float().mean().item() for m in hidden_linears(learn.model).values()]

@pytest.mark.parametrize('name', RECIPES)
def test_each_network_is_what_it_is_called(name):
    to, mode = bulldozers_pandas(synthetic_bulldozers(200)), name.removeprefix('dropconnect-')
    learn = network_learner(name, to, NetSettings(layers=(8,6), weight_p=.25, sparsity=.75))
    noisy = {(m.p, m.mode) for m in learn.model.modules() if hasattr(m, 'mode') and hasattr(m, 'p') and m.p}
    if name == 'resnet': mode = 'example'
    assert noisy == ({(.25, mode)} if mode != name else set())
    zeros = []
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Callback(before_train=lambda self: zeros.extend(hidden_zeros(self.learn))))
    assert zeros == pytest.approx([.75, .75] if name in ('frozen-zero','free-zero') else [0]*len(zeros), abs=.01)
    assert getattr(learn.model, 'n_members', None) == (8 if 'masked' in name else None)
    assert (getattr(learn.model, 'num_embeds', None) is not None) == name.startswith('ple')
    if name == 'frozen-zero': assert hidden_zeros(learn) == zeros
    elif name == 'pruned': assert max(hidden_zeros(learn)) > .5
    else: assert max(hidden_zeros(learn)) < .5 # not 0: what leads to a unit that ReLU keeps at 0 does not learn

def test_sparsity_changes_the_networks_with_zeros_and_no_other():
    to = bulldozers_pandas(synthetic_bulldozers(200))
    rmse = lambda name, sparsity: fit_network(name, to, settings=NetSettings(1, layers=(8,), sparsity=sparsity)).rmse
    for name in ('fastai','frozen-zero','free-zero'): assert (rmse(name, .2) != rmse(name, .8)) == ('zero' in name), name

def test_zero_restarts_train_in_cycles_and_predict_with_the_average():
    to = bulldozers_pandas(synthetic_bulldozers(300))
    fit = lambda epochs, cycles, name='zero-restarts': fit_network(name, to, 1, settings=NetSettings(epochs, layers=(8,), cycles=cycles))
    f, other, longer = fit(1, 3), fit(2, 3), fit(1, 4)
    assert f.curve.index.tolist() == list(range(1, 7)) and len(longer.curve) == 8 and f.per_epoch == pytest.approx(f.seconds/6)
    assert f.curve.columns.tolist() == ['train_loss','valid_loss','rmse','average_loss','average_rmse']
    assert f.rmse == pytest.approx(f.curve.average_rmse[6], abs=1e-5) and abs(f.rmse-f.curve.rmse[6]) > 1e-4
    np.testing.assert_array_equal(f.preds, other.preds)
    np.testing.assert_allclose(f.learn.get_member_preds()[0].mean(1).squeeze(-1), f.preds, rtol=1e-5)
    assert fit(2, 3, 'fastai').curve.columns.tolist() == ['train_loss','valid_loss','rmse']

def test_learning_curves_show_the_average_of_zero_restarts():
    to = bulldozers_pandas(synthetic_bulldozers(200))
    fits = fit_models(to, ['fastai','zero-restarts'], [0,1], NetSettings(3, layers=(8,), cycles=2))
    lines = {l.get_label(): l.get_ydata() for l in plot_curves(fits, ['fastai','zero-restarts'], 'here').axes[0].lines}
    of = lambda m: np.mean([f.curve.get('average_rmse', f.curve.rmse).ffill() for f in fits if f.model == m], axis=0)
    for m in ('fastai','zero-restarts'): np.testing.assert_allclose(lines[m], of(m))
    assert np.isnan(lines['zero-restarts']).tolist() == [True, False, False, False]

def test_each_model_has_a_color_of_its_own(): assert len({compare._color(m) for m in MODELS}) == len(MODELS)


def test_the_epochs_of_a_single_one_are_a_whole_number():
    curve = pd.DataFrame(dict(rmse=[.3]), index=[1])
    fit = Fit('fastai', 0, np.zeros(1), .3, 1., curve=curve)
    fig = plot_curves([fit], ['fastai'], 'here')
    low,high = fig.axes[0].get_xlim()
    assert [t for t in fig.axes[0].get_xticks() if low<=t<=high] == [1]
