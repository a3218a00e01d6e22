"Change the code in small ways and see whether its tests notice: `make mutate`, or `python tests/mutate.py --n 20 --modules recipes checks`"
import argparse, ast, os, random, shutil, signal, sys, tempfile, time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIB = 'fastai_dropconnect'
TESTS = { # Module: its fast tests, the likeliest to fail first
    'masks': 'test_masks', 'functional': 'test_functional test_kernels_normal test_layers_dropconnect test_callback_dropconnect test_transforms', 'checks': 'test_checks',
    'callback.core': 'test_callback_core', 'callback.batchnorm': 'test_callback_batchnorm test_no_trace',
    'callback.dropconnect': 'test_callback_dropconnect', 'callback.frozen_zero': 'test_callback_frozen_zero test_no_trace',
    'callback.columns': 'test_callback_columns test_no_trace', 'callback.snapshots': 'test_callback_snapshots test_callback_columns test_no_trace test_details',
    'callback.zero_restarts': 'test_callback_zero_restarts test_details test_no_trace test_snapshot_store', 'callback.members': 'test_callback_members',
    'sparsity.core': 'test_sparsity_core test_details', 'ensemble.averaging': 'test_ensemble_averaging test_details',
    'ensemble.snapshots': 'test_ensemble_snapshots test_snapshot_store', 'ensemble.folder': 'test_snapshot_store test_details', 'recipes': 'test_recipes'}

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def changes(node:ast.AST) -> Iterator: # Functions that change a copy of `node` in place, or return a node for its place
    "Yield the ways to change one node"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS: yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, (ast.BinOp,ast.BoolOp,ast.AugAssign)) and type(node.op) in SWAPS: yield lambda n: setattr(n, 'op', SWAPS[type(n.op)]())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool): yield lambda n: setattr(n, 'value', not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int,float)): yield lambda n: setattr(n, 'value', n.value+1 if isinstance(n.value, int) else n.value*2+1)
    if isinstance(node, (ast.If,ast.IfExp,ast.While)): yield lambda n: setattr(n, 'test', ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.comprehension) and node.ifs: yield lambda n: setattr(n, 'ifs', n.ifs[1:])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not): yield lambda n: n.operand
    if isinstance(node, ast.Return) and node.value is not None: yield lambda n: setattr(n, 'value', ast.Constant(None))
    if isinstance(node, (ast.Assign,ast.AugAssign,ast.Raise)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): yield lambda n: ast.Pass()

def places(tree:ast.AST) -> Iterator: # Pairs (parent, name of its field, place in a list or `None`)
    "Yield the places of all nodes"
    for parent in ast.walk(tree):
        if isinstance(parent, (ast.JoinedStr,ast.Import,ast.ImportFrom)): continue
        for name,value in ast.iter_fields(parent):
            if isinstance(value, ast.AST): yield parent,name,None
            if isinstance(value, list): yield from ((parent, name, i) for i,v in enumerate(value) if isinstance(v, ast.AST))

def at(place): # The node at a place
    parent,name,i = place
    return getattr(parent, name) if i is None else getattr(parent, name)[i]

def mutants(source:str) -> list: # Triples (number of the place, number of the change, line)
    "List all mutants of a module, without those of hints, decorators and messages"
    res,seen = [],set()
    tree = ast.parse(source)
    messages = {id(n) for r in ast.walk(tree) if isinstance(r, (ast.Raise,ast.JoinedStr)) for n in ast.walk(r) if n is not r}
    hints = {id(n) for a in ast.walk(tree) for f in ('annotation','returns') if getattr(a, f, None) for n in ast.walk(getattr(a, f))}
    skip = messages | hints | {id(n) for a in tree.body if isinstance(a, ast.Assign) and getattr(a.targets[0], 'id', '')=='__all__' for n in ast.walk(a)}
    for i,place in enumerate(places(tree)):
        node = at(place)
        if place[1]=='decorator_list' or id(node) in skip or id(node) in seen: continue
        seen.add(id(node))
        res += [(i, j, getattr(node, 'lineno', 0)) for j,_ in enumerate(changes(node))]
    return res

def mutated(source:str, i:int, j:int) -> tuple: # The new source, and what was changed in words
    "Apply one mutant"
    tree = ast.parse(source)
    parent,name,k = place = list(places(tree))[i]
    node = at(place)
    before = ast.unparse(node).split('\n')[0]
    new = deepcopy(node)
    new = list(changes(new))[j](new) or new
    if k is None: setattr(parent, name, new)
    else: getattr(parent, name)[k] = new
    return ast.unparse(ast.fix_missing_locations(tree)), f'{before}  ->  {ast.unparse(new).split(chr(10))[0]}'


def run_tests(folder:Path, module:str, timeout:float) -> str: # 'killed', 'timeout' or 'survived'
    "Run the tests of a module in a child that has all other packages already"
    pid = os.fork()
    if pid==0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0,1,2): os.dup2(null, fd)
        os.chdir(folder)
        import pytest
        files = [f'tests/{name}.py' for name in TESTS[module].split()]
        os._exit(int(pytest.main(['-x','-q','--no-header','-p','no:cacheprovider','-W','ignore', *files])))
    end = time.time()+timeout
    while time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return 'survived' if os.waitstatus_to_exitcode(status)==0 else 'killed'
        time.sleep(.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'timeout'

def preload(folder:Path):
    "Import everything but this package, so that children start at once"
    os.environ |= dict(MPLBACKEND='Agg', TRITON_INTERPRET='1', PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(folder), str(folder/'tests')]
    import fastai.tabular.all, fastai.callback.all, fastai.collab, hypothesis, numba, pytest, rtdl_num_embeddings, scipy.stats, sklearn.ensemble  # noqa: F401
    assert not any(n==LIB or n.startswith(f'{LIB}.') for n in sys.modules)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=200, help='mutants')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--modules', nargs='*', default=list(TESTS), choices=list(TESTS))
    parser.add_argument('--skip', type=int, default=0, help='mutants of the same seed that an earlier run has done')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for the tests of one mutant')
    parser.add_argument('--trust', action='store_true', help='do not run the tests without a change first')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after this long')
    args = parser.parse_args()
    files = {m: Path(LIB)/f'{m.replace(".", "/")}.py' for m in args.modules}
    sources = {m: (ROOT/f).read_text() for m,f in files.items()}
    every = [(m,*mutant) for m in args.modules for mutant in mutants(sources[m])]
    sample = random.Random(args.seed).sample(every, min(args.n, len(every)))[args.skip:]
    start,results,clean = time.time(),[],{}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for name in (LIB,'tests','nbs','benchmarks'): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns('__pycache__'))
        for f in ('pyproject.toml','settings.ini','setup.py','README.md'): shutil.copy(ROOT/f, folder/f)
        preload(folder)
        for module,i,j,line in sample:
            if time.time()-start>args.seconds: break
            if module not in clean: clean[module] = 'survived' if args.trust else run_tests(folder, module, args.timeout)
            if clean[module]!='survived':
                if clean[module]!='told': print(f'{module}: its tests fail or take too long without a change, left out', flush=True)
                clean[module] = 'told'
                continue
            source,change = mutated(sources[module], i, j)
            (folder/files[module]).write_text(source)
            result = run_tests(folder, module, args.timeout)
            (folder/files[module]).write_text(sources[module])
            results.append(result)
            print(f'{result:9}{module}:{line}: {change}', flush=True)
    killed = sum(r!='survived' for r in results)
    print(f'{killed} of {len(results)} mutants killed ({killed/max(1, len(results)):.0%}; {results.count("timeout")} by the time limit), '
          f'from {len(every)} in {len(args.modules)} modules, seed {args.seed}, {time.time()-start:.0f} s')

if __name__=='__main__': main()
