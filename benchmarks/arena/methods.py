"The methods by name, and why one cannot run here"
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from . import ours, outsiders


@dataclass(frozen=True)
class Method:
    fit:Callable           # (table, seed) -> predictions of the test rows
    title:str              # In tables and the figure
    package:str = None     # Optional package that it needs
    argument:str = None    # Argument that our estimators must have
    ours:bool = False      # Does it use this package?
    prepare:Callable = None    # Called before the time of a fit is taken

    @property
    def missing(self): # Why it cannot run, or `None`; imports its package, so that no fit is charged for that
        if self.argument and not ours.takes(self.argument): return f'the estimators have no argument `{self.argument}`'
        return self.package and _failure(self.package)

def _failure(package):
    try: outsiders.import_package(package)
    except ImportError as e: return f'the package {package} cannot be imported: {e}'


def _our_method(title, **settings): return Method(partial(ours.one_call, **settings), title, None, next((k for k in settings if k!='budget'), None), True, ours.compile_kernels)

METHODS = {
    'fastai': Method(ours.fastai, 'fastai, 5 epochs'),
    'ours-quick': _our_method('DropConnect, quick', budget='quick'),
    'ours': _our_method('DropConnect', budget='default'),
    'ours-best': _our_method('DropConnect, best', budget='best'),
    'ours-gbm': _our_method('DropConnect with GBM', with_gbm=True),
    'lgbm': Method(outsiders.lightgbm, 'LightGBM', 'lightgbm'),
    'xgb': Method(outsiders.xgboost, 'XGBoost', 'xgboost'),
    'catboost': Method(outsiders.catboost, 'CatBoost', 'catboost'),
    'rf': Method(outsiders.random_forest, 'random forest'),
    'realmlp': Method(outsiders.realmlp, 'RealMLP-TD', 'pytabkit'),
    'tabm': Method(outsiders.tabm, 'TabM', 'pytabkit')}

BOOSTED = ['lgbm','xgb','catboost']
