"Families of models and their search spaces; the first trial of each family is its defaults"
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from collections.abc import Callable
from zlib import crc32
from fastai_dropconnect.tabular.model import MaskedMembers
from .networks import fit_network, no_settings
from .spaces import Choice, Real, Whole
from .tabm_network import fit_tabm
from .trees import fit_catboost, fit_extra_trees, fit_lightgbm, fit_random_forest, fit_xgboost


@dataclass(frozen=True)
class Family:
    fit:Callable           # (table, rows, hyperparameters, seed, limits, valid=None) -> Fitted
    space:dict             # {name of a hyperparameter: what to search}
    package:str = None     # Optional package that it needs
    ours:bool = False      # Does it use a technique of this package?

    @property
    def fingerprint(self): return crc32(repr(self.space).encode())      # results with another search space do not count
    @property
    def missing(self): return self.package is not None and find_spec(self.package) is None


_layers = ('500,250', '200,100', '256,256', '512,256,128')
_network = dict(layers=Choice(_layers), lr=Real(1e-3, 2e-2, 1e-2, log=True), wd=Real(1e-3, .3, 1e-2, log=True), quantile=Choice((False, True)))
_epochs = dict(epochs=Whole(3, 32, 10, log=True))
# Piecewise linear embeddings try ranks first, as TabM does
_ple = dict(quantile=Choice((True, False)), num_embed_dim=Whole(4, 24, 16), bins=Whole(8, 64, 48, log=True))
_weight_p = dict(weight_p=Real(.02, .5, .1))
_cycles = dict(n_cycles=Whole(4, 12, 8), cycle_len=Whole(1, 4, 2, log=True), sparsity=Real(0., .6, .3), embed_sparsity=Real(0., .8, .5))
# A step of eight members costs several of one network, so they are narrower
_members = dict(layers=Choice(('200,100', '256,256', '500,250')), member_sparsity=Real(.1, .8, .5))

# From the hyperparameters to settings of a recipe
def _dropout_settings(p): return dict(ps=p['dropout'], embed_p=p['embed_dropout'])
def _weight_p_settings(p): return dict(weight_p=p['weight_p'])
def _zero_settings(p): return dict(sparsity=p['sparsity'], mask_grads=p['frozen'])
def _restart_settings(p): return dict(restart_sparsity=p['sparsity'], embed_sparsity=p['embed_sparsity'])
def _member_settings(p): return dict(members=MaskedMembers(8, p['member_sparsity']))
def _member_restart_settings(p): return _restart_settings(p) | _member_settings(p)

_dropout = dict(dropout=Real(0., .5, .1), embed_dropout=Real(0., .5, .1))
_zeros = dict(sparsity=Real(.1, .9, .7), frozen=Choice((True, False)))
_few_cycles = dict(n_cycles=Whole(3, 8, 4), cycle_len=Whole(1, 8, 4, log=True))

_networks = { # name: (recipe, what is searched beside `_network`, settings of the recipe)
    'fastai': ('fastai', _epochs, no_settings),
    'fastai-dropout': ('fastai', _epochs | _dropout, _dropout_settings),
    **{name: (name, _epochs | _weight_p, _weight_p_settings) for name in ('dropconnect-example','dropconnect-batch','dropconnect-gaussian')},
    'frozen-zero': ('frozen-zero', _epochs | _zeros, _zero_settings),
    'zero-restarts': ('zero-restarts', _cycles, _restart_settings),
    'masked-ensemble': ('masked-ensemble', _epochs | _members, _member_settings),
    'masked-zero-restarts': ('zero-restarts', _cycles | _few_cycles | _members, _member_restart_settings)}

def _network_family(name, ple):
    recipe,space,settings = _networks[name]
    ours = ple or name not in ('fastai','fastai-dropout')
    return Family(partial(fit_network, recipe=recipe, settings=settings), _network | space | (_ple if ple else {}), ours=ours)

_boost = dict(lr=Real(.01, .3, .05, log=True), l2=Real(1e-3, 30., 1., log=True))
_sampled = dict(subsample=Real(.5, 1., .8), columns=Real(.3, 1., .8), native_categories=Choice((False, True)))
_forest = dict(trees=Whole(300, 300, 300), min_rows=Whole(1, 20, 3, log=True), columns=Real(.15, 1., .5))
# TabM's default width is 512: too slow for a CPU here, so at most 256
_tabm = dict(lr=Real(1e-4, 5e-3, 2e-3, log=True), wd=Real(1e-5, .1, 3e-4, log=True), quantile=Choice((True, False)), n_blocks=Whole(1, 4, 3),
             d_block=Whole(64, 256, 128), dropout=Real(0., .5, .1))

FAMILIES = {
    **{name+suffix: _network_family(name, ple) for name in _networks for suffix,ple in (('',False), ('+ple',True))},
    'lightgbm': Family(fit_lightgbm, _boost | _sampled | dict(leaves=Whole(8, 255, 31, log=True), min_rows=Whole(2, 100, 20, log=True)), 'lightgbm'),
    'xgboost': Family(fit_xgboost, _boost | _sampled | dict(depth=Whole(3, 12, 6), min_weight=Real(.5, 50., 1., log=True)), 'xgboost'),
    'catboost': Family(fit_catboost, _boost | dict(depth=Whole(4, 10, 6), bagging=Real(0., 1., 1.), noise=Real(0., 2., 1.)), 'catboost'),
    'random-forest': Family(fit_random_forest, _forest),
    'extra-trees': Family(fit_extra_trees, _forest),
    'tabm': Family(fit_tabm, _tabm, 'tabm'),
    'tabm+ple': Family(fit_tabm, _tabm | _ple, 'tabm')}
