"README is short, reads on a package index, and its numbers are those of the benchmark"
import json, re
from pathlib import Path
import pandas as pd, pytest

ROOT = Path(__file__).parent.parent
REPO = 'fastai-dropconnect/fastai_dropconnect'
FILES = [f'https://github.com/{REPO}/blob/main/', f'https://raw.githubusercontent.com/{REPO}/main/']
DOCS = 'https://fastai-dropconnect.github.io/fastai_dropconnect/'


@pytest.fixture(scope='module')
def readme(): return (ROOT/'README.md').read_text()

@pytest.fixture(scope='module')
def results(): return pd.read_csv(ROOT/'benchmarks'/'results'/'accuracy.csv')


def test_it_is_short(readme): assert len(readme.split()) <= 680

def test_links_are_absolute_and_lead_somewhere(readme):
    links = re.findall(r'\]\(([^)]+)\)', readme)
    assert links and all(l.startswith('https://') for l in links)
    for link in links:
        for start in FILES:
            if link.startswith(start): assert (ROOT/link.removeprefix(start)).exists(), link
        page = link.removeprefix(DOCS).removesuffix('.html')
        if link.startswith(DOCS) and page: assert list((ROOT/'nbs').glob(f'*_{page}.ipynb')) or (ROOT/'nbs'/f'{page}.ipynb').exists(), link

def test_commands_stand_on_lines_of_their_own(readme):
    for command in ('make demo', 'make test', 'make demo DATA=path/to/TrainAndValid.csv'): assert command in readme.split('\n')

def test_code_is_that_of_the_notebook(readme):
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'] if c['cell_type']=='code']
    shown = re.findall(r'```python\n(.*?)\n```', readme, re.DOTALL)
    assert shown == [c for c in cells if not c.startswith('#|')]
    lines = shown[0].split('\n')
    assert len(lines) <= 10 and lines[:2] == ['import pandas as pd', 'from fastai_dropconnect.all import *']

def test_the_table_is_that_of_the_arena(readme):
    board = (ROOT/'benchmarks'/'results'/'arena.md').read_text().split('\n\n')[0].split('\n')
    shown = [l for l in readme.split('\n') if l.startswith('|')]
    assert shown and set(shown) <= set(board), set(shown)-set(board)

def test_what_does_not_help_is_named(readme, results):
    "None of these is better than plain fastai by two standard errors of the difference"
    assert 'By itself it [helps on few tables]' in readme
    stats = results.groupby(['dataset','family']).test.agg(['mean','sem'])
    for dataset,sign in (('bulldozers',1), ('california',1), ('adult',-1)):
        plain = stats.loc[dataset,'fastai']
        for family in ('dropconnect-example','dropconnect-batch','dropconnect-gaussian','fastai-dropout','frozen-zero'):
            own = stats.loc[dataset,family]
            gain = sign*(plain['mean']-own['mean'])
            assert gain < 2*(plain['sem']**2+own['sem']**2)**.5, (dataset, family)
