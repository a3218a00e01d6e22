"The command `dropconnect-bulldozers`: its results, its errors, and what it imports"
import bz2, gzip, io, lzma, os, random, re, signal, subprocess, sys, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
import torch
from fastai.learner import load_learner
from fastai_dropconnect import compare
from fastai_dropconnect.tabular.data import tabular_dls
from fastai_dropconnect.bulldozers.data import bulldozers_pandas, price_features
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from fastai_dropconnect.nn_utils import hidden_linears
from fastai_dropconnect.cli import *
from fastai_dropconnect.compare import MODELS, RECIPES, TREES

WINDOWS = os.name == 'nt'
COMMAND = Path(sys.executable).parent/('dropconnect-bulldozers.exe' if WINDOWS else 'dropconnect-bulldozers')
needs_unix = pytest.mark.skipif(WINDOWS, reason='Windows has no such files or signals')
REAL = Path(__file__).parents[2]/'shared'/'data'/'bulldozers'
needs_real = pytest.mark.skipif(not (REAL/'TrainAndValid.csv').exists(), reason=f'Kaggle\'s file is not at {REAL}')
ENV = dict(os.environ, OMP_NUM_THREADS='1') # with so few rows, threads only wait for each other
N_FITS = 2*len([*RECIPES, *TREES])      # of two seeds
QUICK = '--epochs 1 --cycles 2 --layers 20 --seeds 1'.split()


def run(*args, cwd=None):
    "Run the installed command, and return its exit status, stdout and stderr"
    r = subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300, env=ENV)
    return r.returncode, r.stdout, r.stderr

def run_here(capsys, *args):
    "The same in this process, which needs no eight seconds to import what the command runs"
    try: status = dropconnect_bulldozers([*map(str, args)])
    except SystemExit as e: status = e.code     # argparse
    return status, *capsys.readouterr()


def text(content): return lambda path: path.write_text(content)


@pytest.fixture(scope='module')
def all_models(tmp_path_factory):
    "One run of every model on synthetic sales with a file to predict"
    tmp = tmp_path_factory.mktemp('cli')
    new = synthetic_bulldozers(60, seed=9).drop(columns='SalePrice')
    new = new.assign(YearMade=new.YearMade.where(new.index > 4), state=new.state.mask(new.index == 7, 'Atlantis')).iloc[::-1]
    new.to_csv(tmp/'Test.csv', index=False)
    status, said, errors = run('--rows', 700, '--models', ' '.join(MODELS), '--epochs', 2, '--cycles', 2, '--layers', '20,10', '--seeds', 2, '--seed', 5,
                               '--weight_p', .2, '--sparsity', .4, '--bs', 128, '--valid_from', '2011-06-01', '--test', tmp/'Test.csv', '--out', tmp/'a'/'out')
    assert status == 0, errors
    return tmp/'a'/'out', said, errors, new


def test_the_command_is_installed(): assert COMMAND.exists()

def test_every_model_is_on_the_leaderboard(all_models):
    out, said, errors, _ = all_models
    board = pd.read_csv(out/'leaderboard.csv')
    assert set(board.model) == set(MODELS) and (board.seeds == 2).all() and board.rmse.is_monotonic_increasing
    assert board.rmse.between(.1, 2).all() and (board.spread >= 0).all()
    networks = board.model.isin(RECIPES)
    assert board.parameters[networks].gt(1000).all() and board.seconds_per_epoch[networks].gt(0).all() and board.parameters[~networks].isna().all()
    for r in board.itertuples(): assert f'{r.rmse:.4f}' in said and r.model in said

def test_the_heading_says_source_split_and_size(all_models):
    _, said, errors, _ = all_models
    df = synthetic_bulldozers(700)
    n = (df.saledate < '2011-06-01').sum()
    assert 'synthetic sales (made up: no --data given)' in said
    assert f'700 sales: {n} before 2011-06-01 train, the {700-n} from then on validate; seeds 5, 6' in said

def test_progress_goes_to_stderr_without_control_characters(all_models):
    _, said, errors, _ = all_models
    errors = re.sub(r'fastai_dropconnect: compiling.*\n', '', errors)     # said once, in a fresh clone, also within a line
    lines = errors.splitlines()
    assert lines[0].startswith('Reading ') and len(lines) == 1+N_FITS and all('RMSE' in l for l in lines[1:])
    assert f'[3/{N_FITS}] ple, seed 5 (1 of 2) .. RMSE' in errors and '] zero-restarts, seed 6 (2 of 2) .... RMSE' in errors
    assert '] dropconnect-gaussian, seed 5 (1 of 2) .. RMSE' in errors
    assert not any(c in said+errors for c in '\r\x1b\b') and f'[3/{N_FITS}]' not in said

def test_all_results_are_there(all_models):
    out, said, *_ = all_models
    assert {p.name for p in out.iterdir()} == {*OUTPUTS, MANIFEST} and [p.name for p in out.parent.iterdir()] == ['out']
    for p in out.glob('*.png'): assert p.read_bytes().startswith(b'\x89PNG') and p.stat().st_size > 10_000
    assert all(name in said for name in OUTPUTS)

def test_predictions_reproduce_the_leaderboard(all_models):
    out, *_ = all_models
    preds, board = pd.read_csv(out/'predictions.csv', dtype={'SalesID': str}), pd.read_csv(out/'leaderboard.csv').set_index('model')
    sales = synthetic_bulldozers(700).set_index('SalesID')
    assert (sales.SalePrice[preds.SalesID].to_numpy() == preds.SalePrice).all() and (preds.saledate >= '2011-06-01').all()
    for m in MODELS: # the error of the mean over two seeds is no larger than their mean error, and close to it
        err = np.sqrt(np.mean(np.log(preds[m]/preds.SalePrice)**2))
        assert board.rmse[m]*.8 < err <= board.rmse[m] + 1e-4, m

def test_the_submission_has_every_row_in_its_order(all_models):
    out, said, errors, new = all_models
    sub = pd.read_csv(out/'submission.csv', dtype={'SalesID': str})
    assert list(sub.columns) == ['SalesID','SalePrice'] and sub.SalesID.tolist() == new.SalesID.tolist()
    truth = synthetic_bulldozers(60, seed=9).set_index('SalesID').SalePrice[sub.SalesID].to_numpy()
    assert np.corrcoef(np.log(sub.SalePrice), np.log(truth))[0,1] > .6

def test_the_exported_learner_is_the_best_network(all_models):
    out, *_ = all_models
    learn, board = load_learner(out/'export.pkl'), pd.read_csv(out/'leaderboard.csv')
    sales = synthetic_bulldozers(700)
    valid = sales[sales.saledate >= '2011-06-01']
    with learn.no_bar(): logs = learn.get_preds(dl=learn.dls.test_dl(price_features(valid)))[0].squeeze().numpy()
    err = np.sqrt(np.mean((logs-np.log(valid.SalePrice))**2))
    assert err <= board.rmse[board.model.isin(RECIPES)].min() + 1e-4

def test_a_pruned_network_is_exported_small(tmp_path, capsys):
    status, said, errors = run_here(capsys, '--rows', 600, '--models', 'pruned', '--layers', '40 20', '--seeds', 1, '--epochs', 3, '--target', 40, '--compact', '--out', tmp_path/'out')
    assert status == 0, errors
    live, n = [int(re.search(p, said)[1].replace(',', '')) for p in (r'has ([\d,]+) live weights', r'live weights of ([\d,]+);')]
    assert 0 < live <= n/40 and 'for 1,000 rows' in said
    learn = load_learner(tmp_path/'out'/'export.pkl')
    assert sum(m.weight.numel() for m in learn.model.modules() if isinstance(m, torch.nn.Linear)) < n and not any('pruning' in cb.name for cb in learn.cbs)
    status, said, errors = run_here(capsys, '--models', 'pruned', '--target', 1, '--out', tmp_path/'out')
    assert status == 2 and '`target` must be more than 1, got target=1' in errors

def test_same_seed_same_leaderboard(all_models, tmp_path, capsys):
    "In another process"
    out, *_ = all_models
    models = ['dropconnect-gaussian','zero-restarts','masked-ensemble','ensemble']
    status, said, errors = run_here(capsys, '--rows', 700, '--models', ','.join(models), '--epochs', 2, '--cycles', 2, '--layers', '20 10', '--seeds', 2, '--seed=5',
                                    '--weight-p', .2, '--bs', 128, '--valid_from=2011-06-01', '--out', tmp_path/'out')
    assert status == 0, errors
    a, b = (pd.read_csv(o/'leaderboard.csv').set_index('model').loc[models, ['rmse','spread']] for o in (out, tmp_path/'out'))
    pd.testing.assert_frame_equal(a, b)
    assert len(pd.read_csv(tmp_path/'out'/'leaderboard.csv')) == 4 and not (tmp_path/'out'/'submission.csv').exists()

@needs_real
def test_the_real_file(tmp_path):
    status, said, errors = run('--data', REAL/'TrainAndValid.csv', '--test', REAL/'Test.csv', '--models', 'dropconnect-gaussian,extra-trees',
                               *'--epochs 2 --layers 50 --seeds 1'.split(), cwd=tmp_path)
    assert status == 0, errors
    assert 'Data: TrainAndValid.csv' in said and '16,825 sales' in said and 'synthetic' not in said
    out = tmp_path/'bulldozers_out'
    board, sub = pd.read_csv(out/'leaderboard.csv').set_index('model'), pd.read_csv(out/'submission.csv')
    assert board.rmse['extra-trees'] < .28 and board.rmse['dropconnect-gaussian'] < .4 and board.spread.isna().all()
    assert sub.SalesID.tolist() == pd.read_csv(REAL/'Test.csv', usecols=['SalesID']).SalesID.tolist()
    assert sub.SalePrice.between(1000, 200_000).all()


# --- what can go wrong

def test_bad_data_ends_with_status_2_and_one_line(tmp_path):
    synthetic_bulldozers(30).drop(columns='Thumb').to_csv(tmp_path/'bad.csv', index=False)
    status, said, errors = run('--data', tmp_path/'bad.csv', '--out', tmp_path/'out', *QUICK)
    assert (status, said) == (2, '')
    assert errors == f'Reading {tmp_path}/bad.csv\ndropconnect-bulldozers: error: {tmp_path}/bad.csv: 1 needed column missing: Thumb\n'
    assert [p.name for p in tmp_path.iterdir()] == ['bad.csv']

@needs_unix
def test_interrupted_by_the_user(tmp_path):
    p = subprocess.Popen([COMMAND, '--rows', '3000', '--models', 'fastai', '--epochs', '500', '--out', tmp_path/'out'],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # shells ignore it in jobs of the background
    try:
        assert '[' == p.stderr.read(1) # the first fit has begun
        p.send_signal(signal.SIGINT)
        said, errors = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130 and errors.endswith('dropconnect-bulldozers: interrupted, nothing was written\n') and 'Traceback' not in errors
    assert list(tmp_path.iterdir()) == []

def imported(code):
    "Run `code` in a fresh Python, and return the heavy packages that it imports"
    code = f"{code}\nimport sys\nprint([m for m in ('torch','fastai','sklearn','matplotlib','pandas','fastai.vision','torchvision') if m in sys.modules])"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=ENV).stdout.splitlines()[-1]

def test_importing_the_command_imports_nothing_heavy(): assert imported('import fastai_dropconnect.cli') == '[]'

def test_importing_what_it_runs_leaves_vision_alone(): assert 'vision' not in imported('import fastai_dropconnect.compare')

@pytest.mark.parametrize('options', ['--help', '--wieght_p .3', '--weight_p 1.5', '--epochs 0', '--layers x', '--seeds 0', '--rows 1', '--out /proc/x'])
def test_help_and_wrong_options_do_not_wait_for_torch(options):
    run = f"""
from fastai_dropconnect.cli import dropconnect_bulldozers
try: dropconnect_bulldozers({options.split()!r})
except SystemExit: pass"""
    assert imported(run) == '[]'

SALES = synthetic_bulldozers(30, seed=2)
BAD = { # options (FILE: a file made of what stands in second place), and what the message says
    'weight_p 1.5': ('--weight_p 1.5', None, '`weight_p` must be a number with 0 <= weight_p < 1, got weight_p=1.5'),
    'weight_p nan': ('--weight_p nan', None, 'weight_p=nan'),
    'weight_p abc': ('--weight_p abc', None, "argument --weight-p: invalid float value: 'abc'"),
    'sparsity 1': ('--sparsity 1', None, '`sparsity` must be a number with 0 <= sparsity < 1, got sparsity=1.0'),
    'sparsity -.1': ('--sparsity=-.1', None, 'sparsity=-0.1'),
    'sparsity half': ('--sparsity half', None, "argument --sparsity: invalid float value: 'half'"),
    'unknown model': ('--models fastai,forest', None, f"`models` must be some of {', '.join(MODELS)}, got models='fastai,forest' ('forest' unknown)"),
    'no model': ('--models ,', None, '`models` must be some of'),
    'epochs 0': ('--epochs 0', None, '`epochs` must be an integer of at least 1, got epochs=0'),
    'epochs 1.5': ('--epochs 1.5', None, "argument --epochs: invalid int value: '1.5'"),
    'cycles 0': ('--cycles 0', None, '`cycles` must be an integer of at least 1, got cycles=0'),
    'bs 1': ('--bs 1', None, '`bs` must be an integer of at least 2, got bs=1'),
    'layers': ('--layers 500,x', None, "`layers` must be sizes of at least 1 such as '500,250', got layers='500,x'"),
    'layer 0': ('--layers 0', None, "layers='0'"),
    'seeds 0': ('--seeds 0', None, '`seeds` must be an integer of at least 1, got seeds=0'),
    'seed -1': ('--seed=-1', None, '`seed` must be an integer of at least 0, got seed=-1'),
    'seed too large': ('--seed 4294967295 --seeds 2', None, '`seed` must be at most 2**32-`seeds`, got seed=4294967295'),
    'rows 1': ('--rows 1', None, '`rows` must be an integer of at least 2, got rows=1'),
    'valid_from': ('--valid_from soon', None, "`valid_from` must be a date such as '2011-10-01', got valid_from='soon'"),
    'no validation rows': ('--valid_from 2031-01-01', None, 'the validation period from 2031-01-01 has no rows'),
    'no training rows': ('--valid_from 1990-01-01', None, 'the training period before 1990-01-01 has no rows'),
    'out in proc': ('--out /proc/x', None, "`out` must be a folder that can be written to, got out='/proc/x'"),
    'out is a file': ('--out FILE', 'hello', 'FILE is not a folder'),
    'NUL in out': ('--out a\0b', None, r"`out` must be a path without NUL, got out='a\x00b'"),
    'NUL in data': ('--data a\0b', None, r"`data` must be a path without NUL, got data='a\x00b'"),
    'NUL in test': ('--test a\0b', None, r"`test` must be a path without NUL, got test='a\x00b'"),
    'newline in data': ('--data a\nb\x1b[31m', None, r'a\nb\x1b[31m: no such file'),
    'surrogate in data': ('--data a\udcffb', None, r'a\udcffb: no such file'),
    'NUL at the end': ('--data FILE', SALES.to_csv(index=False)+'\0', 'FILE: not a CSV file: it holds NUL'),
    'utf-16': ('--data FILE', SALES.to_csv(index=False).encode('utf-16'), 'FILE: not a CSV file: it holds NUL bytes'),
    'doubled header': ('--data FILE', SALES.rename(columns={'Stick': 'state'}), 'FILE: more than one column is named state'),
    'doubled header of no use': ('--data FILE', SALES.assign(a=1, b=2).rename(columns={'b': 'a'}), 'FILE: more than one column is named a'),
    'doubled and renamed': ('--data FILE', SALES.to_csv(index=False).replace('MachineID', 'SalePrice', 1), 'FILE: more than one column is named SalePrice'),
    'overflow in a column': ('--data FILE', SALES.assign(YearMade='1e39'), "FILE: column YearMade: a number too large for float32 in 30 of 30 rows; the first is '1e39'"),
    'overflow below': ('--data FILE', SALES.assign(MachineHoursCurrentMeter='-1e39'), 'column MachineHoursCurrentMeter: a number too large for float32'),
    'overflow in the price': ('--data FILE', SALES.assign(SalePrice='1e39'), 'FILE: column SalePrice: a number too large for float32'),
    'overflow in test': ('--test FILE', SALES.assign(YearMade='1e39'), 'FILE: column YearMade: a number too large for float32'),
    'gzip': ('--data FILE', gzip.compress(SALES.to_csv(index=False).encode()), 'FILE: not a CSV file'),
    'xz': ('--data FILE', lzma.compress(SALES.to_csv(index=False).encode()), 'FILE: not a CSV file'),
    'bzip2': ('--data FILE', bz2.compress(SALES.to_csv(index=False).encode()), 'FILE: not a CSV file'),
    'device': ('--data /dev/null', None, '/dev/null: is not a regular file'),
    'endless device': ('--data /dev/zero', None, '/dev/zero: is not a regular file'),
    'out under a file': ('--out FILE/out', 'hello', 'FILE is not a folder'),
    'unknown option': ('--wieght_p .3', None, 'unrecognized arguments: --wieght-p'),
    'no such file': ('--data nowhere.csv', None, 'nowhere.csv: no such file'),
    'a directory': ('--data /tmp', None, '/tmp: is a directory'),
    'empty': ('--data FILE', '', 'FILE: is empty'),
    'not a csv': ('--data FILE', 'hello', 'FILE: not a CSV file'),
    'not a zip': ('--data FILE.zip', 'hello', 'FILE.zip: not a zip archive'),
    'no rows': ('--data FILE', SALES[:0], 'FILE: a header, but no rows'),
    'missing columns': ('--data FILE', SALES.drop(columns=['state','Stick']), 'FILE: 2 needed columns missing: state, Stick'),
    'no prices': ('--data FILE', SALES.assign(SalePrice=np.nan), 'FILE: column SalePrice: no row has a price'),
    'price 0': ('--data FILE', SALES.assign(SalePrice=0), "FILE: column SalePrice: a price that is not above 0 in 30 of 30 rows; the first is '0' in data row 1 (SalesID 1000001)"),
    'dates': ('--data FILE', SALES.assign(saledate='soon'), "FILE: column saledate: not a date (such as 11/16/2006 0:00 or 2006-11-16) in 30 of 30 rows; the first is 'soon'"),
    'one day': ('--data FILE', SALES.assign(saledate='2011-01-01'), 'no split by time: all 30 rows are of one day'),
    'test without ids': ('--test FILE', SALES.drop(columns=['SalesID','Stick']), 'FILE: 2 needed columns missing: SalesID, Stick'),
    'test not there': ('--test nowhere.csv', None, 'nowhere.csv: no such file'),
    'test with text': ('--test FILE', SALES.assign(YearMade='old'), "FILE: column YearMade: not a number in 30 of 30 rows; the first is 'old'"),
    'test without rows': ('--test FILE', SALES[:0], 'FILE: a header, but no rows'),
}

@pytest.mark.parametrize('name', BAD)
def test_every_error(name, tmp_path, capsys, monkeypatch):
    options, content, says = BAD[name]
    if WINDOWS and re.search(' /(dev|proc|tmp)', options): pytest.skip('no such files on Windows')
    file = tmp_path/('given.zip' if '.zip' in options else 'given')
    if isinstance(content, str): file.write_text(content)
    elif isinstance(content, bytes): file.write_bytes(content)
    elif content is not None: content.to_csv(file, index=False)
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.setattr(compare, 'fit_models', lambda *a, **k: pytest.fail('training began'))
    monkeypatch.chdir(tmp_path)
    options = options.replace('FILE.zip', 'FILE').replace('FILE', str(file)).split(' ')
    try: status = dropconnect_bulldozers(options)
    except SystemExit as e: status = e.code # argparse
    said, errors = capsys.readouterr()
    assert (status, said) == (2, '')
    last = errors.splitlines()[-1]
    assert last.startswith('dropconnect-bulldozers: error: ') and says.replace('FILE.zip', 'FILE').replace('FILE', str(file)) in last
    assert sorted(tmp_path.rglob('*')) == before

def test_rows_without_a_price_are_reported(tmp_path, capsys):
    SALES.assign(SalePrice=SALES.SalePrice.mask(SALES.index < 4)).to_csv(tmp_path/'a.csv', index=False)
    assert dropconnect_bulldozers(['--data', str(tmp_path/'a.csv'), '--models', 'extra-trees', '--out', str(tmp_path/'out'), *QUICK]) == 0
    said, errors = capsys.readouterr()
    assert errors.startswith(f'Reading {tmp_path}/a.csv\ndropconnect-bulldozers: warning: {tmp_path}/a.csv: 4 of 30 rows have no SalePrice and are left out\n')
    assert '26 sales' in said

def test_a_disk_that_refuses_leaves_the_earlier_results(tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    write_results(out, {'leaderboard.csv': text('earlier')})
    (out/'mine.txt').write_text('keep')
    before = {p.name: p.read_text() for p in out.iterdir()}
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(compare, 'submission', full)
    SALES.to_csv(tmp_path/'t.csv', index=False)
    args = ['--rows', '40', '--models', 'extra-trees', '--out', str(out), *QUICK]
    assert dropconnect_bulldozers([*args, '--test', str(tmp_path/'t.csv')]) == 2
    assert 'No space left on device' in capsys.readouterr().err.splitlines()[-1]
    assert {p.name: p.read_text() for p in out.iterdir()} == before
    assert dropconnect_bulldozers(args) == 0
    assert (out/'mine.txt').exists() and 'rmse' in (out/'leaderboard.csv').read_text()

def test_results_of_an_earlier_run_are_deleted(tmp_path, capsys):
    out = tmp_path/'out'
    write_results(out, {'submission.csv': text('earlier')})
    assert dropconnect_bulldozers(['--rows', '40', '--models', 'random-forest', '--out', str(out), *QUICK]) == 0
    assert {p.name for p in out.iterdir()} == {'leaderboard.csv','leaderboard.png','predicted_actual.png','predictions.csv', MANIFEST}


# --- files of others in the folder of the results

@pytest.mark.parametrize('name', OUTPUTS)
def test_a_file_of_others_is_neither_overwritten_nor_deleted(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, 'fit_models', lambda *a, **k: pytest.fail('training began'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/name).write_text('mine')
    assert dropconnect_bulldozers(['--rows', '40', '--out', '.', *QUICK]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f'{name} in it was not written by this command' in last and 'another folder' in last
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: 'mine'}

def test_a_result_that_was_changed_is_the_users(tmp_path):
    write_results(tmp_path, {'leaderboard.csv': text('one'), 'predictions.csv': text('one')})
    check_out(tmp_path)
    (tmp_path/'leaderboard.csv').write_text('notes')
    with pytest.raises(ValueError, match='leaderboard.csv in it was not written by this command, or has been changed since'): check_out(tmp_path)
    (tmp_path/'leaderboard.csv').unlink()
    write_results(tmp_path, {'predictions.csv': text('two')})
    assert (tmp_path/'predictions.csv').read_text() == 'two'

@needs_unix
def test_links_and_folders_are_the_users(tmp_path):
    write_results(tmp_path/'out', {'leaderboard.csv': text('one')})
    (tmp_path/'out'/'leaderboard.csv').rename(tmp_path/'elsewhere')
    (tmp_path/'out'/'leaderboard.csv').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(ValueError, match='leaderboard.csv in it'): check_out(tmp_path/'out')
    (tmp_path/'out'/'leaderboard.csv').unlink()
    (tmp_path/'out'/'leaderboard.csv').mkdir()
    with pytest.raises(ValueError, match='leaderboard.csv in it'): check_out(tmp_path/'out')

@pytest.mark.parametrize('content', ['', 'mine', '[]', '{"files": 1}', '{"format": "x", "files": []}', '{"format": "fastai_dropconnect.bulldozers", "files": [["../mine.txt", "x"]]}',
                                     '{"format": "fastai_dropconnect.bulldozers", "files": [3]}', '['*100_000])
def test_a_manifest_of_others(content, tmp_path):
    (tmp_path/MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=f'{MANIFEST} in it was not written by this command'): check_out(tmp_path)
    with pytest.raises(ValueError, match=MANIFEST): write_results(tmp_path, {'leaderboard.csv': text('x')})
    assert (tmp_path/MANIFEST).read_text() == content

def test_a_file_that_came_during_training_stays_and_so_do_the_results(tmp_path):
    with pytest.raises(ValueError, match='leaderboard.csv in it') as e: write_results(tmp_path, {'leaderboard.csv': lambda p: (text('result')(p), text('mine')(tmp_path/'leaderboard.csv'))})
    kept, = tmp_path.glob('.bulldozers-*')
    assert (tmp_path/'leaderboard.csv').read_text() == 'mine' and (kept/'leaderboard.csv').read_text() == 'result' and str(kept) in str(e.value)

@pytest.mark.parametrize('at', range(5))
def test_a_kill_while_results_are_moved_leaves_a_folder_for_the_next_run(at, tmp_path, monkeypatch):
    write_results(tmp_path, {'leaderboard.csv': text('one'), 'submission.csv': text('one')})
    moves, replace = [], os.replace
    def killed(a, b):
        moves.append(b)
        if len(moves) > at: raise KeyboardInterrupt
        replace(a, b)
    monkeypatch.setattr(os, 'replace', killed)
    writers = {n: text('two') for n in ('leaderboard.csv','predictions.csv')}
    if at < 4:
        with pytest.raises(KeyboardInterrupt): write_results(tmp_path, writers)
    else: write_results(tmp_path, writers)
    monkeypatch.undo()
    check_out(tmp_path)
    write_results(tmp_path, {'leaderboard.csv': text('three')})
    assert {p.name for p in tmp_path.iterdir() if p.name[0]!='.'} == {'leaderboard.csv', MANIFEST} and len(moves) == min(at+1, 4)
    assert (tmp_path/'leaderboard.csv').read_text() == 'three'


# --- text that a spreadsheet would run

def test_formulas_are_quoted_and_numbers_stay_numbers(tmp_path, capsys):
    ids = ['=1+1', '+SUM(A1)', '-2+3', '@cmd', '\tx', '=HYPERLINK("http://x","y")', '-7', '+7.5', '-1e3', '7', '＝x', 'a=b']
    new = synthetic_bulldozers(12, seed=9).drop(columns='SalePrice').assign(SalesID=ids)
    new.to_csv(tmp_path/'t.csv', index=False)
    args = ['--rows', '40', '--models', 'extra-trees', '--test', str(tmp_path/'t.csv'), '--out', str(tmp_path/'out')]
    assert dropconnect_bulldozers([*args, *QUICK]) == 0
    sub = pd.read_csv(tmp_path/'out'/'submission.csv', dtype={'SalesID': str})
    assert sub.SalesID.tolist() == ["'"+i for i in ids[:6]] + ids[6:10] + ["'＝x", 'a=b']
    assert sub.SalePrice.dtype == float

def test_a_carriage_return_starts_no_new_row(tmp_path):
    quote_formulas(pd.DataFrame({'a': ['x\r=1+1', 'y\r\n=2']})).to_csv(tmp_path/'a.csv', index=False)
    assert len(pd.read_csv(tmp_path/'a.csv')) == 2

@needs_unix
def test_a_name_with_dollars_is_no_formula_of_a_figure(tmp_path, capsys):
    SALES.to_csv(tmp_path/'$\\y$.csv', index=False)
    assert dropconnect_bulldozers(['--data', str(tmp_path/'$\\y$.csv'), '--models', 'extra-trees', '--out', str(tmp_path/'out'), *QUICK]) == 0

def test_only_text_is_quoted():
    frame = pd.DataFrame({'a': [-1.5, 2], 'b': ['-x', None], '=c': ['\r', '\n']})
    got = quote_formulas(frame)
    assert got.a.tolist() == [-1.5, 2] and got.b[0] == "'-x" and got.b.isna()[1] and got.columns.tolist() == ['a', 'b', "'=c"]
    assert got["'=c"].tolist() == ["'\n", "'\n"] and frame.b[0] == '-x'


# --- the functions behind it

@pytest.mark.parametrize('rows', [3, 5, 9])
def test_a_handful_of_sales(rows, tmp_path, capsys):
    assert dropconnect_bulldozers(['--rows', str(rows), '--out', str(tmp_path/'out'), *QUICK]) == 0

def hidden_zeros(learn):
    "Share of exact zeros in the weights of the hidden layers"
    return [(m.weight == 0).float().mean().item() for m in hidden_linears(learn.model).values()]

@pytest.mark.parametrize('name', ['frozen-zero','free-zero','zero-restarts','masked-ensemble','ple-masked-zero-restarts'])
def test_an_exported_network_predicts_and_trains_on(name, tmp_path, capsys):
    args = ['--rows', '200', '--models', name, '--sparsity', '.75', '--out', str(tmp_path/'out'), *QUICK]
    assert dropconnect_bulldozers(args) == 0
    learn, sales = load_learner(tmp_path/'out'/'export.pkl'), synthetic_bulldozers(200)
    preds = pd.read_csv(tmp_path/'out'/'predictions.csv', dtype={'SalesID': str})
    valid = sales.set_index('SalesID').loc[preds.SalesID].reset_index()
    with learn.no_bar(): logs = learn.get_preds(dl=learn.dls.test_dl(price_features(valid)))[0].squeeze(-1).numpy()
    np.testing.assert_allclose(np.exp(logs), preds[name], rtol=1e-4)
    before = learn.model.layers[0][0].weight.detach().clone()
    learn.dls = tabular_dls(bulldozers_pandas(sales))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not torch.equal(learn.model.layers[0][0].weight, before)
    assert (abs(hidden_zeros(learn)[0]-.75) < .001) == (name == 'frozen-zero')

def test_python_gets_the_leaderboard(tmp_path, capsys):
    board = compare_on_bulldozers(rows=60, models='extra-trees', seeds=2, out=tmp_path/'out')
    assert board.model.tolist() == ['extra-trees'] and board.spread.notna().all()
    with pytest.raises(ValueError, match="models='x'"): compare_on_bulldozers(models='x')


# --- a hundred files that are almost right

N_FUZZ = 100
LINES = SALES.to_csv(index=False).splitlines(keepends=True)

def _mutate(rng, data):
    "Bytes of a CSV, changed in one of many ways"
    lines, cells = data.splitlines(keepends=True), data.decode('latin-1').splitlines()
    def cell(value):
        row = rng.randrange(len(cells))
        fields = cells[row].split(',')
        fields[rng.randrange(len(fields))] = value
        return '\n'.join([*cells[:row], ','.join(fields), *cells[row+1:]]).encode()
    at = rng.randrange(len(data))
    ways = [
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at]+bytes(rng.randrange(256) for _ in range(8))+data[at:],
        lambda: data.decode('latin-1').encode(rng.choice(['utf-16', 'utf-32', 'utf-8-sig', 'utf-7', 'cp037']), 'replace'),
        lambda: data.replace(b'\n', rng.choice([b'\r\n', b'\r', b'\n\n', b'\0\n', b'\x0b'])),
        lambda: data.replace(b',', rng.choice([b';', b'\t', b',,', b', ', b'","']), rng.choice([1, -1])),
        lambda: data[:at]+b'"'+data[at:],
        lambda: data.replace(b'\n', b',"x\n', 1),
        lambda: b''.join(rng.sample(lines, len(lines))),
        lambda: b''.join(lines+[rng.choice(lines)[:at % 50]]),
        lambda: lines[0]*2+b''.join(lines[1:]),
        lambda: b''.join(lines[1:]),
        lambda: cell('x'*200_000),
        lambda: cell(rng.choice(['1e39', '-1e39', '1e400', 'nan', 'inf', '0x10', '1_000', '9'*400, '\u0661\u0662', '=1+1', '\ud7ff', '-0', '1e-400', 'NULL', 'True'])),
        lambda: cell(rng.choice(['9999-12-31', '1677-09-21', '2262-04-12', '2011-02-30', '2011-01-01T00:00:00+14:00', '1e9', 'now', '11/16/2006 25:00'])),
        lambda: data+data,
        lambda: gzip.compress(data),
        lambda: b'PK\3\4'+data]
    return rng.choice(ways)()

@pytest.mark.parametrize('column', ['SalePrice', 'YearMade', 'MachineHoursCurrentMeter'])
def test_the_largest_numbers_train(column, tmp_path, capsys):
    SALES.assign(**{column: SALES[column].astype(object).mask(SALES.index == 4, '3e38')}).to_csv(tmp_path/'a.csv', index=False)
    assert dropconnect_bulldozers(['--data', str(tmp_path/'a.csv'), '--models', 'fastai,extra-trees', '--out', str(tmp_path/'out'), *QUICK]) == 0
    preds = pd.read_csv(tmp_path/'out'/'predictions.csv')
    assert preds.drop(columns=['SalesID','saledate','lower','upper']).map(np.isfinite).all(axis=None)
    assert (preds.lower==0).all() and (preds.upper==np.inf).all()       # too few sales to say more

def _zipped(rng, data):
    "An archive of `data`, damaged every other time"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(rng.choice(['Train.csv', 'x/any.csv', 'Test.csv']), data)
    packed = bytearray(buffer.getvalue())
    for _ in range(rng.choice([0, 5])): packed[rng.randrange(len(packed))] = rng.randrange(256)
    return bytes(packed)

def _no_file(rng, path):
    "Something else in the place of a file"
    def link(): path.symlink_to(rng.choice(['nowhere', path.name, '/dev/null', '/dev/zero', '/proc/self/mem', '.']))
    def secret():
        path.write_bytes(b'a,b')
        path.chmod(0)
    rng.choice([path.mkdir, link, lambda: os.mkfifo(path), secret, path.touch])()

@pytest.fixture
def only_read(monkeypatch):
    "Training that is over before it begins"
    class Trained(Exception): pass
    def fit_models(*args, **kwargs): raise Trained
    monkeypatch.setattr(compare, 'fit_models', fit_models)
    return Trained

@pytest.mark.parametrize('seed', range(N_FUZZ))
def test_a_file_that_is_almost_right_is_read_or_refused_in_one_line(seed, tmp_path, capsys, only_read):
    rng = random.Random(seed)
    file, out = tmp_path/rng.choice(['a.csv', 'a.zip', 'a']), tmp_path/'out'
    data = ''.join(LINES).encode()
    if seed % 10 == 9 and not WINDOWS: _no_file(rng, file)
    else:
        for _ in range(rng.randint(1, 2)): data = _mutate(rng, data) if data[:1] == b'S' else data
        file.write_bytes(_zipped(rng, data) if file.suffix == '.zip' else data)
    try: status = dropconnect_bulldozers([rng.choice(['--data', '--test']), str(file), '--models', 'extra-trees', '--rows', '30', '--out', str(out)])
    except only_read: status = 0
    errors = [l for l in capsys.readouterr().err.splitlines() if ': warning: ' not in l]
    assert errors[0].startswith('Reading ') and status == (0 if len(errors) == 1 else 2), errors
    assert len(errors) == 1 or len(errors) == 2 and errors[1].startswith('dropconnect-bulldozers: error: '), errors
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == [file.name]
