PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
JAX_VENV := .venv-jax
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PAPER := ../$(BIN)/python -m rezende_mohamed_2015
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test lint types docs slow notebooks bench posteriordb posteriors nuts trust scale densities device paper tables clean

# On one thread, as a second one only waits where tensors are small.
demo: $(INSTALLED)  ## Fit three targets, print a table, write figures to demo-results/.
	OMP_NUM_THREADS=1 $(BIN)/pyroflow demo

test: $(INSTALLED)  ## Tests, doctests, and the notebooks with few steps; a quarter of an hour on two cores.
	PYROFLOW_QUICK=1 $(PYTEST) -n 2 --nbmake -m "not slow" notebooks tests pyroflow

lint: $(INSTALLED)  ## What CI checks beside the tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy on a user's script; a minute where nothing is cached.
	$(BIN)/mypy

docs: $(DOCS_VENV)/installed  ## The pages, in docs/_build/html; a warning is an error. In an environment of their own.
	$(DOCS_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . docs/_build/html

slow: $(INSTALLED)  ## Long fits, and further cases of what make test tests; an hour and more.
	$(PYTEST) -n 2 -m slow tests

notebooks: $(INSTALLED)  ## Run the notebooks in full and store their outputs.
	$(BIN)/python -m pytest --nbmake --overwrite --nbmake-timeout=1200 notebooks

bench: $(VENV)/bench-installed $(JAX_VENV)/installed  ## Speed beside other libraries; ten minutes of a quiet machine.
	cd tests && ../$(BIN)/python -m benchmarks.speed run --jax-python ../$(JAX_VENV)/bin/python

posteriordb: $(INSTALLED)  ## Ten posteriors, ours beside rivals and NUTS, with resume; an hour. PYROFLOW_POSTERIORDB says where the data are.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.posteriordb run --threads 1
	cd tests && ../$(BIN)/python -m benchmarks.posteriordb table

posteriors: $(INSTALLED)  ## pf.posterior on 29 posteriors with three seeds, with resume. PYROFLOW_POSTERIORDB and PYROFLOW_HIERARCHIES say where the data are.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.posteriors run

nuts: $(INSTALLED) $(JAX_VENV)/installed  ## Pyro's and numpyro's NUTS on the same 29, beside them, with resume.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.posteriors run --ways NUTS,numpyro

trust: $(INSTALLED)  ## The verdicts of pf.posterior on 110 small posteriors with exact answers, three seeds, with resume.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.trust run

scale: $(INSTALLED)  ## Regressions of 1,000 to 1,000,000 rows, and 100 to 100,000 groups, with resume; two hours.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.scale run
	cd tests && ../$(BIN)/python -m benchmarks.group_scale run --threads 2

densities: $(INSTALLED)  ## Flows, Gaussians, mixtures and kernels on four small tables by held-out score, with resume; a quarter of an hour.
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks.densities run

device: $(INSTALLED)  ## Values, fits, speed and memory on the GPU, or on the CPU where there is none; minutes.
	cd tests && ../$(BIN)/python -m benchmarks.device run

paper: export OMP_NUM_THREADS := 1
paper: $(INSTALLED)  ## The paper's experiments, with resume; hours. PYROFLOW_MNIST is the folder of the four files.
	cd notebooks && $(PAPER) figure1
	cd notebooks && $(PAPER) figure3
	cd notebooks && $(PAPER) mnist --data $(abspath $(PYROFLOW_MNIST))
	cd notebooks && $(PAPER) mnist_validation --data $(abspath $(PYROFLOW_MNIST))
	cd notebooks && $(PAPER) mnist_speed
	cd notebooks && $(PAPER) sylvester --data $(abspath $(PYROFLOW_MNIST))

tables: $(INSTALLED)  ## Write the tables of README.md, the pages and notebooks/results/README.md from the stored results.
	PYTHONPATH=notebooks:tests $(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) $(JAX_VENV) $(DOCS_VENV) docs/_build

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

$(VENV)/bench-installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	touch $@

$(DOCS_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(JAX_VENV)/installed: Makefile
	$(PYTHON) -m venv $(JAX_VENV)
	$(JAX_VENV)/bin/python -m pip install --quiet "flowjax==19.1.2" "jax==0.10.2" "numpyro==0.22.0"
	touch $@
