"`fit_best`: what is tried, in which time, and what is left of an interrupted search"
import math, time
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from conftest import InterruptAt
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, MSELossFlat, Normalize, RegressionBlock, RocAucBinary, TabularDataLoaders, rmse
from torch import nn
import fastai_dropconnect.callback.distribution    # noqa: F401, with it Learners have `calibrate` and `predict_distribution`
from fastai_dropconnect import fit_best as module
from fastai_dropconnect.candidates import Candidate, score_for, target_range, targets_of
from fastai_dropconnect.fit_best import BUDGETS, KINDS, Search, fit_best, fit_best_on

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

def table(n=160, seed=0):
    r = np.random.default_rng(seed)
    df = pd.DataFrame(dict(kind=r.choice(list('abc'), n), other=r.choice(list('xy'), n), a=r.normal(size=n), b=r.normal(size=n)))
    return df.assign(y=(df.a*df.b + (df.kind=='a')).astype('float32'), label=np.where(df.a+.5*r.normal(size=n)>0, 'yes', 'no'))

def loaders(df=None, y='y', conts=('a','b'), block=None, valid=range(40)):
    df = table() if df is None else df
    return TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], y_names=y, bs=32, cat_names=['kind','other'],
                                      cont_names=list(conts), valid_idx=list(valid), y_block=block or RegressionBlock())

@pytest.fixture(autouse=True)
def small_budgets(monkeypatch):
    "Train the least, and restarts for one epoch a cycle in place of the fifty that 96 rows would get"
    for name,(_,variations) in BUDGETS.items(): monkeypatch.setitem(BUDGETS, name, (1e7,variations))
    real = module.train_candidate
    def train(dls, name, kind, score, epochs=None, *args):
        cycle_len = kind.recipe.settings.get('cycle_len')
        if not cycle_len: return real(dls, name, kind, score, epochs, *args)
        return real(dls, name, kind.replace(cycle_len=1), score, epochs//cycle_len, *args)
    monkeypatch.setattr(module, 'train_candidate', train)

def names(learn): return list(learn.leaderboard.name)


def test_budgets_try_what_they_say():
    dls = loaders()
    assert names(fit_best(dls, budget='quick', verbose=False))==list(KINDS)
    often = [*KINDS, *[n for n in BUDGETS['default'][1] if n!='finer']]     # the others depend on what is best so far
    assert [n for n in names(fit_best(dls, verbose=False)) if n in often]==often
    with pytest.raises(ValueError, match='budget'): fit_best(dls, budget='huge')


@pytest.mark.parametrize('losses,more', [((2.5,0.,0.), []), ((1.,1.5,0.), ['masked restarts']), ((1.,.5,.4), ['masked restarts','longer restarts'])])
def test_restarts_of_members_follow_while_restarts_are_the_best(losses, more):
    offsets = dict(zip(('restarts','masked restarts','longer restarts'), losses)) | dict(numbers=3., vectors=2.)
    def train(dls, name, kind, score, epochs, work, deadline, seed):
        tried.append((name,kind.recipe.settings.get('members'),epochs,kind.recipe.settings.get('cycle_len')))
        return Candidate(name, 4., [], targets_of(dls)+offsets.get(name, 4.), 0., 0.)
    dls,tried = loaders(),[]
    search = Search([dls], score_for(dls.train_ds.loss_func), verbose=False, train=train).run()
    assert [name for name,*_ in tried]==['numbers','vectors','restarts',*more,'less dropout','smaller','levels','finer','linear','additive'] and search.n_left==0
    (_,members,epochs,cycle),*others = tried[2:3+len(more)]
    assert members is None
    for times,(_,members,*lengths) in zip((1,2), others): assert members==4 and lengths==[times*epochs,times*cycle]


def test_finer_vectors_are_tried_where_the_best_network_has_vectors():
    def search(best, **kwargs):
        def train(dls, name, kind, score, epochs, work, deadline, seed):
            tried.append((name,kind))
            sure = .9 if name==best else .6
            preds = targs+(name!=best) if targs.is_floating_point() else torch.eye(2)[targs[:,0]]*(2*sure-1)+1-sure
            return Candidate(name, 4., [], preds, score(preds, targs), 0.)
        dls,tried = loaders(**kwargs),[]
        targs = targets_of(dls)
        search = Search([dls], score_for(dls.train_ds.loss_func), verbose=False, train=train).run()
        assert search.n_left==0
        return dict(tried)
    for y in (dict(), dict(y='label', block=CategoryBlock())):
        kinds = search('vectors', **y)
        finer,vectors = kinds['finer'],kinds['vectors']
        new,old = [k.recipe.settings['num_embeddings'] for k in (finer,vectors)]
        assert finer.lr==vectors.lr/2 and new.bins==2*old.bins
        assert 'finer' not in search('numbers', **y)


def test_outputs_are_bounded_unless_targets_lie_far_out():
    df = table()
    low,high = target_range(loaders(df))
    part = df.y[40:]
    assert np.isclose(high-low, 1.1*(part.max()-part.min())) and low<part.min()
    assert target_range(loaders(df.assign(y=df.y.where(df.index!=50, 1e4)))) is None
    assert target_range(loaders(df.assign(y=1.))) is None


@pytest.mark.parametrize('n_rows', [20,2000])
def test_networks_far_behind_are_not_in_the_blend(n_rows):
    search = Search([loaders()], score_for(MSELossFlat()), verbose=False)
    g = torch.Generator().manual_seed(0)
    search.targs = torch.randn(n_rows, 1, generator=g)
    def add(name, noise, **kw):
        preds = search.targs+noise*torch.randn(n_rows, 1, generator=g)
        search.candidates.append(Candidate(name, 4., [nn.Linear(2, 1)], preds, search.score(preds, search.targs), 0., **kw))
    for name,noise in (('numbers',.3), ('vectors',.3), ('linear',.31)): add(name, noise)
    add('smaller', 6., timed_out=True)
    model,weights = module._blend(search, 'mean')
    assert len(model.models)==3 and weights[3]==0 and min(weights[:3])>.1 and abs(sum(weights)-1)<1e-6


def test_after_a_network_that_was_cut_short_the_next_one_gets_all_the_time():
    ends = []
    def train(dls, name, kind, score, epochs=None, work=None, deadline=None, seed=0):
        ends.append(deadline)
        return Candidate(name, .4, [], torch.zeros(len(dls.valid_ds), 1), 1., 0., timed_out=len(ends)==1)
    search = Search([loaders()], score_for(MSELossFlat()), time_limit=3600, verbose=False, train=train).run()
    start = search.end - .95*3600
    assert (ends[0]-start)/3600 < .35 and ends[1]==search.end and all((e-start)/3600 < .35 for e in ends[2:5])


def test_networks_without_hidden_layers_are_for_small_tables(monkeypatch):
    def tried(dls):
        def train(dls, name, *args): return Candidate(name, 4., [], targets_of(dls)+1., 1., 0.)
        search = Search([dls], score_for(dls.train_ds.loss_func), verbose=False, train=train).run()
        return {c.name for c in search.candidates}
    dls = loaders()
    assert {'linear','additive'}<=tried(dls)
    assert 'additive' not in names(fit_best(loaders(conts=()), verbose=False))
    monkeypatch.setattr(module, 'MANY_ROWS', 100)
    assert not {'linear','additive'}&tried(dls)


def test_a_table_of_categories_only_has_one_kind():
    learn = fit_best(loaders(conts=()), budget='quick', verbose=False)
    assert names(learn)==['numbers'] and learn.get_preds()[0].isfinite().all()


def test_a_seed_repeats_the_search():
    dls = loaders()
    a,b,c = (fit_best(dls, budget='quick', seed=s, verbose=False).get_preds()[0] for s in (3,3,4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_time_limit_ends_the_search_and_leaves_the_first_candidate():
    learn = fit_best(loaders(), time_limit=1e-3, verbose=False)
    assert names(learn)==['numbers'] and learn.get_preds()[0].isfinite().all()
    with pytest.raises(ValueError, match='time_limit'): fit_best(loaders(), time_limit=0)


@pytest.mark.parametrize('cut_off,epochs,n', [(True,.5,1), (True,1.5,6), (False,.5,6)])
def test_a_search_ends_where_the_next_network_had_less_time_than_one_that_saw_half_an_epoch(cut_off, epochs, n):
    def train(dls, name, kind, score, *args): return Candidate(name, epochs, [], targets_of(dls), 0., 100., cut_off)
    dls = loaders(conts=())
    search = Search([dls], score_for(dls.train_ds.loss_func), time_limit=60, verbose=False, train=train).run()
    assert len(search.candidates)==n


def test_each_candidate_gets_a_third_of_the_time_that_is_left(monkeypatch):
    deadlines = []
    real = module.train_candidate
    def train(dls, name, kind, score, epochs, work, deadline, seed):
        deadlines.append((time.monotonic(),deadline))
        return real(dls, name, kind, score, epochs, work, deadline, seed)
    monkeypatch.setattr(module, 'train_candidate', train)
    search = Search([loaders()], score_for(loaders().loss_func), time_limit=1000, verbose=False).run()
    for now,deadline in deadlines[:3]: assert math.isclose(deadline-now, (search.end-now)/3, rel_tol=.01)
    now,deadline = deadlines[-1]
    assert math.isclose(deadline, search.end, rel_tol=1e-6)


def test_folds_share_the_time_and_the_blend(monkeypatch):
    df = table()
    folds = [loaders(df, valid=range(i, 160, 2)) for i in (0,1)]
    learn = fit_best_on(folds, budget='quick', verbose=False)
    used = (learn.leaderboard.weight>0).sum()
    assert len(learn.model.models)==2*used


def test_quick_divides_its_work_by_the_folds():
    score = score_for(loaders().loss_func)
    work = lambda n, budget: Search([loaders()]*n, score, budget, verbose=False).work
    assert work(4, 'quick')==work(1, 'quick')/4 and work(4, 'default')==work(1, 'default')

def test_quick_spends_most_of_its_work_on_vectors():
    def works(budget, **kw): # By the name of the candidate
        dls,spent = loaders(**kw),{}
        def train(dls, name, kind, score, epochs, work, deadline, seed):
            spent[name] = work
            return Candidate(name, 4., [], targets_of(dls)+1., 1., 0.)
        search = Search([dls], score_for(dls.train_ds.loss_func), budget, verbose=False, train=train).run()
        return {k: v/search.work for k,v in spent.items()}
    assert works('quick')==dict(numbers=.2, vectors=.8) and works('quick', conts=())==dict(numbers=1)
    assert set(works('default').values())=={1}

@pytest.mark.parametrize('noise,budget', [('quantile','default'), ('gaussian','quick')])
def test_distributions(noise, budget):
    dls = loaders(table(400), valid=range(100))
    learn = fit_best(dls, budget=budget, noise=noise, verbose=False)
    assert set(names(learn)) | {'finer'} >= {*KINDS, *BUDGETS[budget][1]}
    learn.calibrate()
    new = table(1000, seed=1)
    res,y = learn.predict_distribution(new),new.y
    assert .8<((res.lower<=y) & (y<=res.upper)).mean()<.97 and (res.sd_members>0).all()
    by_metric = fit_best(dls, rmse, 'quick', noise=noise, verbose=False)
    assert by_metric.validate()[1]<1.5*fit_best(dls, rmse, 'quick', verbose=False).validate()[1]
    with pytest.raises(ValueError, match='`noise` must be None for classes'): fit_best(loaders(y='label', block=CategoryBlock()), noise=noise)


@pytest.mark.parametrize('n_before', [0,1,3])
def test_an_interrupt_keeps_what_there_is(monkeypatch, n_before):
    real,n_calls = module.train_candidate,0
    def train(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls>n_before: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(module, 'train_candidate', train)
    if n_before==0:
        with pytest.raises(KeyboardInterrupt): fit_best(loaders(), verbose=False)
    else: assert len(fit_best(loaders(), verbose=False).leaderboard)==n_before


def interrupted(folds, step, nth=1, **kwargs):
    "Search with an interrupt; the names of the candidates, and whether they are interrupted"
    real,trained,interrupt = module.train_candidate,[],InterruptAt(step, nth)
    def train(dls, name, kind, *args):
        trained.append(real(dls, name, replace(kind, kwargs=kind.kwargs | dict(cbs=interrupt)), *args))
        return trained[-1]
    return fit_best_on(folds, train=train, **kwargs),[(c.name,c.interrupted) for c in trained]

def test_an_interrupt_keeps_a_network_that_is_half_trained(capsys):
    dls = loaders(table(1000), valid=range(200))
    with pytest.raises(KeyboardInterrupt): interrupted([dls], 20)      # nothing is measured yet
    learn,trained = interrupted([dls], 70)
    assert trained==[('numbers',True)] and names(learn)==['numbers'] and learn.again==[]
    assert 'interrupted; networks kept: 1' in capsys.readouterr().out
    assert 30<=learn.leaderboard.epochs[0]*len(dls.train)<=60
    assert np.isclose(learn.leaderboard.loss[0], learn.validate()[0], rtol=1e-4)
    learn,trained = interrupted([dls], 70, 2, verbose=False)
    assert trained==[('numbers',False),('vectors',True)] and len(learn.leaderboard)==2

def test_an_interrupt_between_folds_keeps_whole_candidates():
    folds = [loaders(table(600), valid=range(a, a+200)) for a in (0,200,400)]
    with pytest.raises(KeyboardInterrupt): interrupted(folds, 40, 2, verbose=False)
    learn,trained = interrupted(folds, 40, 3, verbose=False)
    assert len(trained)==3 and names(learn)==['numbers']
    learn,trained = interrupted(folds, 40, 5, verbose=False)
    assert len(trained)==5 and names(learn)==['numbers']


def test_a_candidate_that_diverges_gets_no_weight(monkeypatch):
    real = module.train_candidate
    def train(dls, name, *args):
        res = real(dls, name, *args)
        if name=='numbers': res.preds,res.loss = res.preds*float('nan'),float('nan')
        return res
    monkeypatch.setattr(module, 'train_candidate', train)
    learn = fit_best(loaders(), verbose=False)
    assert learn.leaderboard.weight[0]==0 and learn.get_preds()[0].isfinite().all()


def test_classes_and_a_metric():
    dls = loaders(y='label', block=CategoryBlock())
    learn = fit_best(dls, RocAucBinary(), 'quick', verbose=False)
    assert learn.validate()[1]>.8
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(40))
    assert learn.leaderboard.loss.between(-1, -.5).all()


def test_several_targets():
    df = table().assign(z=lambda d: -d.y)
    learn = fit_best(loaders(df, y=['y','z'], block=RegressionBlock(n_out=2)), rmse, 'quick', verbose=False)
    assert learn.get_preds()[0].shape==(40,2)


def test_loaders_without_a_batch_are_refused():
    dls = loaders(valid=range(30, 160))     # 30 rows, and batches of 32
    with pytest.raises(ValueError, match='`dls` must have a batch to train on, got bs=32 for 30 rows'): fit_best(dls, verbose=False)


def test_what_is_refused():
    for metric in ([rmse], 'rmse'):
        with pytest.raises(TypeError, match='`metric` must be None or one metric of fastai, got metric='): fit_best(loaders(), metric, verbose=False)
    with pytest.raises(TypeError, match='`dls` must be the DataLoaders of a table, got DataFrame'): fit_best(table())
    for rows in (slice(0, 3), slice(90, 99)):
        df = table()
        df.loc[rows,'y'] = np.nan
        with pytest.raises(ValueError, match='`dls` must have a target for each row'): fit_best(loaders(df), verbose=False)
    one_class = loaders(table().assign(label=lambda d: np.where(d.index<40, 'no', d.label)), y='label', block=CategoryBlock())
    with pytest.raises(ValueError, match='`metric` .by default the loss. must be finite for the validation rows, got nan'):
        fit_best(one_class, RocAucBinary(), 'quick', verbose=False)
