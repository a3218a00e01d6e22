"The page of all public names: every name and every method of a Learner stands there, as its docstring is now"
import json
from pathlib import Path
import pytest
from fastai.learner import Learner
import fastai_dropconnect.all as everything

PAGE = Path(__file__).parent.parent/'nbs'/'610_all.ipynb'
REFRESH = 'run `nbdev-test nbs/610_all.ipynb --save` and `nbdev-clean`'


@pytest.fixture(scope='module')
def rows(): # From the name in a row of the saved tables to the row
    outputs = [o for c in json.loads(PAGE.read_text())['cells'] for o in c.get('outputs', [])]
    lines = [l for o in outputs for l in ''.join(o['data'].get('text/markdown', '')).split('\n')]
    return {l.split('`')[1]: l for l in lines if l.startswith('| `')}

def methods() -> dict: # From `class.method` to the method, of those that the package adds for users
    both = {f'{cls.__name__}.{name}': m for cls in (Learner, everything.TabularLearner) for name,m in vars(cls).items() if name[0]!='_'}
    return {name: m for name,m in both.items() if getattr(m, '__module__', '').startswith('fastai_dropconnect')}

def first_line(value): return value.__doc__.strip().split('\n')[0].replace('|', '\\|')


def test_every_public_name_is_on_the_page(rows):
    assert [name for name in rows if '.' not in name] == everything.__all__, REFRESH

def test_every_method_of_a_learner_is_on_the_page(rows):
    assert set(name for name in rows if '.' in name) == set(methods()), REFRESH
    assert {'fit_zero_restarts', 'get_member_preds'} <= {name.split('.')[1] for name in methods()}

def test_descriptions_are_those_of_the_docstrings(rows):
    public = {name: getattr(everything, name) for name in everything.__all__}
    for name,value in (public|methods()).items():
        if isinstance(value, dict): assert all(repr(key) in rows[name] for key in value), f'{name}: {REFRESH}'
        else: assert first_line(value) in rows[name], f'{name}: {REFRESH}'

def test_links_lead_to_notebooks(rows):
    for name,row in rows.items():
        target = row.split('](')[1].split(')')[0]
        assert (PAGE.parent/target).exists(), name
