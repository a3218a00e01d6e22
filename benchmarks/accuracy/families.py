"The families of models, and what is searched for each; the first trial of each is its defaults"
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Callable
from zlib import crc32
from fastai_dropconnect.callback.batchnorm import RecalibrateBN
from fastai_dropconnect.callback.frozen_zero import FrozenZeroInit
from fastai_dropconnect.tabular.model import MaskedMembers
from .networks import fit_network, one_cycle, zero_restarts
from .spaces import Choice, Real, Whole
from .tabm_network import fit_tabm
from .trees import fit_catboost, fit_extra_trees, fit_lightgbm, fit_random_forest, fit_xgboost


@dataclass(frozen=True)
class Family:
    fit:Callable           # (table, rows, hyperparameters, seed, limits, valid=None) -> Fitted
    space:dict             # Name of each hyperparameter: what to search
    package:str = None     # Optional package that it needs
    ours:bool = False      # Has it a technique of this package?

    @property
    def fingerprint(self): return crc32(repr(self.space).encode())      # of what is searched: another space, another study
    @property
    def missing(self): return self.package is not None and find_spec(self.package) is None


_layers = ('500,250', '200,100', '256,256', '512,256,128')
_network = dict(layers=Choice(_layers), lr=Real(1e-3, 2e-2, 1e-2, log=True), wd=Real(1e-3, .3, 1e-2, log=True), quantile=Choice((False, True)))
_epochs = dict(epochs=Whole(3, 32, 10, log=True))
# Vectors of pieces come with ranks first, as TabM does
_ple = dict(quantile=Choice((True, False)), num_embed_dim=Whole(4, 24, 16), bins=Whole(8, 64, 48, log=True))
_weight_p = dict(weight_p=Real(.02, .5, .1))
_cycles = dict(n_cycles=Whole(4, 12, 8), cycle_len=Whole(1, 4, 2, log=True), sparsity=Real(0., .6, .3), embed_sparsity=Real(0., .8, .5))
# A step of eight members costs several of one network, so they are narrower
_members = dict(layers=Choice(('200,100', '256,256', '500,250')), member_sparsity=Real(.1, .8, .5))

def _dropconnect(mode): return lambda p: dict(config=dict(weight_p=p['weight_p'], mode=mode), cbs=[RecalibrateBN()])
def _masked_ensemble(p): return dict(config=dict(members=MaskedMembers(8, p['member_sparsity'])))

_networks = { # name: (what is searched beside `_network`, arguments of `tabular_learner` from the hyperparameters, how to train)
    'fastai': (_epochs, lambda p: {}, one_cycle),
    'fastai-dropout': (_epochs | dict(dropout=Real(0., .5, .1), embed_dropout=Real(0., .5, .1)),
                       lambda p: dict(config=dict(ps=p['dropout'], embed_p=p['embed_dropout'])), one_cycle),
    **{f'dropconnect-{mode}': (_epochs | _weight_p, _dropconnect(mode), one_cycle) for mode in ('example','batch','gaussian')},
    'frozen-zero': (_epochs | dict(sparsity=Real(.1, .9, .7), frozen=Choice((True, False))),
                    lambda p: dict(cbs=[FrozenZeroInit(p['sparsity'], p['frozen'])]), one_cycle),
    'zero-restarts': (_cycles, lambda p: {}, zero_restarts),
    'masked-ensemble': (_epochs | _members, _masked_ensemble, one_cycle),
    'masked-zero-restarts': (_cycles | dict(n_cycles=Whole(3, 8, 4), cycle_len=Whole(1, 8, 4, log=True)) | _members, _masked_ensemble, zero_restarts)}

def _network_family(name, ple):
    space,arguments,train = _networks[name]
    return Family(partial(fit_network, arguments=arguments, train=train), _network | space | (_ple if ple else {}), ours=ple or name not in ('fastai','fastai-dropout'))

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
