"Files of models that strangers wrote: what does not fit is refused by name, before memory is taken, and nothing is run"
import hashlib, json, os, re, shutil, struct
from functools import partial
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders
from conftest import make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.calibrate import calibration_of
from fastai_dropconnect.ensemble.blend import BlendedModel
from fastai_dropconnect.ensemble.boosted import BoostedModel
from fastai_dropconnect.serialize.files import SavedModel
from fastai_dropconnect.serialize.network import check_network
from fastai_dropconnect.serialize.reader import build_frame, build_reader, describe_frame, describe_reader
from fastai_dropconnect.tabular.copies import CopyReader
from test_serialize import LEARNERS, classes, config, frame_for, preds, quantiles, shake, small, with_snapshots

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')/'m'
    learn = with_snapshots(small(config=config(members=2, num_embeddings=PLE(4, 5)), cbs=FrozenZeroInit(.5, seed=1)))
    learn.frozen_zero_init.record['layers.0.0.weight'] = torch.rand(learn.model.layers[0][0].weight.shape)>.5
    return save_model(learn, path)

@pytest.fixture
def path(saved, tmp_path): return Path(shutil.copytree(saved, tmp_path/'m'))

def description(path): return json.loads((path/'model.json').read_text())
def write(path, config): (path/'model.json').write_text(json.dumps(config))

def put(config, where, value):
    "Change the value at the end of a path of keys; `...` deletes it"
    *parents,last = where
    for k in parents: config = config[k]
    if value is ...: del config[last]
    else: config[last] = value

HUGE = 2**40
FIELDS = [ # where, what, what the message names
    (['format'], 'other', 'format'), (['version'], 2, 'version 1, got version=2'), (['version'], True, 'version'), (['version'], ..., 'version'),
    (['tensors','file'], '../../etc/passwd', '`tensors` must name'), (['tensors','file'], '/etc/passwd', '`tensors` must name'), (['tensors','file'], 3, '`tensors` must name'),
    (['tensors','file'], 'model-0123456789abcdef.safetensors', '`tensors` must name'), (['tensors','size'], HUGE, 'bytes'), (['tensors','size'], -1, '`tensors`'),
    (['tensors','sha256'], None, '`tensors` must name'), (['tensors'], [], '`tensors` must have'), (['network'], ..., 'network'), (['network'], [], 'network'),
    (['hook'], 'os.system', "unknown field 'hook'"), (['network','class'], 'os.system', 'network.class'), (['network','layers'], [HUGE,HUGE], 'layers.0.0.weight'),
    (['network','layers',0], -1, 'network.layers'), (['network','layers'], ['12'], 'network.layers'), (['network','emb_szs',0,0], HUGE, 'embeds.0.weight'),
    (['network','members','n'], HUGE, 'tensor'), (['network','members','n'], 0, 'network.members.n'), (['network','num_embeddings','n_bins',0], HUGE, 'num_embeds'),
    (['network','num_embeddings','dim'], 1.5, 'network.num_embeddings.dim'), (['network','act','class'], 'Sequential', 'network.act.class'),
    (['network','y_range'], 'x', 'network.y_range'), (['network','n_cont'], 3, 'one per continuous column'), (['network','mode'], ..., 'network.mode'),
    (['table','cat_names'], ['color'], 'table.cat_names'), (['table','cat_names',0], 'a', 'each column once'), (['table','cont_names',0], 3, 'table.cont_names'),
    (['table','procs',0,'class'], 'eval', r'table.procs\[0\].class'), (['table','procs'], [1], 'table.procs'), (['table','loaders'], [], 'table.loaders'),
    (['table','loaders',0,'class'], 'DataLoader', r'table.loaders\[0\].class'), (['table','loaders',0,'bs'], 0, r'table.loaders\[0\].bs'), (['table','more'], 1, "'more'"),
    (['loss','class'], 'system', 'loss.class'), (['loss','func'], 'x', "'func'"), (['loss','reduction'], 'x', 'loss.reduction'),
    (['training','opt','class'], 'system', 'training.opt.class'), (['training','lr'], 'x', 'training.lr'), (['training','frozen'], ['x'], 'training.frozen'),
    (['callbacks',0,'class'], 'SaveModelCallback', r'callbacks\[0\].class'), (['callbacks',0,'sparsity'], 2, r'callbacks\[0\].sparsity'),
    (['callbacks',0,'per'], 'col', r'`callbacks\[0\]`: `per`'), (['callbacks',0,'masks'], ['layers.9.weight'], 'layers.9.weight'), (['callbacks',0,'masks'], ['layers.0.2.weight'], 'mask.layers.0.2'),
    (['callbacks',0,'masks'], [], 'no tensor .mask'), (['callbacks',0,'seed'], 'x', 'seed'), (['snapshots','cycles'], [0,0,1], 'snapshots.cycles'),
    (['snapshots','cycles'], [0,1], 'no tensor .snapshot.2'), (['snapshots','cycles'], [0,1,2,3], 'snapshot.3'), (['snapshots','use'], 'weights', 'snapshots.use'),
    (['snapshots','average'], ['median',-1], 'snapshots.average'), (['snapshots','mean'], True, 'mean.'), (['snapshots'], 3, 'snapshots'), (['calibration'], {}, 'calibration'),
    (['snapshots','average'], 'mean', 'snapshots.average'), (['snapshots','average'], ['mean'], 'snapshots.average'), (['snapshots','average'], ['mean',1.5], 'snapshots.average'),
    (['snapshots','average'], ['mean',9], 'snapshots.average'), (['snapshots','more'], 1, "'more'"), (['snapshots','rows'], [1], 'snapshots.rows'), (['snapshots','cycles'], ['0',1,2], 'snapshots.cycles'),
    (['table','cat_names',0], 3, 'table.cat_names'), (['table','loaders'], [1], 'table.loaders'), (['callbacks'], [1], 'callbacks'), (['callbacks',0,'masks'], [['x']], 'callbacks'),
    (['network'], 3, 'network'), (['table'], 3, 'table'), (['loss'], [], 'loss'), (['training'], [], 'training'), (['table','y_names'], [1], 'table.y_names'),
    (['network','act','more'], 1, "'more'"), (['network','num_embeddings','more'], 1, "'more'"), (['network','members','more'], 1, "'more'"),
    (['network','hook'], 1, "'hook'"), (['network','y_range'], [1], 'network.y_range'), (['network','y_range'], [0,'a'], 'network.y_range'),
    (['snapshots','use'], True, 'snapshots.use'), (['tensors'], 3, '`tensors` must have'), (['tensors','more'], 1, '`tensors` must have'), (['tensors','size'], '1', '`tensors` must have'),
    (['network','members','sparsity'], 1, 'network.members.sparsity'), (['network','num_embeddings','weight_p'], 1.5, 'network.num_embeddings.weight_p'),
    (['network','num_embeddings','n_bins'], [5], 'network.num_embeddings.n_bins'), (['network','layers',0], True, 'network.layers'),
    (['network','emb_szs',0], 3, 'network.emb_szs'), (['network','emb_szs',0], [3], 'network.emb_szs'), (['network','emb_szs',0], [3,2,1], 'network.emb_szs')]

@pytest.mark.parametrize('where,value,named', FIELDS, ids=lambda v: '.'.join(map(str, v)) if isinstance(v, list) and v and isinstance(v[0], str) else None)
def test_a_field_that_does_not_fit_is_refused_by_name(path, where, value, named, monkeypatch):
    config = description(path)
    put(config, where, value)
    write(path, config)
    with pytest.raises(ValueError, match=named): load_model(path)


CATEGORIES = [(dict(kind='int'), 'kind'), (dict(values=[{}]), 'of kind'), (dict(values=['a']*1000), 'at most'), (dict(kind='os.system'), 'kind'), (dict(column=1), 'column'), (dict(column=['color']), 'column'),
              (dict(more=1), '`kind` and `values`'), (dict(values='abc'), '`kind` and `values`'), (dict(kind=3), 'got kind=3'), (dict(kind=['str']), 'got kind='),
              (dict(kind=['str']*4), 'got kind='), (dict(kind=['str','str',1]), 'got kind='), (dict(kind='numpy.object_'), 'of kind'), (dict(kind='os.int64', values=[1]), 'of kind'), (dict(kind='numpy.complex64', values=[1.5]), 'of kind'),
              (dict(kind='time.D', values=['2020-01-01']), 'of kind'), (dict(kind='os.us', values=['2020-01-01']), 'of kind'), (dict(kind='numpy.int8', values=[1000]), 'of kind'),
              (dict(kind='float', values=['1']), 'of kind'), (dict(kind='float', values=[1]), 'of kind'), (dict(kind='int', values=[True]), 'of kind'), (dict(kind='bool', values=[1]), 'of kind'),
              (dict(kind='date', values=['today']), 'of kind'), (dict(kind='date', values=[1]), 'of kind'), (dict(kind='time.us', values=['today']), 'of kind'), (dict(kind='time.us', values=[0]), 'of kind'), (dict(kind='time.us', values=[{}]), 'of kind')]

@pytest.mark.parametrize('change,named', CATEGORIES)
def test_categories_that_do_not_fit_are_refused(path, change, named):
    config = description(path)
    proc = next(p for p in config['table']['procs'] if p['class']=='Categorify')
    proc['classes'][0].update(change)
    write(path, config)
    with pytest.raises(ValueError, match=named): load_model(path)


@pytest.mark.parametrize('proc,field,names', [('Categorify','classes','cat_names'), ('Normalize','means','cont_names'), ('Normalize','stds','cont_names')])
def test_what_a_prediction_needs_of_a_column_is_there(path, proc, field, names):
    config = description(path)
    own = next(p for p in config['table']['procs'] if p['class']==proc)[field]
    if proc=='Categorify': own[0]['column'] = 'other'
    else: own['columns'][0] = 'other'
    write(path, config)
    with pytest.raises(ValueError, match=f'{proc} must have {field} of all columns in `{names}`'): load_model(path)

@pytest.fixture(scope='module')
def filled(tmp_path_factory):
    "Two classes, of a table whose column `a` has gaps and whose column `b` has none"
    path = tmp_path_factory.mktemp('filled')
    def save(fill):
        dls = TabularDataLoaders.from_df(classes()[:200], procs=[Categorify,fill,Normalize], cat_names=['color'], cont_names=['a','b'], y_names='y', valid_idx=range(150, 200))
        return save_model(shake(tabular_learner(dls, layers=[4])), path/fill.__name__)
    return {fill.__name__: save(fill) for fill in (FillMissing,FillMissingAnywhere)}

def fills(*columns, kind='float', value=0.): return dict(columns=list(columns), kind=kind, values=[value]*len(columns))

@pytest.mark.parametrize('proc,change,named', [
    ('FillMissing', dict(na_dict=fills('c')), "na_dict of columns in `cont_names`, got 'c'"), ('FillMissing', dict(na_dict=fills('a','color')), "got 'color'"),
    ('FillMissing', dict(na_dict=fills('a','b')), "with add_col must have 'b_na' in `cat_names`"), ('FillMissing', dict(na_dict=fills('a', kind='str', value='x')), 'na_dict` must have a number for each column'),
    ('FillMissingAnywhere', dict(na_dict=fills('a')), "na_dict of all columns in `cont_names`, but 'b' has none"), ('FillMissingAnywhere', dict(na_dict=fills('a','b','c')), "got 'c'"),
    ('FillMissingAnywhere', dict(with_gaps=['a','b']), "with add_col must have 'b_na'"), ('FillMissingAnywhere', dict(with_gaps=['c']), "with_gaps of columns in `cont_names`, got 'c'"),
    ('Normalize', dict(means=fills('a','b', kind='str', value='x')), 'means` must have a number for each column')])
def test_gaps_are_filled_in_columns_of_the_table(filled, tmp_path, proc, change, named):
    kind = proc if proc in filled else 'FillMissing'
    path = Path(shutil.copytree(filled[kind], tmp_path/'m'))
    load_model(path)
    config = description(path)
    next(p for p in config['table']['procs'] if p['class']==proc).update(change)
    write(path, config)
    with pytest.raises(ValueError, match=named): load_model(path)

@pytest.mark.parametrize('axis', [2, -3, 5, 1.5, True, None])
def test_the_axis_of_a_loss_is_one_of_the_outputs(filled, tmp_path, axis):
    path = Path(shutil.copytree(filled['FillMissing'], tmp_path/'m'))
    config = description(path)
    config['loss']['axis'] = 1
    write(path, config)
    load_model(path)
    config['loss']['axis'] = axis
    write(path, config)
    with pytest.raises(ValueError, match='`loss.axis` must be an integer from -2 to 1'): load_model(path)

def test_a_number_of_targets_is_a_number(path):
    config = description(path)
    next(p for p in config['table']['procs'] if p['class']=='RegressionSetup')['c'] = 'one'
    write(path, config)
    with pytest.raises(ValueError, match=r'table.procs\[\d\].c'): load_model(path)


def test_shapes_are_checked_before_anything_is_read(path, monkeypatch):
    "Neither the tensors nor a model are made when the description asks for more than the file has"
    import fastai_dropconnect.serialize.learner as module
    def never(*args, **kw): raise AssertionError('too early')
    monkeypatch.setattr(SavedModel, 'tensors', never)
    monkeypatch.setattr(module, 'build_network', never)
    for where in (['network','layers',0], ['network','emb_szs',1,1], ['network','out_sz'], ['network','members','n'], ['network','num_embeddings','dim']):
        config = description(path)
        put(config, where, HUGE)
        write(path, config)
        with pytest.raises(ValueError, match='tensor'): load_model(path)


TEXTS = [(b'{"a": NaN}', 'NaN'), (b'{"format": 1, "format": 2}', 'twice'), (b'['*10**6, 'plain JSON'), (b'{"a": 1e999}', 'too large'), (b'', 'plain JSON'), (b'\x80\x04N.', 'plain JSON'),
         (b'[1]', 'object'), (b'{"a": ' + b'1'*10**5 + b'}', 'plain JSON'), (b'{"format": "fastai_dropconnect.model", "version": 1', 'plain JSON')]

@pytest.mark.parametrize('text,named', TEXTS, ids=range(len(TEXTS)))
def test_a_description_that_is_not_plain_json_is_refused(path, text, named):
    (path/'model.json').write_bytes(text)
    with pytest.raises(ValueError, match=named): load_model(path)


def header_of(data):
    n = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8:8+n]),data[8+n:]

def with_header(path, header, body, size=None):
    "Write a file of tensors with its checksum, as a stranger can"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack('<Q', len(text) if size is None else size)+text+body
    config = description(path)
    sha256 = hashlib.sha256(data).hexdigest()
    (path/config['tensors']['file']).unlink()
    config['tensors'] = dict(file=f'model-{sha256[:16]}.safetensors', size=len(data), sha256=sha256)
    (path/config['tensors']['file']).write_bytes(data)
    write(path, config)

NAME = 'model.layers.0.0.weight'
HEADERS = [
    (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[HUGE,HUGE])}, b), 'bytes of its shape'), (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[2**62,4])}, b), 'shape'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[-12,-1])}, b), 'shape'), (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[1]*9)}, b), 'shape'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(data_offsets=h['model.embeds.0.weight']['data_offsets'])}, b), 'bytes'),
    (lambda h,b: (h | dict(extra=dict(dtype='U8', shape=[4], data_offsets=[0,4])), b), 'must start at'),
    (lambda h,b: (h | dict(extra=dict(dtype='U8', shape=[2], data_offsets=[len(b),len(b)+2])), b+b'xx'), "no tensor 'extra'"),
    (lambda h,b: ({n:e for n,e in h.items() if n!=NAME}, b), 'must start at|fill'), (lambda h,b: (h | {NAME: h[NAME] | dict(dtype='I32')}, b), 'dtype'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(more=1)}, b), NAME), (lambda h,b: (h | {NAME: 3}, b), NAME), (lambda h,b: (h, b[:-1]), 'fill'), (lambda h,b: (h, b+b'x'), 'fill'),
    (lambda h,b: (json.dumps(h).replace('{', '{"a": NaN, ', 1).encode(), b), 'NaN'), (lambda h,b: (b'['*10**6, b), 'plain JSON'), (lambda h,b: ([], b), 'object'),
    (lambda h,b: ((json.dumps(h)[:-1]+f', "{NAME}": {json.dumps(h[NAME])}'+'}').encode(), b), 'twice'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(shape=h[NAME]['shape'][::-1])}, b), f'{NAME}.*must have'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(shape=h[NAME]['shape']+[1]*7)}, b), 'at most 8 sizes'), (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[-n for n in h[NAME]['shape']])}, b), 'at most 8 sizes'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(shape=12)}, b), 'at most 8 sizes'), (lambda h,b: (h | {NAME: h[NAME] | dict(shape=[*h[NAME]['shape'],True])}, b), 'at most 8 sizes'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(data_offsets=h[NAME]['data_offsets']+[0])}, b), 'two offsets'), (lambda h,b: (h | {NAME: h[NAME] | dict(data_offsets=3)}, b), 'two offsets'),
    (lambda h,b: (h | {NAME: h[NAME] | dict(data_offsets=[float(n) for n in h[NAME]['data_offsets']])}, b), 'two offsets'), (lambda h,b: (h | {NAME: h[NAME] | dict(dtype=['F32'])}, b), 'a dtype of')]

@pytest.mark.parametrize('change,named', HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_does_not_fit_is_refused(path, change, named):
    header,body = header_of((path/description(path)['tensors']['file']).read_bytes())
    with_header(path, *change(header, body))
    with pytest.raises(ValueError, match=named): load_model(path)


@pytest.mark.parametrize('size', [0, 1, 2**63, 2**24+1, 10**6])
def test_a_header_with_a_wrong_size_is_refused(path, size):
    header,body = header_of((path/description(path)['tensors']['file']).read_bytes())
    with_header(path, header, body, size)
    with pytest.raises(ValueError, match='header'): load_model(path)


def test_tensors_of_the_same_bytes_and_other_dtype_or_place_are_refused(path):
    header,body = header_of((path/description(path)['tensors']['file']).read_bytes())
    b = 'snapshot.0.layers.1.0.masks'
    n = 'model.layers.0.2.num_batches_tracked'
    with_header(path, header | {n: header[n] | dict(dtype='F64')}, body)
    with pytest.raises(ValueError, match=n): load_model(path)
    with_header(path, {(b+'x' if k==b else k):v for k,v in header.items()}, body)
    with pytest.raises(ValueError, match=b): load_model(path)


def test_files_that_are_cut_swapped_missing_or_no_files_are_refused(path):
    file = path/description(path)['tensors']['file']
    data = file.read_bytes()
    for bad in (data[:100], data[:-1], b'', data+b'x'):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='must have .* bytes'): load_model(path)
    file.write_bytes(data[:-1]+bytes([data[-1]^1]))
    with pytest.raises(ValueError, match='checksum'): load_model(path)
    file.unlink()
    with pytest.raises(ValueError, match='must be readable'): load_model(path)
    file.mkdir()
    with pytest.raises(ValueError, match='regular file'): load_model(path)
    file.rmdir()
    if os.name!='nt':
        for target in ('/dev/zero', '/etc/hostname'):       # never ends, or is somebody else's
            file.symlink_to(target)
            with pytest.raises(ValueError, match='regular file|bytes|readable'): load_model(path)
            file.unlink()
        os.mkfifo(file)                                      # would block
        with pytest.raises(ValueError, match='regular file'): load_model(path)
        file.unlink()
        (path/'model.json').unlink()
        (path/'model.json').symlink_to('/dev/zero')
        with pytest.raises(ValueError, match='regular file'): load_model(path)
        (path/'model.json').unlink()
        (path/'model.json').symlink_to('/proc/self/mem')     # a file that says it has no bytes, and fails when it is read
        with pytest.raises(ValueError, match='readable'): load_model(path)
    for name in ('nothing', 'a\0b'):
        with pytest.raises(ValueError, match='readable'): load_model(path/name)

def test_a_description_that_is_too_large_is_neither_read_nor_written(path, monkeypatch):
    import fastai_dropconnect.serialize.files as files
    learn = load_model(path)
    monkeypatch.setattr(files, 'MAX_JSON', 1000)
    with pytest.raises(ValueError, match='model.json must have at most 1000 bytes'): load_model(path)
    with pytest.raises(ValueError, match='model.json must have at most 1000 bytes'): save_model(learn, path.parent/'other')
    assert not (path.parent/'other').exists()


class Runs:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return open,(str(self.marker), 'w')

def test_nothing_in_the_folder_is_executed(path, tmp_path):
    import pickle
    marker = tmp_path/'ran'
    bad = pickle.dumps(Runs(marker))
    file = path/description(path)['tensors']['file']
    for target in (file, path/'model.json'):
        good = target.read_bytes()
        for data in (bad, bad+b'\0'*(len(good)-len(bad))):
            target.write_bytes(data)
            with pytest.raises(ValueError): load_model(path)
        target.write_bytes(good)
    for extra in ('model.pkl','model.pth','__init__.py'): (path/extra).write_bytes(bad)
    load_model(path)
    assert not marker.exists()


# Other kinds of models

def calibrated(learn, *args, **kw):
    learn.calibrate(*args, **kw)
    return learn

def blend():
    learn = small(classes())
    learn.model = BlendedModel([learn.model, small(classes(), seed=1).model], average='softmax')
    return learn

def pruned(columns):
    learn = small()
    layer = learn.model.layers[0][0]
    with torch.no_grad():
        learn.model.layers[1][0].weight[:,:5] = 0       # their units are gone
        if columns: layer.weight[:,-1] = 0
    learn.model = compact(learn.model)
    return learn

KINDS = dict(blend=blend, split=lambda: calibrated(small()), temperature=lambda: calibrated(small(classes())), compact=lambda: pruned(False), columns=lambda: pruned(True),
             groups=lambda: calibrated(small(), .5, by='b', group='color', last=9, half_life=3.), quantiles=quantiles,
             ends=lambda: calibrated(small(noise='quantile'), symmetric=False),
             noise=lambda: calibrated(small(noise='mixture', config=config(members=2)), method='local'))

@pytest.fixture(scope='module')
def saved_kinds(tmp_path_factory):
    path = tmp_path_factory.mktemp('kinds')
    return {n: (learn, save_model(learn, path/n)) for n,learn in ((n, f()) for n,f in KINDS.items())}

@pytest.mark.parametrize('kind', KINDS)
def test_other_kinds_of_models_come_back(saved_kinds, kind):
    learn,path = saved_kinds[kind]
    again = load_model(path)
    df = frame_for(learn)
    assert torch.equal(preds(again, df), preds(learn, df)) and repr(again.model)==repr(learn.model)
    a,b = calibration_of(learn),calibration_of(again)
    assert (a is None)==(b is None) and (a is None or str(a.settings())==str(b.settings()))
    if a is not None: pd.testing.assert_frame_equal(learn.predict_distribution(df), again.predict_distribution(df))

OTHER_FIELDS = [
    ('blend', ['network','models'], [], 'network.models'), ('blend', ['network','models'], {}, 'network.models'), ('blend', ['network','models',1,'out_sz'], 3, 'tensor|same columns'),
    ('blend', ['network','models',1,'emb_szs',0,0], 9, 'same columns'), ('blend', ['network','models',1,'n_cont'], 1, 'same columns'), ('blend', ['network','average'], 'max', 'network.average'),
    ('blend', ['network','temperature'], 0, 'network.temperature'), ('blend', ['network','temperature'], 'x', 'network.temperature'), ('blend', ['network','more'], 1, "'more'"),
    ('blend', ['network','models',1,'class'], 'Sequential', 'network.class'), ('blend', ['network','class'], 'BoostedModel', 'network'), ('blend', ['network','class'], 'AveragedModel', 'network'),
    ('split', ['calibration','level'], 1.5, 'calibration.level'), ('split', ['calibration','method'], 'eval', 'calibration.method'), ('split', ['calibration','n_rows'], HUGE, 'calibration.scores'),
    ('split', ['calibration','n_targets'], 2, 'calibration.scores'), ('split', ['calibration','n_rows'], -1, 'calibration.n_rows'), ('split', ['calibration','fitted'], True, 'calibration.noise'),
    ('split', ['calibration','by'], 'a', 'calibration.times'), ('split', ['calibration','group'], 'color', 'calibration.groups'), ('split', ['calibration','by'], 3, 'calibration.by'),
    ('split', ['calibration'], None, 'no tensor .calibration'), ('split', ['calibration','method'], 'temperature', 'no tensor .calibration'),
    ('split', ['calibration','more'], 1, "'more'"),
    ('temperature', ['calibration','temperature'], -1, 'calibration.temperature'), ('temperature', ['calibration','method'], 'split', 'calibration.scores'),
    ('ends', ['calibration','symmetric'], True, 'calibration.scores'), ('ends', ['calibration','symmetric'], 1, 'calibration.symmetric'),
    ('ends', ['calibration','symmetric'], ..., 'calibration.scores'), ('ends', ['calibration','method'], 'pit', 'calibration.symmetric'),
    ('groups', ['calibration','groups',0], 3, 'calibration.groups'), ('groups', ['calibration','groups'], ['red'], 'calibration.groups'), ('groups', ['calibration','last'], 0, 'calibration.last'),
    ('groups', ['calibration','half_life'], 0, 'calibration.half_life'), ('groups', ['calibration','half_life'], 'x', 'calibration.half_life'), ('groups', ['calibration','last'], 2.5, 'calibration.last'),
    ('groups', ['calibration','by'], None, 'calibration.times'), ('groups', ['calibration','group'], None, 'calibration.groups'),
    ('quantiles', ['table','procs',3,'n'], HUGE, 'quantiles'), ('quantiles', ['table','procs',3,'n'], 0, 'no tensor .quantiles'), ('quantiles', ['table','procs',3,'output_distribution'], 'x', r'table.procs\[3\]'),
    ('quantiles', ['table','procs',3,'n_quantiles'], ..., r'table.procs\[3\]'), ('quantiles', ['table','procs',3,'more'], 1, "'more'"),
    ('quantiles', ['table','procs',0,'fill_strategy'], 'eval', r'table.procs\[0\].fill_strategy'), ('quantiles', ['table','procs',0,'na_dict','columns'], ['a'], 'na_dict of all columns'),
    ('quantiles', ['table','procs',0,'na_dict','columns'], ['a','b','b'], r'table.procs\[0\].na_dict'),
    ('quantiles', ['table','procs',0,'with_gaps'], 'a', r'table.procs\[0\].with_gaps'), ('quantiles', ['table','procs',0,'add_col'], 1, r'table.procs\[0\].add_col'),
    ('noise', ['network','noise','kind'], 'x', 'network.noise.kind'), ('noise', ['network','noise','n_parts'], HUGE, 'network.out_sz'), ('noise', ['network','noise','n_levels'], 1, 'network.noise.n_levels'),
    ('noise', ['network','noise','more'], 1, "'more'"),
    ('noise', ['network','noise','beta'], 1, 'network.noise.beta'), ('noise', ['network','noise','n_targets'], 0, 'network.noise.n_targets'), ('noise', ['network','y_range'], [0,1], 'network.y_range'),
    ('noise', ['loss','shares'], [1], 'loss.shares` must be 2'), ('noise', ['loss','shares'], [1e308,1], 'loss.shares` must have the sum 1'), ('noise', ['loss','shares'], [1,-1], 'loss.shares'), ('noise', ['loss','shares'], [1,'x'], 'loss.shares'),
    ('noise', ['network','noise','beta'], -1, 'network.noise.beta'), ('noise', ['network','noise','beta'], '0', 'network.noise.beta'), ('noise', ['network','noise','n_parts'], 0, 'network.noise.n_parts'),
    ('noise', ['loss','sd'], [1,1], 'loss.sd'), ('noise', ['loss','sd'], [0], 'loss.sd'), ('noise', ['loss','n_parts'], 7, 'loss.n_parts'), ('noise', ['loss','reduction'], 'x', 'loss.reduction'),
    ('columns', ['network','columns',0], [1,0,2,3], 'network.columns'), ('columns', ['network','columns',1], [2], 'network.columns` must be 1 numbers below 2'), ('columns', ['network','columns',1], [True], 'network.columns'),
    ('columns', ['network','columns',1], None, 'network.columns` must be 1 numbers'), ('columns', ['network','n_columns'], [4], 'network.n_columns'), ('columns', ['network','hook'], 1, "'hook'"),
    ('columns', ['network','model','layers'], [-1], 'network.layers'), ('columns', ['network','model','class'], 'CompactModel', 'network.model'), ('columns', ['network','model'], [], 'network.model'),
    ('split', ['calibration','p'], 1, 'calibration.p'), ('split', ['calibration','p'], 'x', 'calibration.p'), ('split', ['calibration','use'], 'best', 'calibration.use'), ('split', ['calibration','use'], -1, 'calibration.use'),
    ('compact', ['network','layers',0], 12, 'layers.0.0.weight'), ('compact', ['network','ps'], [0], 'network.ps'), ('compact', ['network','class'], 'CompactModel', 'network.n_columns')]

@pytest.mark.parametrize('kind,where,value,named', OTHER_FIELDS, ids=lambda v: '.'.join(map(str, v)) if isinstance(v, list) and v and isinstance(v[0], str) else None)
def test_a_field_of_other_kinds_that_does_not_fit_is_refused_by_name(saved_kinds, tmp_path, kind, where, value, named):
    path = Path(shutil.copytree(saved_kinds[kind][1], tmp_path/'m'))
    config = description(path)
    put(config, where, value)
    write(path, config)
    with pytest.raises(ValueError, match=named): load_model(path)


BOOSTED = {'class': 'BoostedModel'} | dict(n_bytes=[5], n_levels=[3], n_cont=1, out_sz=1, average='mean')

@pytest.mark.parametrize('change,named', [
    (dict(n_bytes=[0]), 'network.n_bytes'), (dict(n_levels=['a']), 'network.n_levels'), (dict(n_cont=-1), 'network.n_cont'), (dict(n_levels=[], n_cont=0), 'must have columns'),
    (dict(out_sz=0), 'network.out_sz'), (dict(average='sigmoid'), 'network.average'), (dict(hook=1), "'hook'")])
def test_boosted_trees_of_strangers_are_checked(change, named):
    check_network(BOOSTED)
    for fine in (dict(n_levels=[]), dict(n_cont=0)): check_network(BOOSTED | fine)
    with pytest.raises(ValueError, match=named): check_network(BOOSTED | change)

# One tree that splits the first of two columns
TREE = ('Tree=0\nnum_leaves=2\nnum_cat=0\nsplit_feature=0\nsplit_gain=1\nthreshold=0.5\ndecision_type=2\nleft_child=-1\nright_child=-2\nleaf_value=1 2\nleaf_weight=5 5\nleaf_count=5 5\n'
        'internal_value=1\ninternal_weight=10\ninternal_count=10\nis_linear=0\nshrinkage=1\n\n\n')

def with_trees(path, tree):
    "Save a Learner whose blend has a tree"
    learn = small()
    levels,n_cont = [e.num_embeddings for e in learn.model.embeds],learn.model.n_cont
    n = len(levels)+n_cont
    text = (f'tree\nversion=v4\nnum_class=1\nnum_tree_per_iteration=1\nlabel_index=0\nmax_feature_idx={n-1}\nobjective=regression\nfeature_names={" ".join(f"Column_{i}" for i in range(n))}\n'
            f'feature_infos={" ".join(["none"]*n)}\ntree_sizes={len(tree)}\n\n{tree}end of trees\n')
    learn.model = BlendedModel([learn.model, BoostedModel([text], levels, n_cont, 1)])
    return save_model(learn, path)

def test_trees_that_lightgbm_cannot_have_written_do_not_reach_it(tmp_path):
    "LightGBM ends the process, reads foreign memory or runs for ever"
    assert load_model(with_trees(tmp_path, TREE)).model.models[1].n_texts==1
    for old,new in ('left_child=-1', 'left_child=0'),('right_child=-2', 'right_child=99999'),('num_leaves=2', 'num_leaves=2000000000'),('split_feature=0', 'split_feature=-1'):
        with pytest.raises(ValueError, match='the trees must be text of LightGBM 4'): load_model(with_trees(tmp_path, TREE.replace(old, new)))

VECTORS = {'class': 'Periodic'} | dict(dim=2, weight_p=0., frequency_scale=.1)
MEMBERS = dict(n=2, sparsity=.5, average='mean')
ACT = {'class': 'LeakyReLU'} | dict(negative_slope=.1, inplace=True)

@pytest.mark.parametrize('change,named', [
    (dict(act=ACT | dict(negative_slope='x')), 'network.act.negative_slope'), (dict(act=ACT | dict(inplace=1)), 'network.act.inplace'), (dict(act={'class': 'GELU', 'approximate': 'x'}), 'network.act.approximate'),
    (dict(num_embeddings=VECTORS | dict(frequency_scale=0)), 'network.num_embeddings.frequency_scale'), (dict(num_embeddings=VECTORS | dict(frequency_scale='x')), 'network.num_embeddings.frequency_scale'),
    (dict(num_embeddings=VECTORS | {'class': 'x'}), 'network.num_embeddings.class'), (dict(members=MEMBERS | dict(sparsity=-1)), 'network.members.sparsity'), (dict(members=MEMBERS | dict(sparsity='x')), 'network.members.sparsity'),
    (dict(members=MEMBERS | dict(average='max')), 'network.members.average'), (dict(mode='x'), 'network.mode'), (dict(bias=[True]), 'network.bias'), (dict(bias=[True,True,1]), 'network.bias'), (dict(bias=1), 'network.bias'),
    (dict(use_bn=1), 'network.use_bn'), (dict(use_bn=None), 'network.use_bn'), (dict(embed_p=2), 'network.embed_p'), (dict(embed_p=-1), 'network.embed_p'), (dict(weight_p=[0.]), 'network.weight_p'), (dict(out_p=2), 'network.out_p'),
    (dict(embed_weight_p=2), 'network.embed_weight_p'), (dict(out_sz=0), 'network.out_sz'), (dict(n_cont=-1), 'network.n_cont'), ({'class': 'TabularModel'}, 'network.num_embeddings'),
    (dict(noise=dict(kind='gaussian', n_levels=19, n_parts=0, beta=0, n_targets=1), out_sz=2), 'network.noise.n_parts')])
def test_settings_of_a_network_of_strangers_are_checked(path, change, named):
    network = description(path)['network']
    for fine in (dict(act=ACT), dict(act={'class': 'GELU', 'approximate': 'tanh'}), dict(num_embeddings=VECTORS), dict(bias=[True]*3), dict(members=None)): check_network(network | fine)
    with pytest.raises(ValueError, match=named): check_network(network | change)

@pytest.mark.parametrize('change,named', [
    ({'class': 'x'}, 'network.class'), (dict(emb_szs=[[3]]), 'network.emb_szs'), (dict(n_cont=-1), 'network.n_cont'), (dict(out_sz=0), 'network.out_sz'), (dict(width=0), 'network.width'), (dict(layers=[0]), 'network.layers'),
    (dict(path_p=2), 'network.path_p'), (dict(dropout='x'), 'network.dropout'), (dict(mode='x'), 'network.mode'), (dict(bn_cont=1), 'network.bn_cont'), (dict(y_range=[1]), 'network.y_range'), (dict(members={}), 'network.members'),
    (dict(num_embeddings=3), 'network.num_embeddings'), (dict(num_embeddings={'class': 'PLE'} | dict(dim=2, weight_p=0., n_bins=[2,2])), 'network.num_embeddings.n_bins'), (dict(hook=1), "'hook'"),
    (dict(emb_szs=[], n_cont=0, num_embeddings=None), 'must have embeddings or continuous columns')])
def test_a_residual_network_of_strangers_is_checked(change, named):
    network = {'class': 'TabularResNetModel'} | dict(emb_szs=[[3,2]], n_cont=1, out_sz=1, width=8, layers=[8], weight_p=.1, path_p=.1, dropout=0., embed_p=0., embed_weight_p=0., mode='example', bn_cont=True,
                                                    y_range=None, members=None, num_embeddings=None)
    for fine in ({}, dict(num_embeddings=VECTORS), dict(y_range=[0,1]), dict(layers=[])): check_network(network | fine)
    with pytest.raises(ValueError, match=named): check_network(network | change)

@pytest.mark.parametrize('change,named', [
    (dict(average='max'), 'network.average'), (dict(class_dim=9), 'network.class_dim'), (dict(class_dim=True), 'network.class_dim'), (dict(class_dim='x'), 'network.class_dim'), (dict(models=[]), 'at least one'),
    (dict(models=[1]), 'network.models'), (dict(hook=1), "'hook'")])
def test_an_average_of_strangers_is_checked(path, change, named):
    network = {'class': 'AveragedModel'} | dict(average='mean', class_dim=-8, models=[description(path)['network']])
    check_network(network)
    with pytest.raises(ValueError, match=named): check_network(network | change)

def test_models_side_by_side_predict_the_same_distributions(saved_kinds):
    plain,noise = [description(saved_kinds[n][1])['network'] for n in ('split','noise')]
    plain = plain | dict(out_sz=noise['out_sz'], emb_szs=noise['emb_szs'])
    average = {'class': 'AveragedModel'} | dict(average='mean', class_dim=-1)
    def of(*models): return average | dict(models=list(models))
    check_network(of(of(of(noise, noise))))
    reads_fewer = {'class': 'CompactModel'} | dict(n_columns=[4,2], columns=[[0,1,2],None], model=plain | dict(emb_szs=plain['emb_szs'][:-1]))
    check_network(of(plain, reads_fewer))
    with pytest.raises(ValueError, match='same columns'): check_network(average | dict(models=[noise,plain]))
    with pytest.raises(ValueError, match='same columns'): check_network(average | dict(models=[plain,plain | dict(emb_szs=plain['emb_szs'][:-1])]))

def test_a_network_needs_columns(path):
    network = description(path)['network'] | dict(emb_szs=[], n_cont=0)
    vectors = network['num_embeddings'] | dict(n_bins=[])
    with pytest.raises(ValueError, match='must have embeddings or continuous columns'): check_network(network | dict(num_embeddings=None))
    with pytest.raises(ValueError, match='network.num_embeddings'): check_network(network | dict(emb_szs=[[2,1]], num_embeddings=vectors))


def test_lists_are_refused_that_say_a_thing_twice(saved_kinds, path, tmp_path):
    quantiles = Path(shutil.copytree(saved_kinds['quantiles'][1], tmp_path/'q'))
    config = description(quantiles)
    config['table']['procs'].append(config['table']['procs'][3] | dict(n=2**34))        # 128 GiB
    write(quantiles, config)
    with pytest.raises(ValueError, match='one QuantileNormalize'): load_model(quantiles)
    config = description(path)
    config['callbacks'].append(config['callbacks'][0])
    write(path, config)
    with pytest.raises(ValueError, match='one FrozenZeroInit'): load_model(path)

def test_containers_are_not_nested_without_end(saved_kinds, tmp_path):
    path = Path(shutil.copytree(saved_kinds['blend'][1], tmp_path/'m'))
    config = description(path)
    for _ in range(3): config['network'] = config['network'] | dict(models=[config['network']])
    write(path, config)
    with pytest.raises(ValueError, match='3 levels deep'): load_model(path)


# Any value in any place

def guarded():
    dls = TabularDataLoaders.from_df(make_table(200), procs=[InputGuard(n_neighbors=0),Categorify,FillMissing,Normalize], cat_names=['color'], cont_names=['b'],
                                     y_names='y', valid_idx=range(150, 200))
    return shake(tabular_learner(dls, layers=[4]))

def reported():
    learn = small(opt_func=partial(FusedAdam, eps=1e-6), cbs=DropConnect({'layers.0.0': .2}))
    learn.fit_zero_restarts(2, 1)
    return learn

def averaged():
    learn = small()
    learn.model = AveragedModel([learn.model, small(seed=1).model])
    return learn

def one_bias():
    learn = pruned(False)
    first = learn.model.layers[1][0]
    first.bias = torch.nn.Parameter(torch.zeros(len(first.weight)))
    return learn

def resnet(): return small(config=tabular_resnet_config(width=8, num_embeddings=PLE(2, 3), weight_p=.1))

MORE_KINDS = dict(guarded=guarded, reported=reported, averaged=averaged, one_bias=one_bias, resnet=resnet, accelerated=LEARNERS['accelerated'], fastai=LEARNERS['fastai'],
                  periodic=LEARNERS['periodic_members'], gelu=lambda: small(config=config(act_cls=torch.nn.GELU('tanh'))))
STRANGE = [None, True, -1, 1.5, 2**60, 'no such', [], {}, ['no such'], [None], [2**60]]
SAME = { # one name in place of a list of it, an average that the loss tells, a name twice, the kind of no values
    'callbacks.FrozenZeroInit.layers"no such"', 'callbacks.DropConnect.layers"no such"', 'snapshots.averagenull',
    'callbacks.FrozenZeroInit.masks["layers.0.0.weight", "layers.0.0.weight"]', 'table.procs.InputGuard.levels.0.values[]', 'table.procs.Categorify.classes.0.values[]', 'table.procs.Categorize.vocab.values[]'}

def class_of(v): return v.get('class') if isinstance(v, dict) else None

def places(obj, where=(), kinds=()):
    "List the path of keys, the same with classes in place of numbers, and the value of each field; of a list the first item and those with a class"
    items = obj.items() if isinstance(obj, dict) else [(i, v) for i,v in enumerate(obj) if i==0 or class_of(v)] if isinstance(obj, list) else []
    return ([(where, kinds, obj)] if where else []) + [p for k,v in items for p in places(v, (*where, k), (*kinds, isinstance(k, int) and class_of(v) or k))]

def changes(config):
    "Yield places with other values: foreign ones, a list of values that is one too long, an object with a field more"
    for where,kinds,own in places(config):
        more = [own | dict(hook=1)] if isinstance(own, dict) else [own+own[:1]] if isinstance(own, list) and not isinstance((own or [{}])[0], dict) else []
        yield from ((where, kinds, v) for v in [*STRANGE, *more] if json.dumps(v)!=json.dumps(own))

def plain(config): return json.dumps(json.loads(json.dumps(config), parse_int=float))      # 1 and 1.0 are the same, 1 and true are not

def check_strange(config, read, describe, seen):
    "Each change is refused, by name unless it is a list, or described as it was read"
    for where,kinds,value in changes(config):
        key = '.'.join(map(str, kinds)).replace('network.models.', '').replace('network.model.', '')+json.dumps(value)
        if key in seen: continue
        seen.add(key)
        other = json.loads(json.dumps(config))
        put(other, where, value)
        check_change(other, where, value, read, describe)

def check_change(other, where, value, read, describe):
    name = [k for k in where if isinstance(k, str)][-1]
    try: res = read(other)
    except ValueError as e: assert isinstance(value, list) or re.search(rf'\b({name}s?|class|hook|tensor)\b', str(e)), (where, value, e)
    else: assert plain(describe(res))==plain(other), (where, value)

def test_whatever_stands_in_place_of_a_value_is_refused_by_name_or_comes_back(saved, saved_kinds, tmp_path):
    seen = set(SAME)
    for path in [saved, *(p for _,p in saved_kinds.values()), *(save_model(f(), tmp_path/n) for n,f in MORE_KINDS.items())]:
        path = Path(shutil.copytree(path, tmp_path/'m', dirs_exist_ok=True))
        config = description(path)
        own = {n: config.pop(n) for n in ('format','version','package','tensors')}
        def read(other):
            write(path, own | other)
            return load_model(path)
        def describe(learn): return {n: v for n,v in description(save_model(learn, tmp_path/'again')).items() if n not in own}
        check_strange(config, read, describe, seen)

def test_a_reader_and_a_leaderboard_of_strangers():
    df = pd.DataFrame(dict(color=['red','blue']*40, day=['2020-01-01','2020-01-02']*40, x=range(80), same=[1]*80))
    reader = CopyReader().fit(df)
    config = describe_reader(reader, list(df))
    check_strange(dict(reader=config), lambda c: build_reader(c['reader'], list(df)), lambda r: dict(reader=describe_reader(r, list(df))), {'reader.columns.0.new_name"no such"'})
    frame = pd.DataFrame(dict(name=['a','b'], loss=[.5,.25]))
    check_strange(dict(leaderboard=describe_frame(frame)), lambda c: build_frame(c['leaderboard']), lambda f: dict(leaderboard=describe_frame(f)), set())
