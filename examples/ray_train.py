"""Train one network by Ray Train, and choose a recipe and its settings by Ray Tune, on a cluster or on this machine:

pip install 'fastai_dropconnect[ray]'
python examples/ray_train.py
"""
import os, sys, tempfile
from pathlib import Path

EXAMPLES = str(Path(__file__).parent)


def train_worker(config:dict) -> dict:
    "Run the training function of `examples/distributed.py`, as each worker of Ray Train does"
    from distributed import train
    return train(**config)


def train_on_ray(n_workers:int=2, use_gpu:bool=False, **config) -> dict: # What rank 0 returns
    "Train one network on several workers"
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    trainer = TorchTrainer(train_worker, train_loop_config=config,
                           scaling_config=ScalingConfig(num_workers=n_workers, use_gpu=use_gpu),
                           run_config=RunConfig(storage_path=tempfile.mkdtemp()))
    return trainer.fit().return_value


def score_recipe(config:dict):
    "Report how good a recipe is with some settings, as a trial of Ray Tune"
    from distributed import make_table
    from fastai.tabular.all import Categorify, Normalize, RandomSplitter, TabularPandas, rmse
    from fastai_dropconnect.all import choose_recipe, fast_dataloaders
    from ray import tune
    to = TabularPandas(make_table(config['n_rows']), procs=[Categorify,Normalize], cat_names=['shop'],
                       cont_names=['visitors'], y_names='takings', splits=RandomSplitter(seed=0)(range(config['n_rows'])))
    choice = choose_recipe(fast_dataloaders(to, bs=64), [config['recipe']], epochs=config['epochs'], lr=config['lr'],
                           seeds=config['seeds'], metrics=rmse, layers=[50,20], verbose=False)
    tune.report(choice.table.iloc[0][['loss','rmse','sd']].astype(float).to_dict())


def tune_recipes(recipes:list, lrs:list, n_rows:int=3000, epochs:int=5, seeds:int=2): # Results, one for each trial
    "Try recipes and learning rates in parallel"
    from ray import tune
    space = dict(recipe=tune.grid_search(recipes), lr=tune.grid_search(lrs), n_rows=n_rows, epochs=epochs, seeds=seeds)
    return tune.Tuner(score_recipe, param_space=space, tune_config=tune.TuneConfig(metric='loss', mode='min'),
                      run_config=tune.RunConfig(storage_path=tempfile.mkdtemp())).fit()


def start_ray(**kwargs):
    "Start Ray on this machine, or join the cluster at `address`; its workers find this folder"
    import ray
    ray.init(runtime_env=dict(env_vars=dict(PYTHONPATH=os.pathsep.join([EXAMPLES, *sys.path]))), **kwargs)


if __name__=='__main__':
    start_ray()
    print(train_on_ray())
    results = tune_recipes(['fastai','dropconnect-example'], [1e-2,3e-3])
    print(results.get_dataframe()[['config/recipe','config/lr','loss','rmse','sd']])
    print(results.get_best_result().config)
