"The tabular model, its config, and what happens when modules are imported in the wrong order"
import copy, json, pickle, subprocess, sys, textwrap
import pytest, torch
from fastai.tabular import learner as fastai_learner
from fastai.tabular.all import TabularModel, tabular_config

from fastai_dropconnect.all import *
from fastai_dropconnect.tabular.model import DropConnectConfig, is_dropconnect_config

TAB = dict(emb_szs=[(10,4), (5,3)], n_cont=3, out_sz=2, layers=[20,10])


def drop_probabilities(model):
    "Every probability of dropping something in `model`, by kind of layer"
    res = {}
    for m in model.modules():
        p = getattr(m, 'weight_p', None) if isinstance(m, WeightDropout) else getattr(m, 'p', None)
        if p is not None: res.setdefault(type(m).__name__, []).append(p)
    return res

# Nothing is dropped unless asked

@pytest.mark.parametrize('kw', [dict(), dict(num_embeddings='ple'), dict(num_embeddings='periodic'), dict(members=3)], ids=str)
def test_nothing_is_dropped_unless_asked(dls, kw):
    ps = drop_probabilities(tabular_learner(dls, layers=[20,10], config=tabular_dropconnect_config(**kw)).model)
    linear = 'MaskedEnsembleLinear' if 'members' in kw else 'DropConnectLinear'
    assert {linear,'DropConnectEmbedding','Dropout'} <= set(ps) and ('WeightDropout' in ps) == ('num_embeddings' in kw)
    for kind,values in ps.items(): assert set(values) == {0}, kind


def test_a_probability_reaches_its_layers_only(dls):
    config = tabular_dropconnect_config(weight_p=.1, out_p=.2, embed_weight_p=.3, num_embeddings=PLE(weight_p=.4), ps=.5, embed_p=.6)
    ps = drop_probabilities(tabular_learner(dls, layers=[20,10], config=config).model)
    assert ps['DropConnectLinear'] == [.1,.1,.2] and set(ps['DropConnectEmbedding']) == {.3} and ps['WeightDropout'] == [.4]
    assert ps['Dropout'] == [.6,.5,.5]


@pytest.mark.parametrize('kw,exc,match', [
    (dict(weight_p=[.1,.2,.3]), ValueError, r'one per hidden layer \(2\), got weight_p='),
    (dict(weight_p='a'), TypeError, "weight_p='a'"),
    (dict(out_p=1), ValueError, 'out_p=1'),
    (dict(mode='row'), ValueError, "mode='row'"),
    (dict(embed_weight_p=-.1), ValueError, 'embed_weight_p=-0.1'),
    (dict(members=0), ValueError, 'members=0'),
    (dict(members='8'), TypeError, "members='8'"),
    (dict(members=True), TypeError, 'members=True')])
def test_values_are_checked_by_the_model_and_by_the_config(kw, exc, match):
    with pytest.raises(exc, match=match): TabularDropConnectModel(**TAB, **kw)
    if isinstance(kw.get('weight_p'), list): return      # only the model knows how many layers there are
    with pytest.raises(exc, match=match): tabular_dropconnect_config(**kw)


@pytest.mark.parametrize('kw,exc,match', [
    (dict(n=0), ValueError, 'n=0'), (dict(n=2.5), TypeError, 'n=2.5'), (dict(sparsity=1), ValueError, 'sparsity=1'),
    (dict(average='median'), ValueError, "average='median'")])
def test_settings_of_members_check_themselves(kw, exc, match):
    with pytest.raises(exc, match=match): MaskedMembers(**kw)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="no argument 'wieght_p', 'n_members', only weight_p, out_p"):
        tabular_dropconnect_config(wieght_p=.1, n_members=3)

# A config is a dictionary

EDGES = [[0,1],[0,1],[0,2]]

def config(): return tabular_dropconnect_config(weight_p=.1, num_embeddings=PLE(8, EDGES), ps=.2)

READERS = {
    'dict': dict, '**': lambda c: {**c}, 'dict(**)': lambda c: dict(**c), '|': lambda c: c | {}, '{} |': lambda c: {} | c,
    'for': lambda c: {k: c[k] for k in c}, 'zip': lambda c: dict(zip(c.keys(), c.values(), strict=True)), 'items': lambda c: dict(c.items()),
    '.copy': lambda c: c.copy(), 'copy': copy.copy, 'deepcopy': copy.deepcopy, 'pickle': lambda c: pickle.loads(pickle.dumps(c)),
    'pop': lambda c: {k: copy.copy(c).pop(k) for k in list(c)}}

@pytest.mark.parametrize('name', READERS)
def test_a_config_reads_as_a_dictionary(name):
    c,read = config(),READERS[name]
    plain = dict(weight_p=.1, out_p=0., mode='example', embed_weight_p=0., num_embeddings=PLE(8, EDGES), members=None, ps=.2)
    assert read(c) == c == plain and list(read(c)) == list(plain) and len(c) == len(plain) and 'weight_p' in c


def test_copies_of_a_config_stay_configs():
    for f in (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))): assert type(f(config())) is DropConnectConfig


def test_a_config_can_be_changed_and_written():
    c = tabular_dropconnect_config(weight_p=.1)
    c['out_p'] = .2
    c.update(mode='batch')
    assert c.pop('members') is None and c.pop('members', 'gone') == 'gone' and c.setdefault('ps', .3) == .3
    with pytest.raises(KeyError): c.pop('members')
    assert json.loads(json.dumps(c)) == dict(c) and repr(c) == repr(dict(c)) and f'{sorted(c)}' == f'{sorted(dict(c))}'


def test_a_config_makes_the_model():
    for c in (config(), config() | dict(ps=.2), dict(config())):
        model = TabularDropConnectModel(**TAB, **c)
        assert model.layers[0][0].p == .1 and model(torch.zeros(4, 2).long(), torch.randn(4, 3)).shape == (4,2)


@pytest.mark.parametrize('c', [dict(weight_p=.1), tabular_dropconnect_config(), {**tabular_dropconnect_config(), 'ps': .1},
                               tabular_dropconnect_config() | dict(weight_p=.3)])
def test_the_keys_ask_for_the_model(dls, c):
    assert is_dropconnect_config(c) and type(tabular_learner(dls, config=c).model) is TabularDropConnectModel


@pytest.mark.parametrize('c', [None, {}, tabular_config(ps=.1), dict(y_range=(0,1))])
def test_other_configs_ask_for_fastais_model(dls, c):
    assert not is_dropconnect_config(c) and type(tabular_learner(dls, config=c).model) is TabularModel

# The wrong order of imports

ORDER = 'import `fastai_dropconnect.all` after `fastai.tabular.all`'

@pytest.mark.parametrize('kw', [dict(), dict(y_range=(-1,1)), dict(layers=[5]), dict(n_out=2)], ids=str)
def test_fastais_learner_refuses_our_config_and_leaves_it_whole(dls, kw):
    c = tabular_dropconnect_config(weight_p=.1, y_range=(-5,5))
    before = dict(c)
    for same in (c, copy.deepcopy(c)):
        with pytest.raises(TypeError, match=ORDER): fastai_learner.tabular_learner(dls, config=same, **kw)
        assert dict(same) == before
    assert tabular_learner(dls, config=c).model.layers[-1].low == -5


def test_imports_in_the_wrong_order_are_named_by_the_error(tmp_path):
    script = """
        import warnings
        warnings.simplefilter('ignore')
        {imports}
        df = pd.DataFrame(dict(x=np.arange(40.), y=np.arange(40.)))
        dls = TabularDataLoaders.from_df(df, procs=Normalize, cont_names=['x'], y_names='y', valid_idx=range(8), bs=8)
        learn = tabular_learner(dls, config=tabular_dropconnect_config(weight_p=.1, y_range=(0,40)))
        print(type(learn.model).__name__)
        """
    ours,fastais = 'from fastai_dropconnect.all import *','from fastai.tabular.all import *'
    def run(*imports):
        code = textwrap.dedent(script).format(imports='\n'.join(imports))
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=180, cwd=tmp_path)
    right,wrong = run(fastais, ours),run(ours, fastais)
    assert right.returncode==0 and right.stdout.split() == ['TabularDropConnectModel'], right.stderr
    last = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode!=0 and ORDER in last
    assert last.startswith('TypeError: `config` must go to the `tabular_learner` of fastai_dropconnect')

# Weights travel between the models

@pytest.mark.parametrize('kw', [dict(), dict(y_range=(-1,1)), dict(use_bn=False), dict(bn_final=True), dict(bn_cont=False),
                                dict(lin_first=False), dict(ps=(.1,.2)), dict(embed_p=.3)], ids=str)
def test_weights_and_predictions_in_eval_are_fastais(kw):
    torch.manual_seed(0)
    ours = TabularDropConnectModel(**TAB, weight_p=.3, out_p=.1, embed_weight_p=.2, **kw).eval()
    torch.manual_seed(0)
    plain = TabularModel(**TAB, **{k: list(v) if k=='ps' else v for k,v in kw.items()}).eval()
    assert list(ours.state_dict()) == list(plain.state_dict())
    for a,b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True): assert torch.equal(a, b)
    x = torch.randint(0, 5, (16,2)),torch.randn(16, 3)
    assert torch.equal(ours(*x), plain(*x))
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
