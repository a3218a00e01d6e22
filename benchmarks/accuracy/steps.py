"""What inputs and members add, one step after the other, with defaults and without a search

    python -m benchmarks.accuracy.steps --data TrainAndValid.csv

prints a markdown table of test scores: mean and standard deviation over the seeds, with layers [200, 100]. All rows but the last train for
one cycle; the last one uses `fit_zero_restarts`.
"""
import statistics, warnings
import torch
from fastcore.script import anno_parser
from fastai_dropconnect.checks import check_int
from .networks import fit_network
from .search import score
from .spaces import Limits
from .tables import Options, development_table, test_rows

EPOCHS = dict(bulldozers=5, adult=5, california=20)
BASE = dict(layers='200,100', lr=1e-2, wd=1e-2, quantile=False)
STEPS = {'plain fastai (`Normalize`)': {}, '`QuantileNormalize`': dict(quantile=True), "and `num_embeddings='ple'`": dict(num_embed_dim=16, bins=48),
         'and `members=8`': dict(members=8), 'and 4 cycles of half the epochs': dict(n_cycles=4, sparsity=.3, embed_sparsity=.5)}

def recipe(p): return 'zero-restarts' if 'n_cycles' in p else 'fastai'

def settings(p):
    "Return the settings of the recipe"
    members = dict(members=p['members']) if 'members' in p else {}
    restarts = dict(restart_sparsity=p['sparsity'], embed_sparsity=p['embed_sparsity']) if 'n_cycles' in p else {}
    return members | restarts


def test_scores(table, test, p:dict, seeds:int) -> list:
    "Return the score on the test rows for each seed"
    fits = [fit_network(table, table.development, p, seed, Limits(), recipe=recipe(p), settings=settings) for seed in range(seeds)]
    return [score(table, test[table.target].to_numpy(), f.predict(test)) for f in fits]


def main(
    data:str=None, # Kaggle's TrainAndValid.csv of bulldozers; by default synthetic sales
    seeds:int=3 # Fits of each, with seeds 0, 1, ...
):
    "Measure and print; needs at least two seeds for a spread"
    check_int(seeds, 'seeds', 2)
    options,p,rows = Options(data),dict(BASE),[]
    tables = [(development_table(d, options),test_rows(d, options),e) for d,e in EPOCHS.items()]
    for step,more in STEPS.items():
        p |= more
        scores = [test_scores(table, test, p | dict(epochs=e, cycle_len=e//2), seeds) for table,test,e in tables]
        rows.append(f'| {step} | ' + ' | '.join(f'{statistics.mean(s):.4f} ± {statistics.stdev(s):.4f}' for s in scores) + ' |')
    titles = [f'{d}, {"AUC" if d=="adult" else "RMSE"}, {e} epochs' for d,e in EPOCHS.items()]
    print('\n'.join(['| | ' + ' | '.join(titles) + ' |', '|---'*(len(titles)+1)+'|', *rows]))


if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    args = vars(anno_parser(main, prog='steps').parse_args())
    main(args['data'], args['seeds'])
