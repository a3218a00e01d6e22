"What goes to the package index, the workflows that send it there, and the files that tell how to cite and to report"
import ast, json, re, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from release import check, oldest # noqa: E402

PACKAGE = {'fastai_dropconnect/__init__.py', 'fastai_dropconnect/cli.py', 'fastai_dropconnect/py.typed'}
INFO = 'fastai_dropconnect-0.1.0.dist-info'
WHEEL = [*PACKAGE, *(f'{INFO}/{n}' for n in ('licenses/LICENSE','METADATA','entry_points.txt','RECORD'))]
WORKFLOWS = {p.stem: p for p in (ROOT/'.github'/'workflows').glob('*.yml')}


def workflow(name): return yaml.safe_load(WORKFLOWS[name].read_text())


# --- files

def test_a_good_wheel_has_no_problems(): assert check.wheel_problems(WHEEL, PACKAGE) == []

@pytest.mark.parametrize('name', sorted(n for n in WHEEL if 'RECORD' not in n))
def test_a_file_missing_in_the_wheel_is_found(name): assert check.wheel_problems([n for n in WHEEL if n!=name], PACKAGE) == [f'{name} is missing']

@pytest.mark.parametrize('name', ['nbs/600_cli.ipynb', 'tests/test_cli.py', 'benchmarks/layers.py', 'release/check.py', 'fastai_dropconnect/x.ipynb'])
def test_a_file_that_does_not_belong_in_the_wheel_is_found(name): assert check.wheel_problems([*WHEEL, name], PACKAGE) == [f'{name} does not belong in it']

def test_the_type_marker_is_in_the_package(): assert 'fastai_dropconnect/py.typed' in check.modules()

def test_an_sdist_has_what_a_packager_needs():
    assert check.sdist_problems(check.IN_SDIST) == [] and all((ROOT/n).exists() for n in check.IN_SDIST)
    assert check.sdist_problems([n for n in check.IN_SDIST if n!='LICENSE']) == ['LICENSE is missing']


# --- supported sets

@pytest.mark.parametrize('line,want', [('pandas>=2.2,<4', 'pandas==2.2'), ('threadpoolctl>=3.1', 'threadpoolctl==3.1'),
                                       ("numba>=0.60; platform_machine in 'a b'", "numba==0.60; platform_machine in 'a b'")])
def test_lower_ends_become_constraints(line, want): assert oldest.oldest([line]) == [want]

def test_the_oldest_set_has_every_requirement_and_one_torch():
    names = [re.split('[=;]', l)[0] for l in check.constraints('oldest')]
    assert sorted(names) == sorted([re.split('[>;]', r)[0] for r in oldest.requirements()]+['torchvision'])
    assert all('==' in l for l in check.constraints('oldest'))

def test_the_first_example_is_that_of_the_notebook():
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'] if c['cell_type']=='code']
    assert check.first_example() == next(c for c in cells if not c.startswith('#|'))

@pytest.mark.parametrize('path', [p for p in (ROOT/'fastai_dropconnect').rglob('*.py')], ids=lambda p: p.stem)
def test_the_code_is_python_3_10(path): ast.parse(path.read_text(), feature_version=(3,10))


# --- workflows

def steps(jobs): return [s for j in jobs.values() for s in j['steps']]

@pytest.mark.parametrize('name', WORKFLOWS)
def test_actions_are_pinned_to_a_commit_with_its_tag(name):
    uses = re.findall(r'uses: (.*)', WORKFLOWS[name].read_text())
    assert uses and all(re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+', u) for u in uses)

@pytest.mark.parametrize('name', WORKFLOWS)
def test_workflows_end_and_may_only_read_unless_they_say_so(name):
    flow = workflow(name)
    assert flow['permissions']['contents'] == 'read' and all('timeout-minutes' in j for j in flow['jobs'].values())

def test_only_the_job_that_publishes_gets_a_token_and_it_runs_no_code():
    flow = workflow('release')
    publish = flow['jobs'].pop('publish')
    assert publish['permissions'] == {'id-token': 'write'} and publish['environment'] == 'pypi' and publish['needs'] == 'build'
    assert not any('run' in s for s in publish['steps']) and not any('permissions' in j for j in flow['jobs'].values())
    assert 'id-token' not in flow['permissions'] and 'make release-check' in [s.get('run') for s in steps(flow['jobs'])]

def test_the_tag_is_compared_with_the_version():
    command = next(s['run'] for s in steps(workflow('release')['jobs']) if s.get('name')=='The tag is the version')
    assert '${{' not in command and 'fastai_dropconnect/__init__.py' in command
    assert re.fullmatch(r'__version__ = "\d+\.\d+\.\d+"\n', (ROOT/'fastai_dropconnect'/'__init__.py').read_text())

def test_the_matrix_has_all_systems_and_supported_pythons():
    matrix = workflow('test')['jobs']['matrix']['strategy']['matrix']
    assert [o.partition('-')[0] for o in matrix['os']] == ['ubuntu','macos','windows'] and matrix['python'] == check.PYTHONS
    assert f'requires-python = ">={check.PYTHONS[0]}"' in (ROOT/'pyproject.toml').read_text()


# --- citing and reporting

def test_the_citation_has_no_fact_of_its_own():
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    pyproject, settings = (ROOT/'pyproject.toml').read_text(), (ROOT/'settings.ini').read_text()
    assert cff['cff-version'] == '1.2.0' and 'version' not in cff and f'license = {cff["license"]}' in settings
    assert cff['repository-code'] in pyproject and cff['authors'][0]['name'] in pyproject and cff['title'] in pyproject

def test_the_security_policy_names_every_way_in():
    text = (ROOT/'SECURITY.md').read_text()
    for name in ('load_model','load_learner','learn.load','read_bulldozers','allow_large','resume=True','Report a vulnerability'): assert name in text
