"""Checks what would be uploaded to the package index: `make release-check`

1. Builds the sdist and the wheel from the files that git knows.
2. Checks README as the index would render it, and the files in both.
3. Checks that the code needs no newer Python than it says.
4. Installs the wheel in two fresh environments, of the newest and the oldest supported packages, and runs README's first example.

The oldest set has the torch of constraints.txt: older builds for CUDA take gigabytes. The job `oldest` of .github/workflows/test.yml
has the oldest torch as well.
"""
import argparse, json, os, re, shutil, subprocess, sys, tarfile, tempfile, venv, zipfile
from pathlib import Path
try: from release.oldest import ROOT, oldest, requirements
except ImportError: from oldest import ROOT, oldest, requirements

LIB = 'fastai_dropconnect'
IN_SDIST = ['README.md', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CITATION.cff', 'settings.ini', 'pyproject.toml', 'setup.py',
            f'{LIB}/__init__.py', f'{LIB}/py.typed']
PYTHONS = ['3.10', '3.11', '3.12', '3.13', '3.14']
CLEAN = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONHOME')} | {'MPLBACKEND': 'Agg'}


def run(*args, **kwargs) -> str:
    "Run a command, and return its output"
    res = subprocess.run([str(a) for a in args], capture_output=True, text=True, env=CLEAN, **kwargs)
    if res.returncode: sys.exit(f'{" ".join(map(str, args))}\n{res.stdout}\n{res.stderr}')
    return res.stdout

def say(text): print(text, flush=True)

def modules() -> set:
    "Return the files of the package that git knows, or that it does not ignore"
    names = run('git', '-C', ROOT, 'ls-files', '--cached', '--others', '--exclude-standard').splitlines()
    return {n for n in names if (ROOT/n).is_file()}


# --- what is built

def build(
    out:Path # Folder for the files
) -> tuple[Path, Path]: # The sdist and the wheel
    "Build from a copy that holds nothing but the files of git"
    with tempfile.TemporaryDirectory() as tmp:
        for name in modules():
            (Path(tmp)/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, Path(tmp)/name)
        run(sys.executable, '-m', 'build', '--outdir', out, tmp)
    sdist, = out.glob('*.tar.gz')
    wheel, = out.glob('*.whl')
    return sdist, wheel

def wheel_problems(
    names:list, # Files in the wheel
    package:set # Files of the package in the repository
) -> list:
    "Return what is missing in a wheel, and what should not be in it"
    info = {n.split('/')[0] for n in names if n.split('/')[0].endswith('.dist-info')}
    own = [n for n in names if n.split('/')[0] not in info]
    problems = [f'{n} is missing' for n in sorted(package-set(own))]
    problems += [f'{n} does not belong in it' for n in sorted(set(own)-package)]
    needed = [f'{i}/{n}' for i in info for n in ('licenses/LICENSE','METADATA','entry_points.txt')]
    return problems + [f'{n} is missing' for n in needed if n not in names]

def sdist_problems(
    names:list # Files in the sdist, without its folder
) -> list:
    "Return what is missing in an sdist"
    return [f'{n} is missing' for n in IN_SDIST if n not in names]

def check_files(sdist, wheel):
    "Stop if the sdist or the wheel has wrong files"
    package = {n for n in modules() if n.startswith(f'{LIB}/')}
    problems = wheel_problems(zipfile.ZipFile(wheel).namelist(), package)
    with tarfile.open(sdist) as t: problems += sdist_problems([n.partition('/')[2] for n in t.getnames()])
    if problems: sys.exit('\n'.join(problems))


# --- Pythons

def other_pythons() -> dict: # From a version to its interpreter
    "Return the supported Pythons on this machine"
    found = {}
    for v in PYTHONS:
        for path in [shutil.which(f'python{v}'), *Path.home().glob(f'.pyenv/versions/{v}.*/bin/python{v}')]:
            if path and subprocess.run([path, '-c', ''], capture_output=True).returncode==0: found[v] = path
    return found

def check_pythons():
    "Stop if the code needs a newer Python than 3.10, or does not compile in one that is here"
    run(Path(sys.executable).parent/'vermin', '--no-tips', '--eval-annotations', '-t=3.10-', ROOT/LIB)
    pythons = other_pythons()
    check = "import ast, pathlib, sys; [ast.parse(p.read_bytes(), str(p)) for p in pathlib.Path(sys.argv[1]).rglob('*.py')]"
    for path in pythons.values(): run(path, '-W', 'error', '-c', check, ROOT/LIB)
    missing = [v for v in PYTHONS if v not in pythons]
    say(f'Syntax of Python 3.10; parsed by {", ".join(pythons)}' + (f'; not on this machine: {", ".join(missing)}' if missing else ''))


# --- a user's first minutes

def first_example() -> str:
    "Return README's first example"
    return re.search(r'```python\n(.*?)\n```', (ROOT/'README.md').read_text(encoding='utf-8'), re.DOTALL)[1]

def pinned() -> dict: # From a name to its constraint
    "Return the constraints of the newest set"
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    return {l: l for l in lines if l and not l.startswith('#')}

def constraints(which) -> list:
    "Return the constraints of the newest or the oldest set"
    newest = list(pinned())
    if which=='newest': return newest
    torches = [l for l in newest if l.startswith(('torch==','torchvision=='))]
    return [r for r in oldest(requirements()) if not r.startswith('torch==')] + torches

def try_wheel(wheel, which, tmp):
    "Install the wheel and run README's first example, the command's help and the type marker"
    env = tmp/which
    venv.create(env, with_pip=True)
    python = env/('Scripts' if os.name=='nt' else 'bin')/'python'
    (tmp/f'{which}.txt').write_text('\n'.join(constraints(which))+'\n')
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--constraint', tmp/f'{which}.txt']
    run(*pip, 'torch', 'torchvision')       # first and alone: pip takes the build that lies at hand
    run(*pip, wheel)
    (tmp/'example.py').write_text(first_example()+'\n')
    run(python, tmp/'example.py', cwd=tmp)
    run(python.parent/'dropconnect-bulldozers', '--help', cwd=tmp)
    where = run(python, '-c', f'import {LIB} as p; print(p.__file__)', cwd=tmp)
    if str(env) not in where: sys.exit(f'{where} was imported, not the wheel')
    versions = {p['name'].lower(): p['version'] for p in json.loads(run(python, '-m', 'pip', 'list', '--format=json'))}
    shown = ', '.join(f'{n} {versions[n]}' for n in ('torch','fastai','fastcore','pandas','numpy','scikit-learn','numba','matplotlib') if n in versions)
    say(f'{which}: README\'s first example runs with {shown}')
    shutil.rmtree(env)


if __name__=='__main__':
    parser = argparse.ArgumentParser(description='Check what would be uploaded to the package index')
    parser.add_argument('--out', type=Path, default=ROOT/'dist', help='where the sdist and the wheel go')
    parser.add_argument('--sets', default='newest,oldest', help='environments to try, separated by commas; an empty one tries none')
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    sdist,wheel = build(args.out)
    check_files(sdist, wheel)
    run(sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel)
    say(f'{sdist.name} and {wheel.name}: all files, and README renders')
    check_pythons()
    with tempfile.TemporaryDirectory() as tmp:
        for which in filter(None, args.sets.split(',')): try_wheel(wheel, which, Path(tmp))
