"Models in service: without fastai, in ONNX, and as programs of torch.export"
import importlib.util, json, subprocess, sys, textwrap
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from test_serialize import FIXTURE, LEARNERS, config, fixture_frame, frame_for, preds, small, with_snapshots
from test_serialize_strangers import description, put, write
from test_serialize_strangers import path, saved # noqa: F401, fixtures
from fastai_dropconnect.all import *

ROOT = Path(__file__).parent.parent
DATA = ROOT/'..'/'shared'/'data'/'bulldozers'/'TrainAndValid.csv'
pytestmark = pytest.mark.filterwarnings('ignore')
learners = pytest.mark.parametrize('make', LEARNERS.values(), ids=LEARNERS)


def check_close(got, want):
    want = want.numpy()
    assert got.shape==want.shape and got.dtype==np.float32 and (len(want)==1 or want.std()>0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@learners
def test_a_predictor_gives_the_answers_of_the_learner(make, tmp_path):
    learn = make()
    df = frame_for(learn)
    predictor = load_predictor(save_model(learn, tmp_path/'m'))
    rows = df.to_dict('records')
    check_close(predictor.predict_rows(rows), preds(learn, df))
    check_close(predictor.predict(rows[3]), preds(learn, df)[3])
    assert predictor.vocab==(list(learn.dls.vocab) if hasattr(learn.dls, 'vocab') else None)


@pytest.mark.parametrize('act', [torch.nn.ELU(.7), torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU('tanh'), torch.nn.Tanh(), torch.nn.Sigmoid()], ids=str)
def test_activations_of_a_predictor(act, tmp_path):
    learn = small(config=config(act_cls=act))
    df = frame_for(learn)
    check_close(load_predictor(save_model(learn, tmp_path/'m')).predict_rows(df.to_dict('records')), preds(learn, df))


def test_the_average_of_classes_is_saved_before_anybody_has_predicted(tmp_path):
    from test_serialize import classes
    learn = with_snapshots(small(classes()))
    assert learn.snapshot_ensemble.record.average is None
    predictor = load_predictor(save_model(learn, tmp_path/'m'))
    df = frame_for(learn)
    check_close(predictor.predict_rows(df.to_dict('records')), preds(learn, df))


def test_rows_of_a_predictor_are_checked(saved):
    predictor = load_predictor(saved)
    row = dict(color='red', code=1, flag=True, a=.5, b=.5)
    for change,match in [(dict(a='x'), "column 'a' must have a number"), (dict(b=None), "column 'b' must have a number, as it had no gaps"),
                         (dict(color=[1]), "column 'color' must have a value"), (dict(a=[1]), "column 'a' must have a number")]:
        with pytest.raises(ValueError, match=match): predictor.predict(row | change)
    for name in row:
        with pytest.raises(ValueError, match=f"the column '{name}'"): predictor.predict({k:v for k,v in row.items() if k!=name})
    unknown = [predictor.predict(row | dict(color=v)) for v in ('pink', None, float('nan'), pd.NA)]
    assert all((u==unknown[0]).all() for u in unknown) and (predictor.predict(row)!=unknown[0]).any()
    assert predictor.predict_rows([]).shape==(0,1)
    row = fixture_frame().iloc[0].to_dict()
    with pytest.raises(ValueError, match="column 'day' must have a value"): load_predictor(FIXTURE).predict(row | dict(day='yesterday'))


def test_an_encoder_takes_names_of_columns():
    with pytest.raises(ValueError, match=r'`categories\[0\].column` must be a name'): RowEncoder([dict(column=1, kind='int', values=[1])], [])


@pytest.mark.parametrize('where,value', [(['network','layers',0], 2**40), (['table','procs'], []), (['table','procs',0,'na_dict'], 3), (['snapshots','use'], 'weights'),
                                         (['hook'], 1), (['table','procs',0,'add_col'], ...)], ids=str)
def test_a_predictor_refuses_files_of_strangers(path, where, value):
    config = description(path)
    put(config, where, value)
    write(path, config)
    with pytest.raises(ValueError, match=str(path)): load_predictor(path)


def test_a_predictor_needs_neither_fastai_nor_torch():
    "In a process that cannot import them"
    rows = fixture_frame().drop(columns='y').to_dict('records')
    rows = [{k:v.isoformat() if k=='day' else v for k,v in r.items()} for r in rows]
    script = f'''
        import json, sys
        for name in ('fastai','torch','pandas','sklearn','scipy','numba'): sys.modules[name] = None     # any import of them fails
        from fastai_dropconnect.serialize.predictor import load_predictor
        predictor = load_predictor({str(FIXTURE)!r})
        nan = float('nan')
        print(json.dumps(predictor.predict_rows({rows!r}).tolist()))
        print(predictor.vocab)'''
    res = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert res.returncode==0, res.stderr
    got,vocab = res.stdout.splitlines()
    np.testing.assert_allclose(json.loads(got), json.loads((FIXTURE/'preds.json').read_text()), rtol=0, atol=1e-6)
    assert vocab=="['high', 'low']"


# ONNX

missing = [m for m in ('onnx','onnxscript','onnxruntime') if not importlib.util.find_spec(m)]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f'not installed: {", ".join(missing)}')

def onnx_predictor(file):
    import onnxruntime
    session,names = onnxruntime.InferenceSession(file),json.loads(file.with_suffix('.json').read_text())
    encode = RowEncoder(names['categories'], names['numbers'])
    return lambda rows: session.run(None, dict(zip(('cats','conts'), encode(rows))))[0]

EXPORTED = ['periodic_members','normal']      # all others were compared once

@needs_onnx
@pytest.mark.parametrize('name', EXPORTED)
def test_onnx_gives_the_answers_of_the_learner(name, tmp_path):
    learn = LEARNERS[name]()
    df = frame_for(learn)
    predict = onnx_predictor(export_onnx(learn, tmp_path/'m.onnx'))
    rows,want = df.to_dict('records'),preds(learn, df)
    for n in (70, 1, 7): check_close(predict(rows[:n]), want[:n])
    assert len(list(tmp_path.iterdir()))==2


@needs_onnx
def test_onnx_on_real_rows(tmp_path):
    if not DATA.exists(): pytest.skip('shared/data/bulldozers is not there')
    sales = read_bulldozers(DATA).iloc[::8]
    dls = bulldozers_dls(sales, bs=128)
    learn = tabular_learner(dls, layers=[50,25], y_range=(8,12.5), config=tabular_dropconnect_config(weight_p=.1, members=4))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    df = price_features(sales).drop(columns='logSalePrice')
    with learn.no_bar(): want = preds(learn, df)
    rows = df.to_dict('records')
    check_close(onnx_predictor(export_onnx(learn, tmp_path/'m.onnx'))(rows), want)
    check_close(load_predictor(save_model(learn, tmp_path/'m')).predict_rows(rows), want)


def test_without_onnx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match='pip install .*onnx'): export_onnx(small(), tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())


def test_a_program_gives_the_answers_of_the_learner_for_any_number_of_rows(tmp_path):
    learn = LEARNERS['classes_snapshots']()
    df = frame_for(learn)
    program = torch.export.load(export_program(learn, tmp_path/'m.pt2')).module()
    from fastai_dropconnect.serialize.export import input_columns
    cats,conts = map(torch.from_numpy, RowEncoder(*input_columns(learn))(df.to_dict('records')))
    want = preds(learn, df)
    for n in (70, 1, 0): torch.testing.assert_close(program(cats[:n], conts[:n]), want[:n], rtol=1e-5, atol=1e-5)
