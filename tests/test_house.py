"The house: imports point down, each notebook has a number of its own, modules stay small, the public names are few and documented"
import ast, importlib, inspect, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
LIB = 'fastai_dropconnect'
LONGEST_LINE,LONGEST_MODULE,LONGEST_DOC = 120,400,17

PUBLIC = """
exact_mask dropconnect linear_dropconnect DropConnectEmbedding DropConnectLinear EmbeddingDropout WeightDropout
EnsembleLinear MaskedEnsembleLinear masked_ensemble_ DropPath drop_path
VariationalDropConnectConv2d VariationalDropConnectLinear variational_ GatedLinear HardConcreteLinear hard_concrete_
HeldWeights compact sparsity_report sparse_ AveragedModel EnsembleLoss average_members
BlendedModel greedy_weights GaussianMixture NoiseModel QuantileDistribution Calibration
FillMissingAnywhere QuantileNormalize PLE Periodic FrameReader DataError tabular_dls time_split FastTabDL fast_dataloaders
TableSource fit_procs StoredTable store_table StoredTabDL stored_dataloaders
MaskedMembers TabularDropConnectModel tabular_dropconnect_config TabularResNetModel tabular_resnet_config InputGuard
TabularLearner tabular_learner
RecalibrateBN recalibrate_bn DropConnect FrozenZeroInit SnapshotEnsemble ZeroRestarts
BestAverage GradualPruning GroupLasso FeatureGates VariationalDropConnect HardConcrete compacted DistributionMetric FusedAdam init_ranks
Choice RECIPES Recipe choose_recipe train_recipe fit_best DropConnectClassifier DropConnectRegressor
load_model save_model Predictor RowEncoder load_predictor export_onnx export_program
synthetic_bulldozers bulldozers_dls bulldozers_pandas encode_sales price_features read_bulldozers compare_on_bulldozers
""".split()


def notebooks() -> dict: # From the name of a module to the number of its notebook
    res = {}
    for nb in (ROOT/'nbs').glob('[0-9]*.ipynb'):
        number,module = nb.stem.split('_', 1)
        res[module] = number
    return res

def modules() -> dict: # From the name of a module to its file
    files = [f for f in (ROOT/LIB).rglob('*.py') if f.name not in ('__init__.py','_modidx.py')]
    return {'.'.join(f.relative_to(ROOT/LIB).with_suffix('').parts): f for f in files}

def imported(module:str, file:Path):
    "Names within the package that a module imports, as dotted paths without the package"
    package = [LIB, *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            target = '.'.join([*base, *([node.module] if node.module else [])])
            names = [target, *[f'{target}.{a.name}' for a in node.names]]
        else: continue
        yield from (n.removeprefix(f'{LIB}.') for n in names if n.startswith(f'{LIB}.'))


def test_each_module_has_a_notebook_with_a_number_of_its_own():
    numbers = notebooks()
    assert set(numbers) == set(modules())
    assert len(set(numbers.values())) == len(numbers) and {len(n) for n in numbers.values()} == {3}


def test_no_cell_begins_or_ends_with_an_empty_line():
    for nb in (ROOT/'nbs').glob('*.ipynb'):
        texts = [''.join(c['source']) for c in json.loads(nb.read_text())['cells']]
        assert not [t for t in texts if t!=t.strip('\n')], nb.name


def test_imports_point_down():
    numbers = notebooks()
    for name,file in modules().items():
        for other in imported(name, file):
            if other in numbers and other!=name: assert numbers[other] < numbers[name], f'{name} imports {other}'


@pytest.mark.parametrize('name', modules())
def test_modules_are_small(name):
    lines = modules()[name].read_text().splitlines()
    assert len(lines) <= LONGEST_MODULE
    own = '\n'.join(lines).split('# %% ../')[1:]     # behind the list of names, which nbdev wraps
    long = [l for part in own for l in part.splitlines() if len(l) > LONGEST_LINE and not l.startswith('../')]
    assert not long, long[0]


@pytest.mark.parametrize('name', modules())
def test_docstrings_are_one_short_sentence(name):
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if not isinstance(node, (ast.FunctionDef,ast.ClassDef)): continue
        doc = ast.get_docstring(node)
        if doc: assert len(doc.split('\n\n')[0].split()) <= LONGEST_DOC, f'{node.name}: {doc}'


def test_public_names():
    everything = importlib.import_module(f'{LIB}.all')
    assert everything.__all__ == PUBLIC and len(set(PUBLIC)) == len(PUBLIC)
    shown = {}
    exec(f'from {LIB}.all import *', shown)
    assert set(shown)-{'__builtins__'} == set(PUBLIC)


@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(importlib.import_module(f'{LIB}.all'), name)
    if not callable(value) or (isinstance(value, type) and issubclass(value, Exception)): return
    assert value.__doc__, name
    if hasattr(value, '__dataclass_fields__'): source,names = inspect.getsource(value),list(value.__dataclass_fields__)
    else:
        init = own_function(value)
        source,code = inspect.getsource(init),init.__code__
        names = [n for n in code.co_varnames[:code.co_argcount+code.co_kwonlyargcount] if n!='self']
    undocumented = [n for n in names if not re.search(rf'\b{n}\b[^#\n]*#', source)]
    assert not undocumented, f'{name}: {undocumented}'


NO_HINT = {
    'compare_on_bulldozers': ['return']}    # fastcore would evaluate it for the command's parser, which would import pandas

def own_function(value): # The function whose parameters a public name has, without `@delegates`
    return inspect.unwrap(value.__init__ if inspect.isclass(value) else value)

@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_have_type_hints(name):
    value = getattr(importlib.import_module(f'{LIB}.all'), name)
    if not callable(value) or (isinstance(value, type) and issubclass(value, Exception)): return
    function = own_function(value)
    code,hints = function.__code__,function.__annotations__
    needed = [n for n in code.co_varnames[:code.co_argcount+code.co_kwonlyargcount] if n!='self']
    if not inspect.isclass(value): needed.append('return')
    assert [n for n in needed if n not in hints] == NO_HINT.get(name, []), name


def test_errors_say_got():
    for name,file in modules().items(): assert 'however:' not in file.read_text(), name
