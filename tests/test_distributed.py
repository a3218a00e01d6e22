"Two processes (gloo, on the CPU) train one network; run as a script by torchrun, this file is what each of them does"
import faulthandler, os, runpy, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
import torch.distributed as dist
from fastai.callback.core import CancelFitException
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.tabular.all import Callback, SGD, mae, rmse, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.nn_utils import copy_state
from conftest import make_dls, make_table
from test_contract_learners import LEARNERS, Autocast, learner, quiet

HERE = Path(__file__).parent


# What each process does: functions of the rank and the folder for files, whose results the tests below look at

class Watch(Callback):
    "Remember the targets of each training batch, and what a noisy layer makes of ones"
    order = 100
    def before_fit(self): self.batches,self.noise,self.seen = [],[],[]
    def before_batch(self):
        if self.training: self.batches.append(self.yb[0].flatten().tolist())
    def after_batch(self):
        if self.training: self.seen.append(self.loss.item())     # `TerminateOnNaNCallback` decides by it
    def after_pred(self):
        if not self.training: return
        m = self.model.module
        self.noise.append(m.layers[0][0](torch.ones(3, m.layers[0][0].in_features)).detach().flatten().tolist())

def plain_learner(rank=0, n=209, bs=8, drop_last=True, config=None, **kwargs):
    "Make a Learner without batch norm, which would see other rows in another process; the target of a row is its number"
    df = make_table(n)
    df['y'] = np.arange(n, dtype='float32')/n
    set_seed(rank)
    dls = make_dls(df, bs=bs)
    config = tabular_dropconnect_config(use_bn=False, bn_cont=False, **(config or {}))
    learn = tabular_learner(dls, layers=[12,8], config=config, opt_func=SGD, fast=True, **kwargs)
    learn.dls.loaders[0] = learn.dls.train.new(drop_last=drop_last)
    learn.remove_cb(learn.progress)
    return learn

def distributed(learn, f, **kwargs):
    with learn.distributed(**kwargs),quiet(learn): return f(learn)

class WatchMembers(Callback):
    "Remember the targets of each training batch, how many members see them, and the statistics of batch norm then"
    order = 100
    def __init__(self): self.batches,self.widths,self.stats = [],set(),[]
    def after_batch(self):
        if self.training: self.stats.append(self.model.module.layers[0][2].running_mean.tolist())
    def after_pred(self):
        if not self.training: return
        self.batches.append(self.yb[0].flatten().tolist())
        self.widths.add(self.pred.shape[1])

def ensemble(k, seed=0, n=209, **kwargs):
    "Make a Learner of a masked ensemble; the target of a row is its number"
    df = make_table(n)
    df['y'] = np.arange(n, dtype='float32')/n
    set_seed(seed)
    learn = tabular_learner(make_dls(df, bs=16), layers=[12,8], config=tabular_dropconnect_config(members=k), fast=True, **kwargs)
    learn.remove_cb(learn.progress)
    return learn

def fit_members(learn, restarts):
    with quiet(learn):
        if restarts: learn.fit_zero_restarts(2, 1, 1e-2, seed=3, use='average')
        else: learn.fit_one_cycle(2, 1e-2)
        logged,losses = [list(row) for row in learn.recorder.values],[l.item() for l in learn.recorder.losses]
        return dict(state=copy_state(learn.model), preds=learn.get_preds()[0], losses=losses, logged=logged)

def members(rank, folder, k, restarts=False):
    learn = ensemble(k, seed=rank, cbs=WatchMembers())
    res = distributed(learn, lambda l: fit_members(l, restarts), divide='members')
    watch = learn.watch_members
    return res | dict(batches=watch.batches, stats=watch.stats, n_members=watch.widths, alone=learn.get_preds()[0])

def broken_off(rank, folder):
    class Stop(Callback):
        def before_step(self):
            raise CancelFitException
    learn = ensemble(3, seed=rank, path=folder, cbs=[Stop(), WatchMembers()])
    def f(l):
        l.fit(1, 1e-2)
        l.remove_cb(l.stop)
        return dict(batch=l.watch_members.batches[0], state=copy_state(l.model), lr=l.lr_find(show_plot=False, num_it=12).valley, after=copy_state(l.model))
    return distributed(learn, f, divide='members')

def rows(rank, folder, drop_last):
    learn = plain_learner(rank, drop_last=drop_last, cbs=Watch())
    distributed(learn, lambda l: l.fit(2, 1e-2))
    state = copy_state(learn.model)
    return dict(batches=learn.watch.batches, state=state, seen=learn.watch.seen, losses=[l.item() for l in learn.recorder.losses], start=learn.dls.train.n)

def noise(rank, folder):
    set_seed(0)     # the same random numbers on both ranks
    learn = plain_learner(0, config=dict(weight_p=.5), cbs=Watch())
    distributed(learn, lambda l: l.fit(1, 1e-2))
    return dict(noise=learn.watch.noise, after=torch.rand(3).tolist())

def predictions(rank, folder):
    learn = learner(metrics=[rmse, mae], n=523, seed=rank)
    def f(l):
        l.fit(1, 1e-2)
        logged,shown = l.recorder.values[-1],[]
        for n in (105, 32, 1, 0):
            dl = l.dls.test_dl(make_table(n), bs=32) if n<105 else None
            shown.append([t if t is None else torch.as_tensor(t) for t in l.get_preds(dl=dl, with_loss=n==105)])
        return dict(logged=logged[1:], again=list(l.validate()), shown=shown)
    res = distributed(learn, f)
    res['alone'] = learn.get_preds()[0]
    return res | dict(state=learn.model.state_dict())

def contract(rank, folder, name, **kwargs):
    learn = learner(**(LEARNERS | DIVIDED)[name], seed=rank, path=folder/name, n=99, fast=rank==0)     # other weights, other random numbers
    learn.accelerate()
    def f(l):
        if name=='zero_restarts': l.fit_zero_restarts(2, 1, path='run', use='average')
        else: l.fit_one_cycle(1, 1e-2, cbs=[GradientClip(.1), GradientAccumulation(20), Autocast()])
        return l.get_preds()[0]
    res = dict(preds=distributed(learn, f, **kwargs), alone=learn.get_preds()[0], state=copy_state(learn.model))
    if hasattr(learn, 'frozen_zero_init'): res['masks'] = {n: learn.frozen_zero_init.record[n] for n in learn.frozen_zero_init.record}
    if hasattr(learn, 'snapshot_ensemble'): res['snapshots'] = [learn.snapshot_ensemble.record[c] for c in learn.snapshot_ensemble.record]
    return res

def files(rank, folder):
    learn = learner(seed=rank, path=folder)
    cbs = [SaveModelCallback(), EarlyStoppingCallback(patience=1, min_delta=10), CSVLogger(f'history{rank}.csv'), TerminateOnNaNCallback()]
    with learn.distributed(), learn.no_bar():
        learn.fit(4, 1e-2, cbs=cbs)
        learn.save('mine')
    n_epochs,state = len(learn.recorder.values),copy_state(learn.model)
    written = sorted(f.name for f in folder.glob('*.csv'))
    learn.load('mine')      # waits for rank 0
    return dict(n_epochs=n_epochs, state=state, written=written, loaded=copy_state(learn.model), kind=type(learn.model).__name__,
                cbs=[type(cb).__name__ for cb in learn.cbs], logger=learn.logger is print)

def tuning(rank, folder):
    learn = plain_learner(rank, path=folder)
    def f(l):
        l.fit(1, 1e-2)
        before = copy_state(l.model)
        lr = l.lr_find(show_plot=False, num_it=20).valley
        n,same = len(l.recorder.lrs),all(torch.equal(a, b) for a,b in zip(before.values(), copy_state(l.model).values()))
        l.freeze()
        l.fit(1, lr)
        l.unfreeze()
        l.fit(1, lr)
        return dict(lr=lr, n=n, same=same)
    return distributed(learn, f) | dict(state=copy_state(learn.model))

def refusal(rank, folder):
    class Own(Callback):
        def after_step(self): self.model.module.layers[0][0].bias.data.add_(rank)
    learn = plain_learner(cbs=Own())
    try: distributed(learn, lambda l: l.fit(1, 1e-2))
    except RuntimeError as e: return dict(error=str(e), kind=type(learn.model).__name__)

def example(rank, folder): return runpy.run_path(HERE.parent/'examples'/'distributed.py')['train'](n_rows=1503, epochs=4)

# The Learners whose members can be divided
DIVIDED = dict(best_members=dict(config=dict(members=3), cbs=lambda: BestAverage(every=2)),
               zeros_of_members=dict(config=dict(members=3), cbs=lambda: [DropConnect(.2), FrozenZeroInit(.5), ZeroRestarts(1), RecalibrateBN(True)]),
               **{name: LEARNERS[name] for name in ('members','mixtures','ple_gates')})

TASKS = dict(equal=lambda *a: members(*a, 4), unequal=lambda *a: members(*a, 3), restarts=lambda *a: members(*a, 3, True), broken_off=broken_off, script=example, rows_dropped=lambda *a: rows(*a, True), rows_filled=lambda *a: rows(*a, False), noise=noise, predictions=predictions,
             files=files, tuning=tuning, refusal=refusal)

def main(folder):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(int(os.environ.get("LATER", 150)), exit=True)    # ranks that wait for each other
    rank,world_size = init_ranks()
    assert (rank,world_size) == (int(os.environ['RANK']),2)
    results = {name: task(rank, folder) for name,task in TASKS.items()}
    results |= {name: contract(rank, folder, name) for name in LEARNERS}
    results |= {f'divided {name}': contract(rank, folder, name, divide='members') for name in DIVIDED}
    torch.save(results, folder/f'{rank}.pt')
    dist.destroy_process_group()
    os._exit(0)     # where the interpreter takes torch down by itself, one run in thirty ends with SIGABRT


# The tests

@pytest.fixture(scope='module')
def results(tmp_path_factory) -> list: # of each rank
    folder = tmp_path_factory.mktemp('distributed')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=HERE, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode==0, done.stdout+done.stderr
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(2)]

def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('task,n_left_out', [('rows_dropped', 167-160), ('rows_filled', -1)])
def test_each_row_is_seen_once(results, task, n_left_out):
    one,two = [r[task]['batches'] for r in results]
    assert len(one)==len(two) and [len(b) for b in one]==[len(b) for b in two]
    n,per_epoch = results[0][task]['start'],len(one)//2
    epochs = [sum(one[s]+two[s], []) for s in (slice(per_epoch), slice(per_epoch, None))]
    for seen in epochs:
        assert len(seen)==n-n_left_out and len(set(seen))==min(n, n-n_left_out)
    assert epochs[0]!=epochs[1]


def test_gradients_are_averages(results):
    "Two ranks with `bs=8` are one process with `bs=16` and the same rows"
    ours,theirs = [r['rows_dropped'] for r in results]
    assert same(ours['state'], theirs['state']) and ours['losses']==theirs['losses'] and ours['seen']==theirs['seen']
    number = {y: i for i,y in enumerate(plain_learner().dls.train_ds.items.y.tolist())}
    order = [number[y] for a,b in zip(ours['batches'], theirs['batches']) for y in a+b]
    learn,epochs = plain_learner(bs=16, drop_last=True),np.split(np.array(order), 2)
    learn.dls.loaders[0] = learn.dls.train.new(get_idxs=lambda: epochs[learn.epoch], n=len(epochs[0]))
    with quiet(learn): learn.fit(2, 1e-2)
    torch.testing.assert_close(copy_state(learn.model), ours['state'])
    torch.testing.assert_close([l.item() for l in learn.recorder.losses], ours['losses'])


def test_masks_of_a_pass_differ_between_ranks(results):
    one,two = [r['noise']['noise'] for r in results]
    assert len(one)==len(two)==10
    draws = {tuple(n) for n in one+two}
    assert len(draws)==20       # and between passes
    assert results[0]['noise']['after']==results[1]['noise']['after']


def test_predictions_and_metrics_are_those_of_one_process(results):
    ours,theirs = [r['predictions'] for r in results]
    learn = learner(metrics=[rmse, mae], n=523)
    learn.model.load_state_dict(ours['state'])
    with quiet(learn):
        values = list(learn.validate())
        expected = [learn.get_preds(with_loss=True)]
        expected += [learn.get_preds(dl=learn.dls.test_dl(make_table(n), bs=32)) for n in (32, 1, 0)]
    assert ours['logged']==theirs['logged'] and ours['again']==theirs['again']
    torch.testing.assert_close(ours['again'], values)
    torch.testing.assert_close(ours['logged'], values)
    for a,b,c in zip(ours['shown'], theirs['shown'], expected, strict=True):
        for x,y,z in zip(a, b, c, strict=True):
            if z is None: assert x is y is None
            else:
                assert torch.equal(x, y)
                torch.testing.assert_close(x, torch.as_tensor(z), check_dtype=False)
    assert len(ours['shown'][0][0])==105
    torch.testing.assert_close(ours['alone'], expected[0][0])


@pytest.mark.parametrize('name', [*LEARNERS, *[f'divided {name}' for name in DIVIDED]])
def test_every_learner_trains_one_network(results, name):
    ours,theirs = [r[name] for r in results]
    assert same(ours['state'], theirs['state']) and torch.equal(ours['preds'], theirs['preds'])
    torch.testing.assert_close(ours['preds'], ours['alone'])
    assert torch.equal(ours['alone'], theirs['alone'])
    for part in {'masks','snapshots'} & set(ours):
        for a,b in zip(ours[part], theirs[part], strict=True): assert (a==b and torch.equal(ours[part][a], theirs[part][b])) if part=='masks' else same(a, b)


@pytest.mark.parametrize('task,k,each', [('equal', 4, (2,2)), ('unequal', 3, (1,2)), ('restarts', 3, (1,2))])
def test_divided_members_are_one_process(results, task, k, each):
    "Ranks that divide the members train the network of one process, with the same rows in each batch"
    ours,theirs = [r[task] for r in results]
    assert same(ours['state'], theirs['state']) and ours['losses']==theirs['losses'] and torch.equal(ours['preds'], theirs['preds'])
    assert ours['batches']==theirs['batches'] and ours['stats']==theirs['stats'] and (ours['n_members'],theirs['n_members']) == tuple({n} for n in each)
    learn = ensemble(k)
    number = {y: i for i,y in enumerate(learn.dls.train_ds.items.y.tolist())}
    order = [number[y] for batch in ours['batches'] for y in batch]
    epochs = np.split(np.array(order), len(order)//160)
    learn.dls.loaders[0] = learn.dls.train.new(get_idxs=lambda: epochs[learn.epoch], n=160)
    alone = fit_members(learn, restarts=task=='restarts')
    assert not same(ours['state'], copy_state(ensemble(k).model)) and len(epochs)==2
    for name in ('state','preds','losses','logged'): torch.testing.assert_close(ours[name], alone[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours['alone'], alone['preds'], rtol=1e-5, atol=1e-5)


def test_divided_members_are_whole_after_a_fit_that_breaks_off(results):
    ours,theirs = [r['broken_off'] for r in results]
    assert same(ours['state'], theirs['state']) and same(ours['state'], ours['after']) and ours['lr']==theirs['lr']
    learn = ensemble(3)
    number = {y: i for i,y in enumerate(learn.dls.train_ds.items.y.tolist())}
    dl = learn.dls.train.new(get_idxs=lambda: [number[y] for y in ours['batch']], n=16)
    learn.model.train()(*dl.one_batch()[:2])      # changes only the statistics of batch norm
    torch.testing.assert_close(ours['state'], copy_state(learn.model))


def test_masks_hold(results):
    for r in results:
        assert r['frozen_zero']['masks']
        for n,mask in r['frozen_zero']['masks'].items(): assert not r['frozen_zero']['state'][n][~mask].any()


def test_only_rank_0_writes(results):
    ours,theirs = [r['files'] for r in results]
    assert same(ours['state'], theirs['state']) and same(ours['loaded'], theirs['loaded'])
    assert ours['n_epochs']==theirs['n_epochs']==2 and ours['written']==theirs['written']==['history0.csv']
    assert ours['kind']==theirs['kind']=='TabularModel' and ours['cbs']==theirs['cbs'] and ours['logger'] and theirs['logger']


def test_lr_find_and_freezing(results):
    ours,theirs = [r['tuning'] for r in results]
    assert ours['lr']==theirs['lr'] and ours['n']==theirs['n']>=19
    assert ours['same'] and theirs['same'] and same(ours['state'], theirs['state'])


def test_different_weights_are_an_error(results):
    for r in results: assert 'those of [1] differ' in r['refusal']['error'] and r['refusal']['kind']=='TabularDropConnectModel'


def test_the_example_trains_in_one_process_and_in_two(results):
    alone = example(0, None)
    assert (alone['world_size'],alone['rows']) == (1,300) and alone['rmse']<.7
    for rank,r in enumerate(results):
        assert (r['script']['rank'],r['script']['world_size'],r['script']['rows']) == (rank,2,300)
        assert r['script']['rmse']==results[0]['script']['rmse']<.95


if __name__=='__main__': main(Path(sys.argv[1]))
