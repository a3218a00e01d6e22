"The search on the validation rows, with the same number of trials for each family; it continues where it stopped"
import math
from pathlib import Path
import numpy as np
from sklearn.metrics import roc_auc_score, root_mean_squared_error
from .families import Family
from .spaces import Limits, defaults, suggest
from .tables import Table

STARTUP = 5     # Trials at random (the first is the defaults) before TPE learns from them


def score(
    table:Table,
    target:np.ndarray, # Numbers, or 0 and 1
    preds:np.ndarray # From `Fitted.predict`
) -> float:
    "Compute RMSE or AUC, or the worst possible value for predictions that are not finite"
    if not np.isfinite(preds).all(): return math.inf if table.lower_is_better else 0.
    return float((roc_auc_score if table.classes else root_mean_squared_error)(target, preds))


def _objective(family, table, seed, limits, trial):
    fitted = family.fit(table, table.train, suggest(family.space, trial), seed, limits, valid=table.valid)
    trial.set_user_attr('found', fitted.found or {})
    return score(table, table.valid[table.target].to_numpy(), fitted.predict(table.valid))


def _study(name, table, path):
    import optuna      # optional
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))        # several processes may share it
    return optuna.create_study(study_name=name, storage=storage, load_if_exists=True, direction='minimize' if table.lower_is_better else 'maximize')

def _done(study): return sum(t.state.name=='COMPLETE' for t in study.trials)

def _next_trial(study, family, seed):
    "Set a sampler seeded by the number of finished trials, so that an interrupted search makes the same trials"
    from optuna.samplers import TPESampler
    n = _done(study)
    study.sampler = TPESampler(seed=1000*seed+n, n_startup_trials=STARTUP)
    if n==0 and not any(t.state.name=='WAITING' for t in study.trials): study.enqueue_trial(defaults(family.space))


def search(
    family:Family,
    table:Table, # Without test rows
    trials:int, # Total number of trials, earlier ones included; 0 takes the defaults without a search
    seed:int, # Seed of the sampler and of each fit
    limits:Limits,
    name:str, # Name of the study: everything that its results depend on
    path, # Journal file of the studies
    say=lambda text: None # Called with the progress
) -> tuple: # Hyperparameters, validation score
    "Find the best hyperparameters of a family"
    if not trials: return defaults(family.space),math.nan
    study = _study(name, table, path)
    for n in range(_done(study), trials):
        _next_trial(study, family, seed)
        study.optimize(lambda trial: _objective(family, table, seed, limits, trial), n_trials=1)
        say(f'trial {n+1} of {trials}, best {study.best_value:.4f}')
    best = study.best_trial
    return {**defaults(family.space), **best.params, **best.user_attrs['found']},best.value
