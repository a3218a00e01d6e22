"Recipes, and the choice among them"
import pickle
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Callback
from fastai.metrics import RocAucBinary, accuracy, rmse
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, TabularPandas
from fastcore.foundation import L
from sklearn.metrics import roc_auc_score
from conftest import make_table
from fastai_dropconnect import recipes
from fastai_dropconnect.callback.frozen_zero import FrozenZeroInit
from fastai_dropconnect.callback.snapshots import SnapshotEnsemble
from fastai_dropconnect.recipes import RECIPES, Recipe, choose_recipe, gates_recipes, get_recipe, is_higher_better, recipes_for, simplest_good, train_recipe


def preds(learn):
    with learn.no_bar(): return learn.get_preds()[0]

def choose(dls, *args, **kwargs): return choose_recipe(dls, *args, verbose=False, **kwargs)

@pytest.fixture
def only_categories():
    df = pd.DataFrame(dict(a=list('xyz')*100, y=np.tile([0.,1,2], 100).astype('float32')))
    return TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], y_names='y', valid_idx=range(200, 300), bs=32)

@pytest.fixture
def classes():
    df = make_table(400)
    return TabularDataLoaders.from_df(df.assign(y=(df.y>df.y.median()).astype(int)), procs=[Normalize], cont_names=['b'], y_names='y',
                                      y_block=CategoryBlock(), valid_idx=range(300, 400), bs=32)


# --- one recipe

@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_has_a_line_of_description_and_plain_settings(name):
    r = RECIPES[name]
    assert r.description and '\n' not in r.description
    assert all(v is None or isinstance(v, (bool,int,float,str)) for v in r.settings.values())
    assert set(r.settings) <= set(r.known_settings())

@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_trains_and_survives_pickle(name, dls):
    r = pickle.loads(pickle.dumps(RECIPES[name]))
    assert r == RECIPES[name]
    assert torch.isfinite(preds(train_recipe(dls, r, epochs=1, layers=[8]))).all()

def test_a_setting_reaches_model_callback_and_fit(dls):
    model = RECIPES['dropconnect-example'].replace(weight_p=.3).learner(dls, layers=[8]).model
    assert {m.p for m in model.modules() if getattr(m, 'mode', None)=='example'} >= {.3}
    learn = RECIPES['frozen-zero'].replace(sparsity=.25).learner(dls, layers=[8])
    assert learn.frozen_zero_init.sparsity==.25
    restarts = train_recipe(dls, RECIPES['zero-restarts'].replace(n_cycles=2, cycle_len=1), epochs=6, layers=[8])
    assert len(restarts.recorder.values)==2
    assert len(train_recipe(dls, RECIPES['zero-restarts'].replace(n_cycles=2), epochs=6, layers=[8]).recorder.values)==2*3

def test_settings_of_the_model_combine_with_any_recipe(dls):
    a,b = RECIPES['zero-restarts'].replace(num_embeddings='ple'),RECIPES['ple-zero-restarts']
    a,b = [preds(train_recipe(dls, r.replace(n_cycles=2, cycle_len=1), layers=[8])) for r in (a,b)]
    assert torch.equal(a, b)

def test_a_twentieth_of_the_weights_is_left(dls):
    learn = train_recipe(dls, 'pruned', epochs=2, layers=[50,25])
    n = sum(p.numel() for p,_ in learn.gradual_pruning.weights().values())
    assert learn.gradual_pruning.report().live.sum()/n==pytest.approx(.05, rel=.02)

def test_a_recipe_for_each_price(dls):
    recipes = gates_recipes((30,0))
    assert list(recipes)==['gates-30','gates-0'] and [r.settings['price'] for r in recipes.values()]==[30,0]
    assert list(gates_recipes())==['gates-1000','gates-300','gates-100','gates-0'] and '300 nats' in gates_recipes()['gates-300'].description
    off,plain = [preds(train_recipe(dls, r, epochs=1, layers=[8])) for r in (recipes['gates-0'],'fastai')]
    assert torch.equal(off, plain)
    learn = train_recipe(dls, RECIPES['ple'].replace(), epochs=1, layers=[8], cbs=RECIPES['gates'].cbs(5))
    assert learn.feature_gates.record.state['fixed']
    with pytest.raises(ValueError, match='price=-1'): gates_recipes([-1])
    with pytest.raises(TypeError, match="got 'price'"): gates_recipes([1], 'ple')


def test_the_residual_network_has_options_of_its_own(dls):
    learn = RECIPES['resnet'].replace(width=24).learner(dls, layers=[8,9])
    assert learn.model.layers[0].out_features==24 and 'path_p' in RECIPES['resnet'].known_settings()
    with pytest.raises(ValueError, match='path_p=1'): RECIPES['resnet'].replace(path_p=1)
    with pytest.raises(TypeError, match="got 'members'"): RECIPES['resnet'].replace(members=2)


def test_replace_leaves_the_registry_alone():
    r = RECIPES['zero-restarts']
    before = dict(r.settings)
    assert r.replace('Another', n_cycles=3).description=='Another' and r.replace(n_cycles=3).settings['n_cycles']==3
    assert r.settings==before and r.replace()==r

@pytest.mark.parametrize('name,setting', [('fastai','n_cycles'), ('zero-restarts','mask_grads'), ('ple','weigth_p')])
def test_an_unknown_setting_is_named(name, setting):
    with pytest.raises(TypeError, match=f"`settings` must be some of weight_p.*got '{setting}'"): RECIPES[name].replace(**{setting: 1})

@pytest.mark.parametrize('name,wrong,says', [('dropconnect-batch', dict(weight_p=1.5), 'weight_p=1.5'), ('frozen-zero', dict(sparsity=1), 'sparsity=1'),
                                             ('masked-ensemble', dict(members=0), 'members=0'), ('dropconnect-batch', dict(mode='row'), "mode='row'")])
def test_a_wrong_setting_fails_before_anything_is_trained(name, wrong, says):
    with pytest.raises(ValueError, match=says): RECIPES[name].replace(**wrong)

def test_train_recipe_does_what_it_is_told(dls):
    class Rates(Callback):
        def before_fit(self): self.highest,self.n = 0.,0
        def after_batch(self):
            if self.training: self.highest,self.n = max(self.highest, self.opt.hypers[-1]['lr']),self.n+1
    class Other(Callback): pass
    learn = train_recipe(dls, Recipe('With a callback', cbs=lambda: [Other()]), epochs=2, lr=3e-3, cbs=Rates(), layers=[8])
    assert learn.rates.highest==pytest.approx(3e-3, rel=2e-3) and learn.rates.n==2*len(dls.train)
    assert hasattr(learn, 'other') and learn.model.layers[0][0].out_features==8

def test_the_order_of_batches_depends_on_the_seed_alone():
    "Also where DataLoaders draw the order from random numbers of their own"
    df = make_table(300)
    dls = TabularPandas(df, [Normalize], [], ['b'], 'y', splits=(L(range(200)),L(range(200, 300)))).dataloaders(bs=64)
    state = dls.train.rng.getstate()
    a,b = [preds(train_recipe(dls, 'fastai', epochs=1)) for _ in range(2)]
    assert torch.equal(a, b) and dls.train.rng.getstate()==state

def test_a_name_stands_for_its_recipe(dls):
    assert torch.equal(*[preds(train_recipe(dls, r, epochs=1, layers=[8])) for r in ('ple', RECIPES['ple'])])
    with pytest.raises(ValueError, match="`recipe` must be one of 'fastai', .* got recipe='plain'"): get_recipe('plain')

@pytest.mark.parametrize('bad', [None, 3, ['ple']])
def test_something_else_is_no_recipe(bad, dls):
    with pytest.raises(TypeError, match='`recipe` must be a Recipe or its name, got recipe='): train_recipe(dls, bad)

@pytest.mark.parametrize('name,bad', [('epochs',0), ('epochs',-1), ('epochs',2.5), ('epochs','a'), ('seed','a'), ('seed',None), ('seed',1.5)])
def test_wrong_arguments_of_a_training(name, bad, dls):
    with pytest.raises((TypeError,ValueError), match=f'{name}={bad!r}'): train_recipe(dls, 'fastai', **{name: bad})


# --- the choice

def test_with_one_seed_the_lowest_loss_is_chosen():
    assert simplest_good([[3.],[1.],[2.]])==1
    assert simplest_good([[3.,3.],[1.,3.],[2.,2.]])==0 and simplest_good([[3.,3.],[1.,1.5],[2.,2.]])==1      # standard errors 1 and .25

@pytest.mark.parametrize('bad', [0, 1.5, 'a'])
def test_wrong_number_of_seeds(bad, dls):
    with pytest.raises((TypeError,ValueError), match=f'`seeds`.*seeds={bad!r}'): choose(dls, seeds=bad)

def test_recipes_that_do_not_fit_are_left_out(only_categories):
    assert [n for n in RECIPES if n not in recipes_for(only_categories)]==[n for n in RECIPES if n.startswith('ple')]
    assert 'ple' not in choose(only_categories, epochs=1, seeds=1, layers=[8]).table.index

def test_names_are_put_in_the_order_of_the_registry(dls):
    assert list(choose(dls, ['frozen-zero','fastai'], epochs=1, seeds=1, layers=[8]).table.index)==['fastai','frozen-zero']

@pytest.mark.parametrize('bad', [3, [], {}, 'forest', ['fastai', 3]])
def test_wrong_recipes_are_named(bad, dls):
    import re
    with pytest.raises(ValueError, match=re.escape(f'recipes={bad!r}')): choose(dls, bad)

def test_all_recipes_are_checked_before_any_is_trained(dls):
    def broken(learn, epochs, lr): raise AssertionError('trained')
    with pytest.raises(TypeError, match='recipe=3'): choose(dls, dict(first=Recipe('Never trained', fit=broken), second=3))

def test_a_recipe_that_diverges_is_not_chosen(dls):
    def broken(learn, epochs, lr): [p.data.fill_(np.nan) for p in learn.model.parameters()]
    choice = choose(dls, {'broken': Recipe('Diverges', fit=broken), 'fastai': RECIPES['fastai']}, epochs=2, seeds=2)
    assert choice.name=='fastai' and len(choice.table)==2 and np.isnan(choice.table.loss['broken'])
    assert torch.equal(preds(choice.learn), preds(train_recipe(dls, 'fastai', epochs=2)))      # of the first seed

def test_each_learner_has_callbacks_of_its_own(dls):
    given,before = FrozenZeroInit(.5),torch.get_rng_state()
    choice = choose(dls, dict(a='fastai', b='fastai'), epochs=1, seeds=2, cbs=given, layers=[8,4])
    assert torch.equal(torch.get_rng_state(), before) and given.learn is None
    assert choice.table.loss['a']==choice.table.loss['b']
    def zeros(): return (choice.learn.model.layers[0][0].weight==0).float().mean()
    assert zeros()==.5
    with choice.learn.no_bar(), choice.learn.no_logging(): choice.learn.fit(1)
    assert zeros()==.5

def test_callbacks_that_watch_the_fit_do_not_watch_the_validation_that_judges_it(dls):
    choice = choose(dls, ['fastai','zero-restarts'], epochs=2, seeds=1, cbs=[EarlyStoppingCallback(), SnapshotEnsemble()], layers=[8])
    assert hasattr(choice.learn, 'early_stopping')

def test_the_table_shows_all_metrics(classes):
    choice = choose(classes, ['fastai','frozen-zero'], epochs=1, seeds=2, metrics=[accuracy, RocAucBinary()], layers=[8])
    assert list(choice.table.columns)==['loss','accuracy','roc_auc_score','sd','seconds','chosen']
    learns = [train_recipe(classes, 'fastai', epochs=1, seed=s, layers=[8]) for s in (0,1)]
    with learns[0].no_bar(): y = learns[0].get_preds()[1].numpy()
    want = np.mean([roc_auc_score(y.ravel(), preds(l)[:,1]) for l in learns])
    assert choice.table.roc_auc_score['fastai']==pytest.approx(want, abs=1e-6)

def made_up_scores(monkeypatch, **by_recipe):
    "Let each recipe have the given validation results instead of its own"
    monkeypatch.setattr(recipes, 'train_recipe', lambda dls, recipe, **kwargs: (recipe.description, kwargs['seed']))
    def scores(learn):
        name,seed = learn
        return dict(loss=1., accuracy=by_recipe[name][seed])
    monkeypatch.setattr(recipes, '_scores', scores)
    return {n: Recipe(n) for n in by_recipe}

def test_a_metric_to_maximize_is_maximized(dls, monkeypatch):
    mine = made_up_scores(monkeypatch, a=[.5,.6], b=[.8,.9], c=[.7,.8])
    choice = choose(dls, mine, seeds=2, metrics=accuracy, by='accuracy')
    assert choice.name=='b' and choice.table.sd['a']==pytest.approx(np.std([.5,.6], ddof=1)) and choice.table.accuracy['c']==pytest.approx(.75)
    assert choose(dls, mine, seeds=2, metrics=accuracy, by='accuracy', higher_is_better=False).name=='a'
    assert choose(dls, mine, seeds=2, metrics=accuracy).name=='a'      # by the loss, which is 1 for all of them

def test_the_metric_of_an_ensemble_is_that_of_its_average(dls):
    choice = choose(dls, ['zero-restarts','masked-ensemble'], epochs=2, seeds=1, metrics=rmse, by='rmse', layers=[8])
    np.testing.assert_allclose(choice.table.rmse**2, choice.table.loss, rtol=1e-4)

def profit(preds, targs): return (preds*targs).mean()

def test_the_direction_of_an_unknown_metric_must_be_given(dls):
    with pytest.raises(ValueError, match="`higher_is_better` must be True or False for the metric 'profit'"):
        choose(dls, 'fastai', metrics=profit, by='profit')
    assert choose(dls, 'fastai', epochs=1, seeds=1, metrics=profit, by='profit', higher_is_better=True).name=='fastai'
    with pytest.raises(ValueError, match="higher_is_better='yes'"): choose(dls, 'fastai', higher_is_better='yes')

@pytest.mark.parametrize('by', ['accuracy', None, 3])
def test_by_must_be_a_metric_that_was_given(by, dls):
    with pytest.raises(ValueError, match=f"`by` must be one of 'loss', 'rmse', got by={by!r}"): choose(dls, metrics=rmse, by=by)

@pytest.mark.parametrize('name,higher', [('loss',False), ('rmse',False), ('error_rate',False), ('hamming_loss',False), ('mean_absolute_error',False),
                                         ('accuracy',True), ('roc_auc_score',True), ('r2_score',True), ('matthews_corrcoef',True)])
def test_the_direction_of_well_known_metrics(name, higher): assert is_higher_better(name) is higher


# --- progress

@pytest.fixture
def bars(monkeypatch):
    "What the progress bars say, a list for each"
    said = []
    class Bar:
        def __init__(self, jobs, leave):
            self.jobs,self.comment = list(jobs),''
            said.append([])
        def __iter__(self): return iter(self.jobs)
        def update_bar(self, i): said[-1].append((i, self.comment))
    monkeypatch.setattr(recipes, 'progress_bar', Bar)
    return said

def test_the_bar_says_what_is_trained_and_what_was_best(bars, dls, monkeypatch):
    mine = made_up_scores(monkeypatch, a=[.5,.7], b=[.8,.9])
    choose_recipe(dls, mine, seeds=2, metrics=accuracy, by='accuracy')
    assert bars==[[(0,'a, seed 0'), (1,'a, seed 1; best so far: a, accuracy 0.5000'), (2,'b, seed 0; best so far: a, accuracy 0.6000'),
                   (3,'b, seed 1; best so far: b, accuracy 0.8000')]]

def test_the_bar_can_be_turned_off(bars, dls, monkeypatch):
    choose_recipe(dls, made_up_scores(monkeypatch, a=[.5]), seeds=1, verbose=False)
    assert bars==[]

def test_the_bar_of_fastprogress_takes_the_calls(dls, capsys):
    assert choose_recipe(dls, ['fastai','ple'], epochs=1, seeds=1, layers=[8]).name in ('fastai','ple')
