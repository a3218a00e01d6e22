"How to make a network small: each method returns the callbacks of a fit; `target` is how many times fewer weights there shall be"
from dataclasses import dataclass
from functools import partial
from fastai.basics import SGD
from torch import nn
from fastai_dropconnect.callback.frozen_zero import FrozenZeroInit
from fastai_dropconnect.callback.gates import FeatureGates
from fastai_dropconnect.callback.hard_concrete import HardConcrete
from fastai_dropconnect.callback.penalty import GroupLasso
from fastai_dropconnect.callback.prune import GradualPruning
from fastai_dropconnect.callback.variational import VariationalDropConnect


@dataclass(frozen=True)
class Method:
    "A method, with what it changes of a task"
    cbs:object             # function of (target, settings) that returns callbacks
    targets:bool=True      # does it reach a number that is asked for?
    settings:dict=None     # arguments, by task; `None` holds for all others
    opt:object=None        # function that makes the optimizer
    changes:dict=None      # fields of the task, by task
    only:tuple=None        # tasks that it is for; `None`: all

    def of(self, task): # Its settings for a task
        return (self.settings or {}).get(None, {}) | (self.settings or {}).get(task, {})


TABLES = 'adult','california','bulldozers'

def has_weights(name, module): return isinstance(module, (nn.Linear,nn.Conv2d))
sgd = partial(SGD, mom=0.)

# from the literature; benchmarks/results/README.md tells what was tried on validation rows
METHODS = {
    'plain': Method(lambda target, s: [], False),
    'l1': Method(lambda target, s: [GroupLasso(0., 0., **s)], False, {None: dict(l1=1e-4, threshold=.01), 'regression': dict(l1=.02)}),
    'dropneuron': Method(lambda target, s: [GroupLasso(**s)], False,
                         {None: dict(li=5e-5, lo=5e-5, l1=1e-4, threshold=.01), 'regression': dict(li=.01, lo=.01, l1=.01),
                          'autoencoder': dict(li=1e-6, lo=1e-6, l1=1e-6, threshold=.01)}),
    'proximal': Method(lambda target, s: [GroupLasso(proximal=True, threshold=0., **s)], False, {None: dict(li=.05, lo=.05, l1=.05)}, sgd,
                       {'regression': dict(lr=.02)}, ('regression',)),
    'pruned': Method(lambda target, s: [GradualPruning(target, **s)]),
    'structured': Method(lambda target, s: [GradualPruning(target, structured=True, **s)]),
    'shrinking': Method(lambda target, s: [GradualPruning(target, **s)], True, {None: dict(regrow=0)}),
    'sparsevd': Method(lambda target, s: [VariationalDropConnect(layers=has_weights, **s)], False),
    'hardconcrete': Method(lambda target, s: [HardConcrete(layers=has_weights, per='input', **s)], False, {None: dict(price=.2)}),
    'gates': Method(lambda target, s: [FeatureGates(**s)], False, {None: dict(price=300)}, only=TABLES),
    'frozen': Method(lambda target, s: [FrozenZeroInit(1-1/target, layers=has_weights, rescale=True)]),
}

# how many times fewer weights are asked for
TARGETS = {'lenet300': [10,30,68,100], 'lenet5': [50,100,200], 'autoencoder': [5.1,8], 'regression': [35],
           'california': [5,25], 'adult': [14,75], 'bulldozers': [5,23]}
