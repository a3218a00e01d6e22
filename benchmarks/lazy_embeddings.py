"""What an optimizer brings that leaves alone the rows of embeddings that are not in the batch: no decay, no momentum

    OMP_NUM_THREADS=1 python benchmarks/lazy_embeddings.py TrainAndValid.csv
"""
import time, warnings
from pathlib import Path
from fastai.tabular.all import *
from fastcore.script import call_parse
from fastai_dropconnect.bulldozers.data import bulldozers_dls, read_bulldozers
from fastai_dropconnect.optimizer import FusedAdam
from fastai_dropconnect.tabular.learner import tabular_learner

warnings.filterwarnings('ignore')

class LazyAdam(FusedAdam):
    "Adam that updates the rows of embeddings whose gradient is not zero, and all other parameters as usual"
    embeddings = frozenset()    # ids of the parameters

    def step(self, closure=None):
        "Update the rows of embeddings, then all other parameters"
        for params,hypers in zip(self.param_lists, self.hypers):
            for p in params:
                if id(p) in self.embeddings and p.grad is not None: self._update_rows(p, self.state[p], **hypers)
        lists = self.param_lists
        self.param_lists = L(L(p for p in params if id(p) not in self.embeddings) for params in lists)
        try: super().step(closure)
        finally: self.param_lists = lists

    @torch.no_grad()
    def _update_rows(self, p, state, lr, mom, sqr_mom, eps, wd):
        if 'grad_avg' not in state: state.update(grad_avg=torch.zeros_like(p), sqr_avg=torch.zeros_like(p), step=0)
        state['step'] += 1
        rows = p.grad.any(1).nonzero().squeeze(1)
        g = p.grad[rows]
        avg = state['grad_avg'][rows].lerp_(g, 1-mom)
        sqr_avg = state['sqr_avg'][rows].mul_(sqr_mom).addcmul_(g, g, value=1-sqr_mom)
        state['grad_avg'][rows],state['sqr_avg'][rows] = avg,sqr_avg
        scale = (sqr_avg/(1-sqr_mom**state['step'])).sqrt_().add_(eps)
        p[rows] = (p[rows]*(1-lr*wd)).addcdiv_(avg/(1-mom**state['step']), scale, value=-lr)

def train(dls, seed, opt_func, layers, epochs):
    "Return the RMSE on the validation rows and the CPU seconds"
    set_seed(seed, True)
    learn = tabular_learner(dls, layers=layers, y_range=(8,12), metrics=rmse, fast=True)
    learn.opt_func = opt_func
    LazyAdam.embeddings = {id(e.weight) for e in learn.model.embeds}
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn.recorder.values[-1][-1], time.process_time()-start

@call_parse
def main(
    data:Path, # Kaggle's file of sales
    seeds:int=3, # Fits of each kind, in turns
    epochs:int=5, # Epochs of a one-cycle fit
    bs:int=256 # Rows in a batch
):
    "Print error and time with and without"
    dls = bulldozers_dls(read_bulldozers(data), bs=bs)
    fits = [(name, *train(dls, seed, opt, [500,250], epochs)) for seed in range(seeds)
            for name,opt in (('all rows',FusedAdam), ('rows of the batch',LazyAdam))]
    table = pd.DataFrame(fits, columns=['updates','rmse','cpu_seconds'])
    print(table.to_string(index=False))
    print(table.groupby('updates').agg(['mean','std']).round(4).to_string())
