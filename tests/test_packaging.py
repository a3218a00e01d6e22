"Each packaging fact stands once, and an installed wheel has all of them"
import ast, os, re, shutil, subprocess, sys, venv
from configparser import ConfigParser
from importlib.metadata import PathDistribution
from pathlib import Path
import pytest
from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib

ROOT = Path(__file__).parent.parent
LIB = 'fastai_dropconnect'


def run(*args, **kw):
    res = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert res.returncode == 0, f'{args}\n{res.stdout}\n{res.stderr}'
    return res.stdout

def facts():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    return project,cfg['DEFAULT']

def lines(s): return [o.strip() for o in s.splitlines() if o.strip()]

def version():
    tree = ast.parse((ROOT/LIB/'__init__.py').read_text())
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id=='__version__')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "Python of a fresh environment with nothing but the wheel, built from the files that a clone has, in it"
    tmp = tmp_path_factory.mktemp('wheel')
    src = tmp/'src'
    names = run('git', '-C', ROOT, 'ls-files', '--cached', '--others', '--exclude-standard').splitlines()
    for name in names:
        if not (ROOT/name).exists(): continue
        (src/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, src/name)
    run(sys.executable, '-m', 'build', '--outdir', tmp/'dist', src)
    venv.create(tmp/'env', with_pip=True)
    python = tmp/'env'/'bin'/'python'
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet', next((tmp/'dist').glob('*.whl')))
    return python


def with_dependencies():
    "An environment in which the installed dependencies can be imported, but not the source tree"
    site = next(p for p in sys.path if p.endswith('site-packages'))
    return {**os.environ, 'PYTHONPATH': site, 'MPLBACKEND': 'Agg'}


def metadata(python): return PathDistribution(next(next(python.parent.parent.glob('lib/python*/site-packages')).glob(f'{LIB}-*.dist-info')))


def test_no_fact_stands_twice():
    project,cfg = facts()
    assert set(project) == {'name','description','requires-python','authors','keywords','urls','dynamic'}
    assert set(cfg) == {'license','status','audience','requirements','console_scripts'} | {f'{e}_requirements' for e in extras(cfg)}
    assert 'version' in project['dynamic'] and not (ROOT/'setup.cfg').exists()
    for f in ('pyproject.toml','settings.ini','setup.py'): assert version() not in re.sub(r'[><=]=?[\d.]+', '', (ROOT/f).read_text()), f
    elsewhere = (ROOT/'setup.py').read_text() + (ROOT/'pyproject.toml').read_text()
    for fact in lines(cfg['requirements']) + sum(extras(cfg).values(), []) + lines(cfg['console_scripts']) + [cfg['license']]: assert fact not in elsewhere


def extras(cfg): return {k.removesuffix('_requirements'): lines(v) for k,v in cfg.items() if k.endswith('_requirements')}

def for_extra(line, extra):
    "A line of the requirements of an extra as the metadata of the wheel has it"
    name,_,marker = line.partition(';')
    return Requirement(f'{name}; ' + (f'({marker.strip()}) and ' if marker else '') + f'extra == "{extra}"')


def test_the_wheel_has_all_metadata(installed):
    project,cfg = facts()
    dist = metadata(installed)
    meta = dist.metadata
    assert (meta['Name'], meta['Version'], meta['Summary']) == (project['name'], version(), project['description'])
    assert meta['Requires-Python'] == project['requires-python'] and meta['License-Expression'] == cfg['license']
    assert meta['Keywords'].split(',') == project['keywords'] and meta['Author'] == project['authors'][0]['name']
    assert f"Repository, {project['urls']['Repository']}" in meta.get_all('Project-URL')
    assert any('Science/Research' in c for c in meta.get_all('Classifier')) and any('Development Status' in c for c in meta.get_all('Classifier'))
    assert meta['Description-Content-Type'] == 'text/markdown' and '# fastai_dropconnect' in (meta.get_payload() or meta['Description'])
    want = {str(Requirement(r)) for r in lines(cfg['requirements'])} | {str(for_extra(r, e)) for e,rs in extras(cfg).items() for r in rs}
    assert {str(Requirement(r)) for r in dist.requires} == want
    eps = {(e.group, e.name, e.value) for e in dist.entry_points}
    assert eps == {('nbdev', LIB, f'{LIB}._modidx:d')} | {('console_scripts', *[o.strip() for o in l.split('=')]) for l in lines(cfg['console_scripts'])}
    assert any(str(f).endswith('licenses/LICENSE') for f in dist.files)
    assert f'{LIB}/py.typed' in map(str, dist.files)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/LIB).rglob('*.py')}
    assert modules == {str(f) for f in dist.files if str(f).startswith(f'{LIB}/') and str(f).endswith('.py')}


def test_the_wheel_imports_and_its_command_runs(installed, tmp_path):
    env = with_dependencies()
    where = run(installed, '-c', f'import {LIB}.all as m, {LIB} as p; print(p.__file__); m.DropConnectLinear(3, 2)', cwd=tmp_path, env=env)
    assert str(installed.parent.parent) in where, 'the source tree was imported, not the wheel'
    out = run(installed.parent/'dropconnect-bulldozers', '--help', cwd=tmp_path, env=env)
    assert '--weight-p' in out
    idx = run(installed, '-c', 'from importlib.metadata import entry_points as e; print([len(o.load()["syms"]) for o in e(group="nbdev") if o.name=="fastai_dropconnect"])',
              cwd=tmp_path, env=env)
    assert int(idx.strip('[]\n')) >= 8


def test_the_constraints_lie_in_the_supported_ranges():
    _,cfg = facts()
    ranges = {Requirement(r).name.lower(): Requirement(r).specifier for r in lines(cfg['requirements'])+lines(cfg['dev_requirements'])}
    pins = [Requirement(l) for l in lines((ROOT/'constraints.txt').read_text()) if not l.startswith('#')]
    assert {'torch','fastai','pandas','nbdev'} <= {p.name for p in pins}
    for pin in pins:
        v = str(pin.specifier).removeprefix('==')
        if pin.name in ranges: assert ranges[pin.name].contains(v), pin
