# make install   an environment in .venv, with the library in it for editing (LOCKED=1: the versions of requirements.lock)
# make test      notebooks and library agree, all notebooks run, all tests pass
# make demo      reproduce one number on the embedded digits; the executed notebook lies in reports/demo afterwards
# make help      the rest
# Any Python 3.11 or newer: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

ifeq ($(LOCKED),1)
STAMP := $(VENV)/.installed-locked
PINS := -c requirements.lock
else
STAMP := $(VENV)/.installed
PINS :=
endif

.PHONY: help install demo test coverage lint export clean-notebooks lock hooks clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))
	@echo 'make export           write lnl_bench/ from the notebooks'
	@echo 'make clean-notebooks  strip what changes with every execution'
	@echo 'make lint             ruff, over library, tests and notebooks'
	@echo 'make coverage         the pytest tests with line coverage of lnl_bench'
	@echo 'make lock             write requirements.lock from the environment'
	@echo 'make hooks            git hooks for notebooks, in this clone'
	@echo 'make clean            delete the environment and everything built'

install: $(STAMP)

$(STAMP): settings.ini setup.py pyproject.toml $(if $(PINS),requirements.lock)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "lnl_bench needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'This Python cannot make environments; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@echo "Installing into $(VENV); torch makes this about 5 GB and some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PINS) -e '.[dev]'
	@rm -f $(VENV)/.installed*
	@touch $@

demo: $(STAMP)
	@echo "DMLP on the embedded digits with 90 % of the labels noisy: one or two minutes on two CPU cores."
	$(BIN)/lnl repro dmlp -p noise 0.9 --out-dir reports/demo

test: $(STAMP)
	@WORKERS=$(WORKERS) tests/run.sh $(BIN) $(PYTEST_ARGS)

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov=lnl_bench --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check lnl_bench tests setup.py nbs

export: $(STAMP)
	$(BIN)/nbdev_export

clean-notebooks: $(STAMP)
	$(BIN)/nbdev_clean

hooks: $(STAMP)
	$(BIN)/nbdev_install_hooks
	@hooks=$$(git rev-parse --git-path hooks) && mkdir -p "$$hooks" && \
	printf '#!/bin/sh\nexec $(BIN)/python tests/check_notebooks.py\n' > "$$hooks/pre-commit" && chmod +x "$$hooks/pre-commit"
	@echo "Commits now wait until notebooks and library agree."

# What pip freeze finds, all of it but pip and this project; a pin to a file or an address is an error.
lock: $(STAMP)
	@$(BIN)/python tests/lock.py requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc reports/demo .pytest_cache .ruff_cache
