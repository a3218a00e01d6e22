"Train a network with a method, count what is left, and write the result to a CSV file at once"
import time
import torch
from fastai.basics import DataLoaders, Learner, noop, set_seed
from fastai.callback.schedule import ParamScheduler
from fastai.callback.progress import ProgressCallback

from fastai_dropconnect.optimizer import FusedAdam
from fastai_dropconnect.sparsity.graph import ChannelGraph
from functools import partial
from .methods import METHODS

COLUMNS = 'task method target seed rows epochs metric error live weights times macs_times units seconds settings'.split()


def falling(pos): return 1. if pos<.5 else 2*(1-pos)    # the rate is constant in the first half, and then falls to 0


def make_learner(task, method, target, settings):
    opt = method.opt or partial(FusedAdam, decouple_wd=task.decouple_wd, **({} if task.one_cycle else dict(sqr_mom=.999, eps=1e-8)))
    dls = DataLoaders(task.batches(), [])
    dls.n_inp = task.n_in
    dls.cat_names,dls.cont_names = [task.settings.get(n, []) for n in ('cat_names','cont_names')]
    learn = Learner(dls, task.model(), loss_func=task.loss, opt_func=opt, lr=task.lr, wd=task.wd, cbs=method.cbs(target, settings),
                    train_bn=True)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def sizes(model) -> dict: # Live weights, all weights, units and multiply-adds that are left
    graph = ChannelGraph(model).update()
    keep,layers = graph.keep(),graph.layers()
    planes = {}
    def count(s): return lambda m,args,out: planes.update({s.name: out[0,0].numel() if out.dim()==4 else 1})
    handles = [s.layer.register_forward_hook(count(s)) for s in layers]
    with torch.no_grad(): model.eval()(*model.example)
    for h in handles: h.remove()
    kept = [(int(keep[s.ins[0].units].sum()), int(keep[s.out.units].sum())) for s in layers]
    macs = [sum(planes[s.name]*a*b*s.layer.weight[0,0].numel() for s,(a,b) in zip(layers, both))
            for both in ([(len(s.ins[0]),len(s.out)) for s in layers], kept)]
    n = sum(s.layer.weight.numel() for s in layers)
    units = '-'.join(str(a) for a,_ in kept)+f'-{kept[-1][1]}'
    return dict(live=graph.n_live(), weights=n, times=n/max(graph.n_live(), 1), macs_times=macs[0]/max(macs[1], 1), units=units)


def n_epochs(name, task, default, epochs=None) -> int:
    "Return how many epochs a method trains, by its own settings for a task unless they are given"
    return epochs or (METHODS[name].changes or {}).get(task, {}).get('epochs', default)

def run(task, name, target, seed, epochs=None, settings=None) -> dict: # A row of results
    "Train and evaluate once"
    method = METHODS[name]
    for k,v in (method.changes or {}).get(task.name, {}).items(): setattr(task, k, v)
    settings = method.of(task.name) | (settings or {})
    set_seed(seed)
    learn = make_learner(task, method, target, settings)
    epochs,start = n_epochs(name, task.name, task.epochs, epochs),time.process_time()
    with learn.no_bar():
        if task.one_cycle: learn.fit_one_cycle(epochs, task.lr)
        else: learn.fit(epochs, cbs=ParamScheduler({'lr': lambda pos: task.lr*falling(pos)}))
    seconds = time.process_time()-start
    model = learn.model
    model.example = tuple(t[:2] for t in task.train[:task.n_in])
    row = dict(task=task.name, method=name, target=target, seed=seed, epochs=epochs, metric=task.metric, error=task.evaluate(model, task.test))
    return row | sizes(model) | dict(seconds=round(seconds, 1), settings=settings)
