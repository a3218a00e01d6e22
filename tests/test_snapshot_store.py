"The folder of a run: kills at any moment, damaged and foreign files, full disks, other runs"
import contextlib, errno, hashlib, json, os, pickle, random, signal, time
from copy import deepcopy
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.tabular.all import Adam, Callback, OptimWrapper, SGD, mae, ranger, set_seed
from torch import nn
from ensemble_learners import *
from fastai_dropconnect.all import *
from fastai_dropconnect import files
from fastai_dropconnect.ensemble import folder as store
from fastai_dropconnect.nn_utils import copy_state

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

MANIFEST = 'snapshots.json'
OPERATIONS = 'write_new','sync_file','sync_names','rename_file','delete_file'


class Seeds(Callback):
    "Seed each epoch, so that the order of its batches and its dropout do not depend on the epochs before"
    order = -50
    def before_epoch(self):
        if self.learn.lock.locked(): return
        set_seed(self.epoch)
        self.learn.dls.train.rng = random.Random(self.epoch)


class Batches(Callback):
    "Count the batches that train"
    def __init__(self): self.n = 0
    def after_batch(self): self.n += self.training


def small_learn(path, seed=0, *cbs, **kw): return make_learn(Seeds(), *cbs, dls=data(32, 16), path=path, seed=seed, metrics=mae, **kw)
def fit(learn, path='run', n_cycles=3, **kw): learn.fit_zero_restarts(n_cycles, 1, path=path, seed=5, **kw)
def folder_of(learn, path='run'): return Path(learn.path)/learn.model_dir/path
def bytes_of(path): return {f.name:f.read_bytes() for f in sorted(path.glob('*')) if f.is_file()}
def manifest_of(path): return json.loads((path/MANIFEST).read_text())
def named(path):
    m = manifest_of(path)
    return {e['file'] for e in m['cycles'].values()} | ({m['resume']['file']} if m['resume'] else set())

def file_of(path, cycle): return path/manifest_of(path)['cycles'][str(cycle)]['file']

def edit(path, **changes):
    "Change entries of the manifest"
    (path/MANIFEST).write_text(json.dumps(manifest_of(path) | changes))


def equal(a, b):
    "Compare nested containers of tensors and numbers, bit for bit"
    if torch.is_tensor(a): return torch.equal(a, b) and a.dtype==b.dtype
    if isinstance(a, dict): return list(a)==list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(equal, a, b))
    return a==b or (a!=a and b!=b)


def run_of(learn):
    "What two runs are compared by"
    return dict(weights=state(learn), optimizer=learn.opt.state_dict()['state'], cycles=list(ensemble(learn).record), members=members(learn),
                report=ensemble(learn).record.rows, predictions=preds(learn))


def assert_same_run(a, b): # `b` may be what `run_of` returned
    "Weights, optimizer, report, predictions and members of both are the same, bit for bit"
    want = b if isinstance(b, dict) else run_of(b)
    for name,value in run_of(a).items(): assert equal(value, want[name]), name


class Killed(BaseException): "The process is dead"


class Disk:
    "The store's operations on files: counts them, and stops or fails at one of them"
    def __init__(self, monkeypatch, kill=None, full=None):
        self.n = 0          # instants so far: before, in the middle of, and after each operation
        self.n_ops = 0
        self.written,self.names = [],[]
        self.kill,self.full = kill,full
        self.dead,self.unsynced = False,set()
        for name in OPERATIONS:
            operation = self.wrapped(name, getattr(files, name))
            for module in (files,store):
                if hasattr(module, name): monkeypatch.setattr(module, name, operation)

    def instant(self):
        if self.dead or self.n==self.kill: self.die()
        self.n += 1

    def die(self):
        if not self.dead:
            for f in self.unsynced: f.exists() and f.write_bytes(b'')       # never reached the disk
        self.dead = True
        raise Killed

    def wrapped(self, name, operation):
        def call(*args):
            self.instant()
            if self.full is not None and self.n_ops>=self.full and name!='delete_file': raise OSError(errno.ENOSPC, 'No space left on device', str(args[0]))
            self.n_ops += 1
            self.names.append((name, *[a.name for a in args if isinstance(a, Path)]))
            if name=='write_new': self.write(operation, *args)
            else: operation(*args)
            if name=='sync_file': self.unsynced.discard(args[0])
            if name=='rename_file' and args[0] in self.unsynced: self.unsynced = self.unsynced-{args[0]} | {args[1]}
            self.instant()
        return call

    def write(self, operation, file, data):
        if self.dead or self.n==self.kill:
            operation(file, data[:len(data)//2])
            self.die()
        self.n += 1
        self.unsynced.add(file)
        operation(file, data)
        self.written.append((file.name, len(data)))


@pytest.fixture
def disk(monkeypatch): return lambda **kw: Disk(monkeypatch, **kw)


# Nothing foreign runs


class Bomb:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f'touch {self.marker}',)


def plant(file, marker): file.write_bytes(pickle.dumps(Bomb(marker)))


@pytest.mark.parametrize('kw', [{}, dict(resume=True), dict(overwrite=True), dict(resume=True, overwrite=True)], ids=str)
@pytest.mark.parametrize('which', ['cycle','resume',MANIFEST,'new names'])
@pytest.mark.parametrize('checksum', ['old','right'])
def test_loading_runs_no_code_from_the_folder(tmp_path, kw, which, checksum):
    fit(small_learn(tmp_path))
    path,marker = tmp_path/'models/run',tmp_path/'executed'
    m = manifest_of(path)
    files = {'cycle': path/m['cycles']['1']['file'], 'resume': path/m['resume']['file'], MANIFEST: path/MANIFEST}
    planted = [files[which]] if which in files else [path/n for n in ('cycle_000.pth','progress.pth','cycle_003.pth','best.pth')]
    for f in planted: plant(f, marker)
    digest = hashlib.sha256(planted[0].read_bytes()).hexdigest()
    if checksum=='right' and which=='cycle': edit(path, cycles=m['cycles'] | {'1': m['cycles']['1'] | dict(sha256=digest)})
    if checksum=='right' and which=='resume': edit(path, resume=m['resume'] | dict(sha256=digest))
    error = None
    try: fit(small_learn(tmp_path, 9), **kw)
    except ValueError as e: error = str(e)
    assert not marker.exists()
    if which==MANIFEST or 'resume' in kw and which in files: assert str(planted[0]) in error
    elif kw: assert error is None       # nothing of that is read
    else: assert 'overwrite=True' in error


def test_old_files_without_a_manifest_are_not_run_either(tmp_path):
    path,marker = tmp_path/'models/run',tmp_path/'executed'
    path.mkdir(parents=True)
    torch.save({}, path/'cycle_000.pth')
    plant(path/'progress.pth', marker)
    with pytest.raises(ValueError, match='progress.pth'): fit(small_learn(tmp_path), resume=True)
    fit(small_learn(tmp_path))
    assert not marker.exists() and (path/'progress.pth').exists() and (path/'cycle_000.pth').exists()


def test_weights_of_a_user_in_the_folder_are_no_snapshots(tmp_path):
    learn = small_learn(tmp_path)
    folder = folder_of(learn)
    folder.mkdir(parents=True)
    torch.save({}, folder/'model.pth')
    fit(learn, resume=True)
    assert len(manifest_of(folder)['cycles'])==3 and (folder/'model.pth').exists()

def test_a_manifest_with_an_empty_entry_is_refused(tmp_path):
    fit(small_learn(tmp_path))
    edit(tmp_path/'models/run', resume={})
    with pytest.raises(ValueError, match=f'{MANIFEST} must be a manifest'): fit(small_learn(tmp_path), resume=True)


@pytest.mark.parametrize('name', ['../mine.pth', '/etc/passwd', 'mine.pth', 'cycle_000_0123456789ab.pth/../mine.pth', '', None, 3])
@pytest.mark.parametrize('where', ['cycles','resume','obsolete','next'])
def test_a_manifest_names_nothing_but_its_own_files(tmp_path, name, where):
    fit(small_learn(tmp_path))
    path = tmp_path/'models/run'
    for mine in (path/'mine.pth', path.parent/'mine.pth'): mine.write_text('mine')
    entry = dict(file=name, sha256='')
    edit(path, **{where: dict(cycles={'0': entry}, resume=entry, obsolete=[name], next=name)[where]})
    for kw in (dict(resume=True), dict(overwrite=True)):
        with pytest.raises(ValueError, match=MANIFEST): fit(small_learn(tmp_path), **kw)
    assert (path/'mine.pth').exists() and (path.parent/'mine.pth').exists()


@pytest.mark.parametrize('content', ['', '{', '[]', '{}', 'null', '"a"', '['*100000, '{"format": "mine"}', b'\xff\xfe'])
def test_a_manifest_that_is_none_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path/'models/run'
    path.mkdir(parents=True)
    content = content if isinstance(content, bytes) else content.encode()
    (path/MANIFEST).write_bytes(content)
    for kw in ({}, dict(resume=True), dict(overwrite=True)):
        learn = small_learn(tmp_path, 0, count := Batches())
        with pytest.raises(ValueError, match=f'{MANIFEST} must be a manifest'): fit(learn, **kw)
        assert count.n==0
    assert bytes_of(path)=={MANIFEST: content}


def test_another_version_is_refused(tmp_path):
    fit(small_learn(tmp_path))
    edit(tmp_path/'models/run', version=2)
    with pytest.raises(ValueError, match='must have version 1, got version 2'): fit(small_learn(tmp_path), resume=True)


# One folder is one run


@pytest.mark.parametrize('who', ['another','copy','pickle','itself'])
def test_a_second_fit_in_the_folder_is_refused(tmp_path, who):
    learn = small_learn(tmp_path)
    fit(learn)
    want,before = preds(learn),bytes_of(folder_of(learn))
    second = dict(another=lambda: small_learn(tmp_path, 1), copy=lambda: deepcopy(learn),
                  pickle=lambda: pickle.loads(pickle.dumps(learn)), itself=lambda: learn)[who]()
    second.add_cb(count := Batches())
    kept = state(second)
    for n_cycles in (1, 4):
        with pytest.raises(ValueError, match='holds a run of 3 cycles.*resume=True.*overwrite=True.*another `path`'): fit(second, n_cycles=n_cycles)
    assert count.n==0 and same(kept, state(second)) and bytes_of(folder_of(learn))==before and torch.equal(preds(learn), want)
    if who!='another': assert torch.equal(preds(second), want) and ensemble(second).use=='average'


@pytest.mark.parametrize('who', ['another','itself'])
def test_overwrite_keeps_the_old_run_until_the_first_cycle_is_complete(tmp_path, who):
    learn = small_learn(tmp_path)
    fit(learn)
    want,before = preds(learn),bytes_of(path := folder_of(learn))
    second = learn if who=='itself' else small_learn(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt): fit(second, overwrite=True, cbs=StopAt(0))
    assert {n:b for n,b in bytes_of(path).items() if n!=MANIFEST} == {n:b for n,b in before.items() if n!=MANIFEST}
    again = small_learn(tmp_path, 2)
    fit(again, resume=True)
    assert torch.equal(preds(again), want)
    with pytest.raises(KeyboardInterrupt): fit(second, overwrite=True, cbs=StopAt(1))
    assert list(manifest_of(path)['cycles'])==['0'] and set(bytes_of(path))==named(path) | {MANIFEST}
    with pytest.raises(ValueError, match='cycle_000.*must be readable'): preds(again)
    fit(second, resume=True)
    if who=='another':
        with pytest.raises(ValueError, match='holds another run'): fit(learn, resume=True)     # its own is gone
    last = small_learn(tmp_path, 3)
    fit(last, resume=True)
    assert list(ensemble(second).record)==[0,1,2] and torch.equal(preds(last), preds(second))


@pytest.mark.parametrize('n_last', [None, 1])
def test_only_files_that_the_manifest_names_are_touched(tmp_path, n_last):
    mine = 'cycle_1.pth','cycle_000.pth','progress.pth','resume_000.pth','cycle_000.pth.tmp','cycle_000_0123456789ab.pth','snapshots_0123456789ab.tmp','snapshots.json.tmp','model.pth'
    path = tmp_path/'models'
    path.mkdir()
    for name in mine: (path/name).write_text('mine')
    for kw in ({}, dict(overwrite=True), dict(overwrite=True, n_cycles=2)):
        fit(small_learn(tmp_path), path='.', n_last=n_last, **kw)
        assert all((path/name).read_text()=='mine' for name in mine)
    fit(small_learn(tmp_path), path='.', n_last=n_last, resume=True)
    assert all((path/name).read_text()=='mine' for name in mine)
    assert set(bytes_of(path))=={*mine, MANIFEST, *named(path)}


def test_load_never_writes_into_the_folder(tmp_path):
    learn,other = small_learn(tmp_path),small_learn(tmp_path, 1)
    fit(learn)
    learn.save('mine')
    fit(other, path='other', n_cycles=2)
    other.save('other')
    before = bytes_of(folder_of(learn))
    learn.load('other')
    assert bytes_of(folder_of(learn))==before and torch.equal(preds(learn), preds(other))
    learn.load('mine')
    again = small_learn(tmp_path, 2)
    again.add_cb(SnapshotEnsemble())
    again.load('mine')
    assert bytes_of(folder_of(learn))==before and torch.equal(preds(again), preds(learn))
    fit(again, n_cycles=4, resume=True)         # what was loaded belongs to the run
    assert list(ensemble(again).record)==[0,1,2,3]


def test_snapshots_in_memory_do_not_go_on_in_the_folder_of_another_run(tmp_path):
    fit(small_learn(tmp_path))
    before = bytes_of(tmp_path/'models/run')
    learn = small_learn(tmp_path, 1, count := Batches())
    fit(learn, path=None, n_cycles=2)
    n,want = count.n,preds(learn)
    with pytest.raises(ValueError, match='holds another run.*overwrite=True'): fit(learn, resume=True)
    assert count.n==n and torch.equal(preds(learn), want) and bytes_of(tmp_path/'models/run')==before
    fit(learn, n_cycles=4, resume=True, overwrite=True)
    assert list(ensemble(learn).record)==[0,1,2,3] and set(bytes_of(tmp_path/'models/run'))==named(tmp_path/'models/run') | {MANIFEST}


def test_two_fits_at_the_same_time(tmp_path):
    class Second(Callback):
        def before_train(self):
            if self.epoch==1: fit(self.second, overwrite=True)
    learn = small_learn(tmp_path, 0, s := Second())
    s.second = small_learn(tmp_path, 1)
    with pytest.raises(ValueError, match='another fit has taken the folder'): fit(learn)
    again = small_learn(tmp_path, 2)
    fit(again, resume=True)
    assert_same_run(again, s.second)


def test_the_callback_in_other_fits(tmp_path):
    learn = small_learn(tmp_path)
    learn.fit(2, 1e-2, cbs=ZeroRestarts(1, path='run'))
    want,before = preds(learn),bytes_of(folder_of(learn))
    with pytest.raises(ValueError, match='overwrite=True'): learn.fit(1, 1e-2, cbs=ZeroRestarts(1, path='run'))
    assert torch.equal(preds(learn), want) and bytes_of(folder_of(learn))==before
    learn.fit(1, 1e-2, cbs=ZeroRestarts(1, path='run', overwrite=True))
    assert list(ensemble(learn).record)==[0] and len(bytes_of(folder_of(learn)))==3


def test_start_epoch_in_a_folder(tmp_path):
    learn = small_learn(tmp_path)
    fit(learn)
    first = members(learn)[0]
    with pytest.raises(ValueError, match='overwrite=True'): fit(learn, start_epoch=1)
    with pytest.raises(KeyboardInterrupt): fit(learn, start_epoch=1, overwrite=True, cbs=StopAt(1))
    assert len(manifest_of(folder_of(learn))['cycles'])==3
    fit(learn, start_epoch=1, overwrite=True)
    assert list(ensemble(learn).record)==[0,1,2] and same(members(learn)[0], first)
    assert set(bytes_of(folder_of(learn)))==named(folder_of(learn)) | {MANIFEST}


# Kills


def whole_run(tmp_path, n_last=2):
    learn = small_learn(tmp_path/'whole')
    fit(learn, n_last=n_last)
    return learn


def successor(path):
    "A Learner of a new process: with other weights, unless there is nothing to go on with"
    has_cycles = (path/'models/run'/MANIFEST).exists() and manifest_of(path/'models/run')['cycles']
    return small_learn(path, 9 if has_cycles else 0)


def whole_of_four():
    "What a run of one cycle more becomes that was never killed"
    learn = small_learn(None)
    fit(learn, path=None, n_cycles=4, n_last=2)
    return run_of(learn)


def resumed(path, whole, first_kills=0): # `first_kills` while the first manifest of all was written
    "Go on in `path` for a cycle more than was asked for, compare with the whole run, and see that no file is left over"
    learn = successor(path)
    fit(learn, n_cycles=4, resume=True, n_last=2)
    assert_same_run(learn, whole)
    left = set(bytes_of(path/'models/run'))-named(path/'models/run')-{MANIFEST}
    assert len(left)<=first_kills and all(name.startswith('snapshots_') for name in left)


@pytest.fixture
def n_instants(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        counted = Disk(m)
        whole_run(tmp_path)
    return counted.n


def kill_at(monkeypatch, path, at, **kw):
    with monkeypatch.context() as m:
        Disk(m, kill=at)
        with contextlib.suppress(Killed): fit(small_learn(path), n_last=2, **kw)


def check_kills(tmp_path, monkeypatch, instants):
    whole = whole_of_four()
    for at in instants:
        path = tmp_path/f'kill{at}'
        kill_at(monkeypatch, path, at)
        resumed(path, whole, first_kills=not (path/'models/run'/MANIFEST).exists())


@pytest.mark.parametrize('part', range(4))
def test_a_kill_at_any_instant_leaves_a_folder_to_go_on_from(tmp_path, monkeypatch, n_instants, part):
    assert n_instants>80
    check_kills(tmp_path, monkeypatch, range(part, n_instants+1, 4))


@pytest.mark.slow
def test_a_second_kill_while_it_goes_on(tmp_path, monkeypatch, n_instants):
    whole = whole_of_four()
    r = random.Random(0)
    for i in range(60):
        path = tmp_path/f'kill{i}'
        first_kills = 0
        for kw in ({}, dict(resume=True)):
            kill_at(monkeypatch, path, r.randrange(n_instants), **kw)
            first_kills += not (path/'models/run'/MANIFEST).exists()
        resumed(path, whole, first_kills=first_kills)


@pytest.mark.parametrize('part', range(2))
def test_a_kill_while_a_run_is_replaced(tmp_path, monkeypatch, n_instants, part):
    whole = whole_of_four()
    old = small_learn(tmp_path/'old', 1)
    fit(old, n_cycles=1)
    for at in range(part, 40, 2):
        path = tmp_path/f'kill{at}'
        fit(small_learn(path, 1), n_cycles=1)
        kill_at(monkeypatch, path, at, overwrite=True)
        found = small_learn(path, 9)
        fit(found, n_cycles=1, resume=True)
        row = ensemble(found).record.rows[0]
        if equal(row, ensemble(old).record.rows[0]): assert_same_run(found, old)        # either the old run is complete
        else: resumed(path, whole)                                                      # or the new one has begun


def test_what_is_renamed_is_on_the_disk_and_the_manifest_is_last(tmp_path, disk):
    d = disk()
    fit(small_learn(tmp_path))
    names = d.names
    for i,op in enumerate(names):
        if op[0]=='rename_file': assert names[i-1]==('sync_file', op[1]) and names[i-2]==('write_new', op[1])
    manifests = [i for i,op in enumerate(names) if op[0]=='rename_file' and op[2]==MANIFEST]
    assert len(manifests)==4 and all(names[i+1]==('sync_names','run') for i in manifests)      # claimed, and three cycles
    for i in manifests[1:]: assert names[i-3]==('sync_names','run') and names[i-4][0]=='rename_file' and names[i-4][2].startswith('resume')
    deletes = [i for i,op in enumerate(names) if op[0]=='delete_file']
    assert len(deletes)==2 and all(any(names[i-1]==('sync_names','run') and i-2==m for m in manifests) for i in deletes)


def check_real_kills(tmp_path, n):
    kw = dict(n_cycles=6, n_last=3)
    learn = small_learn(tmp_path/'memory')
    fit(learn, path=None, **kw)
    whole,start = run_of(learn),time.time()
    fit(small_learn(tmp_path/'time'), **kw)
    takes,r,ended = time.time()-start,random.Random(1),0
    for i in range(n):
        path = tmp_path/f'kill{i}'
        if not (pid := os.fork()):
            try: fit(small_learn(path), **kw)
            finally: os._exit(0)
        time.sleep(takes*r.random())
        os.kill(pid, signal.SIGKILL)
        ended += os.WIFEXITED(os.waitpid(pid, 0)[1])
        learn = successor(path)
        fit(learn, resume=True, **kw)
        assert_same_run(learn, whole)
    assert ended<n


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs `os.fork`')
def test_kill_9(tmp_path): check_real_kills(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs `os.fork`')
def test_kill_9_many_times(tmp_path): check_real_kills(tmp_path, 20)


@pytest.mark.parametrize('opt', [Adam, SGD, ranger, lambda ps,**kw: OptimWrapper(ps, torch.optim.AdamW, **kw)], ids=['Adam','SGD','ranger','torch'])
def test_the_optimizer_goes_on_as_it_was(tmp_path, opt):
    whole,part = [small_learn(tmp_path/p, opt_func=opt) for p in 'ab']
    fit(whole)
    with pytest.raises(KeyboardInterrupt): fit(part, cbs=StopAt(2))
    again = small_learn(tmp_path/'b', 9, opt_func=opt)
    fit(again, resume=True)
    assert same(state(whole), state(again)) and torch.equal(preds(whole), preds(again))
    assert equal(ensemble(whole).record.rows, ensemble(again).record.rows)


def test_the_row_of_a_validation_that_was_broken_off_is_missing_but_not_its_snapshot(tmp_path):
    class Stop(Callback):
        def after_validate(self):
            if self.epoch==1: raise KeyboardInterrupt
    learn = small_learn(tmp_path, 0, Stop())
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert list(ensemble(learn).record)==[0,1] and list(manifest_of(folder_of(learn))['cycles'])==['0','1']
    assert list(manifest_of(folder_of(learn))['rows'])==['0']


# Damage


def damage(path, how, other):
    "Damage a file, and return it"
    file = file_of(path, 1)
    content = file.read_bytes()
    if how=='truncated': file.write_bytes(content[:len(content)//2])
    if how=='empty': file.write_bytes(b'')
    if how=='bit': file.write_bytes(content[:500]+bytes([content[500]^1])+content[501:])
    if how=='missing': file.unlink()
    if how=='of another run': file.write_bytes(file_of(other, 1).read_bytes())
    if how=='of another cycle': file.write_bytes(file_of(path, 0).read_bytes())
    if how=='a folder': file.unlink(); file.mkdir()
    if how=='optimizer':
        file = path/manifest_of(path)['resume']['file']
        file.write_bytes(file.read_bytes()[:100])
    return file


@pytest.mark.parametrize('how', ['truncated','empty','bit','missing','of another run','of another cycle','a folder','optimizer'])
@pytest.mark.parametrize('who', ['another','itself'])
def test_damage_is_found_before_anything_trains(tmp_path, how, who):
    learn = small_learn(tmp_path)
    fit(learn)
    fit(small_learn(tmp_path, 1), path='other')
    if who=='another': learn = small_learn(tmp_path, 9)
    learn.add_cb(count := Batches())
    file = damage(tmp_path/'models/run', how, tmp_path/'models/other')
    kept = copy_state(learn.model)
    for n_cycles in (3, 5):
        with pytest.raises(ValueError) as e: fit(learn, n_cycles=n_cycles, resume=True)
        assert str(file) in str(e.value) and 'overwrite=True' in str(e.value)
    assert count.n==0 and same(kept, copy_state(learn.model))
    fit(learn, overwrite=True)          # as the message says
    assert set(manifest_of(tmp_path/'models/run')['cycles'])=={'0','1','2'}


def test_a_file_that_its_manifest_describes_otherwise(tmp_path):
    fit(small_learn(tmp_path))
    path = tmp_path/'models/run'
    file,m = file_of(path, 1),manifest_of(path)
    for wrong in ({'a': torch.ones(1)}, [1], {}, 3):
        torch.save(wrong, file)
        edit(path, cycles=m['cycles'] | {'1': dict(file=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())})
        with pytest.raises(ValueError, match=f'{file.name} must hold the weights that the manifest describes'): fit(small_learn(tmp_path), resume=True)


def test_nan(tmp_path):
    class Diverge(Callback):
        order = -20
        def before_validate(self):
            if self.epoch==1: self.learn.model[0].weight.data[0,0] = float('nan')
    fit(small_learn(tmp_path, 0, Diverge()), n_cycles=2)
    again = small_learn(tmp_path, 9, count := Batches())
    with pytest.raises(ValueError, match="cycle_001.*'0.weight' has NaN.*overwrite=True"): fit(again, resume=True)
    assert count.n==0


@pytest.mark.parametrize('model,differs', [
    (lambda: nn.Sequential(nn.Linear(4,12), nn.Linear(12,1)), r"'1.weight' has .* None, .* \[1, 12\]"), (lambda: make_model(2), r"'5.weight' has .* \[1, 8\].* \[2, 8\]"),
    (lambda: make_model().double(), "'0.weight' has .*float32.*float64")], ids=['names','shapes','dtypes'])
def test_another_model(tmp_path, model, differs):
    fit(small_learn(tmp_path))
    before = bytes_of(tmp_path/'models/run')
    with pytest.raises(ValueError, match='weights of the model.*models/run '+differs): fit(small_learn(tmp_path, model=model()), resume=True)
    assert bytes_of(tmp_path/'models/run')==before


def test_a_missing_manifest(tmp_path):
    fit(small_learn(tmp_path))
    (tmp_path/'models/run'/MANIFEST).unlink()
    with pytest.raises(ValueError, match=f'{MANIFEST} must name the snapshots.*missing'): fit(small_learn(tmp_path), resume=True)


# Full disks and folders that cannot be written to


def test_a_full_disk_at_any_operation(tmp_path, monkeypatch):
    whole = whole_of_four()
    with monkeypatch.context() as m:
        counted = Disk(m)
        whole_run(tmp_path)
    for at in range(counted.n_ops):
        path = tmp_path/f'full{at}'
        learn = small_learn(path, 0, count := Batches())
        with monkeypatch.context() as m:
            d = Disk(m, full=at)
            try: fit(learn, n_last=2)
            except OSError as e:
                assert e.errno==errno.ENOSPC and str(path/'models') in str(e)
                if at<5: assert count.n==0          # found at the start
                else: assert torch.isfinite(preds(learn)).all()     # the Learner still predicts
            d.full = None
        resumed(path, whole)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(file, data): raise OSError(errno.EROFS, 'Read-only file system', str(file))
    fit(small_learn(tmp_path))
    before = bytes_of(tmp_path/'models/run')
    monkeypatch.setattr(files, 'write_new', refuse)
    learn = small_learn(tmp_path, 9, count := Batches())
    for kw in (dict(path='new'), dict(overwrite=True), dict(n_cycles=4, resume=True)):
        with pytest.raises(OSError, match='Read-only.*resume=True.*models/(new|run)'): fit(learn, **kw)
    assert count.n==0 and bytes_of(tmp_path/'models/run')==before
    done = small_learn(tmp_path, 8)
    fit(done, resume=True)              # a run that is complete needs no writing
    assert len(ensemble(done).record)==3


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path/'models').mkdir()
    (tmp_path/'models/run').write_text('mine')
    learn = small_learn(tmp_path, 0, count := Batches())
    with pytest.raises(OSError, match='models/run'): fit(learn)
    assert count.n==0 and (tmp_path/'models/run').read_text()=='mine'


# Cost


def test_the_cost_of_a_cycle_does_not_grow(tmp_path, disk, monkeypatch):
    d = disk()
    reads = []
    load = store._load_file
    monkeypatch.setattr(store, '_load_file', lambda file, sha256: (reads.append(file.name), load(file, sha256))[1])
    ends = []
    class End(Callback):
        order = 100
        def after_epoch(self): ends.append((len(d.written), sum(n for name,n in d.written if 'snapshots' not in name), sum(n for name,n in d.written if 'snapshots' in name)))
    learn = small_learn(tmp_path, 0, End())
    learn.fit_zero_restarts(20, 1, path='run')
    files,tensors,manifests = np.diff(np.array(ends), axis=0).T
    assert set(files)=={3} and tensors.max()-tensors.min()<200      # one state, one optimizer, one manifest
    growth = np.diff(manifests)
    assert growth.max()<600, growth.max()        # a row and an entry
    fit_reads = len(reads)
    ensemble(learn).record.save()
    assert len(reads)==fit_reads           # writing reads no tensors


# Callbacks that watch the fit


def test_resume_with_callbacks_that_watch_a_column(tmp_path):
    trackers = lambda: [SaveModelCallback('valid_loss', fname='best', every_epoch=True), EarlyStoppingCallback('valid_loss', patience=20), ReduceLROnPlateau('valid_loss', patience=20)]
    whole,part = small_learn(tmp_path/'a'),small_learn(tmp_path/'b')
    kw = dict(n_cycles=4, cycle_len=2, path='run', seed=5)
    whole.fit_zero_restarts(**kw, cbs=trackers())
    with pytest.raises(KeyboardInterrupt): part.fit_zero_restarts(**kw, cbs=[*trackers(), StopAt(5)])
    again = small_learn(tmp_path/'b', 9)
    again.fit_zero_restarts(**kw, cbs=trackers(), resume=True)
    values = [list(l.recorder.values) for l in (whole, again)]
    assert len(values[0])==8 and equal(values[0][4:], values[1])
    assert_same_run(again, whole)
    assert {f'best_{e}.pth' for e in range(8)} <= set(bytes_of(tmp_path/'b/models'))


@pytest.mark.parametrize('tracker', [lambda: SaveModelCallback('average_loss', fname='best'), lambda: SaveModelCallback(fname='best'),
                                     lambda: EarlyStoppingCallback('average_loss', patience=1), lambda: EarlyStoppingCallback(patience=1), lambda: ReduceLROnPlateau('average_loss')])
def test_each_of_them_in_the_same_process_and_in_another(tmp_path, tracker):
    with contextlib.redirect_stdout(None):
        learn = small_learn(tmp_path)
        with contextlib.suppress(KeyboardInterrupt): fit(learn, n_cycles=6, cbs=[tracker(), StopAt(3)])
        before = bytes_of(folder_of(learn))
        assert len(before)>=3
        for again in (learn, small_learn(tmp_path, 9)):
            fit(again, n_cycles=6, resume=True, cbs=tracker())
            assert torch.isfinite(preds(again)).all()
        fit(learn, n_cycles=8, resume=True, cbs=tracker())


def test_save_model_does_not_shrink_the_run(tmp_path):
    class Losses(Callback):
        "Let the second cycle have the best average"
        order = 55
        def after_epoch(self): self.learn.recorder.values[-1][1] = abs(self.epoch-1.)
    learn = small_learn(tmp_path, 0, Losses())
    with contextlib.redirect_stdout(None): fit(learn, n_cycles=4, cbs=SaveModelCallback('valid_loss', fname='best'))
    assert list(ensemble(learn).record)==[0,1] and len(manifest_of(folder_of(learn))['cycles'])==4
    fit(learn, n_cycles=5, resume=True)
    assert list(ensemble(learn).record)==[0,1,2,3,4]


# Several processes


@pytest.mark.skipif(os.environ.get('TEST_DISTRIBUTED')!='1', reason='two processes that meet on a port of this machine: set TEST_DISTRIBUTED=1')
def test_two_processes_write_one_run_and_fail_together(two_processes):
    two_processes('''
        import errno
        from test_snapshot_store import *
        learn = make_learn(seed=rank, path=Path('.'))
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_zero_restarts(2, 1, path='run')
        a,b = gather(members(learn))
        assert all(same(x, y) for x,y in zip(a, b))
        a,b = gather(ensemble(learn).record.run)
        assert a==b and len(bytes_of(folder_of(learn)))==4
        def full(file, data): raise OSError(errno.ENOSPC, 'No space left on device', str(file))
        for kw in ({}, dict(path='other')):
            files.write_new = full
            second = make_learn(seed=rank, path=Path('.'))
            try:
                with second.distrib_ctx(sync_bn=False, cpu=True): second.fit_zero_restarts(2, 1, **(dict(path='run') | kw))
                error = None
            except (OSError,ValueError) as e: error = type(e).__name__
            a,b = gather(error)
            assert a==b==('OSError' if kw else 'ValueError'), (a, b)
    ''')
