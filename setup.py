"Builds the package from `settings.ini` (its own facts), `pyproject.toml` (what nbdev reads) and `__init__.py` (the version)."
import ast
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
lib = 'fastai_dropconnect'
statuses = {'3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def lines(name): return [o.strip() for o in cfg[name].splitlines() if o.strip()]

def version():
    "The `__version__` of the package, read without importing it (it may have no dependencies installed yet)"
    for node in ast.parse((root/lib/'__init__.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '__version__': return ast.literal_eval(node.value)
    raise ValueError(f'{lib}/__init__.py has no __version__')

setup(
    version=version(),
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['py.typed']},
    install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': [f'{lib} = {lib}._modidx:d']},
    license_expression=cfg['license'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f"Development Status :: {cfg['status']} - {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    zip_safe=False)
