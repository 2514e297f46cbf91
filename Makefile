# Each target creates the environment in .venv first, once; test-gpu and bench-gpu with PYTHON=python3 use that one as it is.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# Requirements and environment of the targets that may run with an existing interpreter.
ENVIRONMENT := $(if $(filter $(VENV)/bin/python,$(PYTHON)),install)
HERE := PYTHONPATH=$(CURDIR)/src:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
OUT ?= runs/bench_gpu

.PHONY: help install demo real objectives zoo language test test-all test-slurm test-gpu lint docs bench bench-gpu

help:
	@echo "make demo        pretrain on generated video, probe the frozen encoder, write runs/demo/report.html (CPU, 15 min)"
	@echo "make test        fast tests (CPU, 6 to 11 min)"
	@echo "make test-all    all tests but those on SLURM (CPU, 17 to 48 min)"
	@echo "make test-slurm  jobs on a real SLURM, started on this machine (root, Debian's packages; 8 to 11 min)"
	@echo "make test-gpu    tests on one GPU, at most 9 minutes; PYTHON=python3 uses an existing environment"
	@echo "make lint        ruff and mypy"
	@echo "make docs        the documentation as a website, in build/docs"
	@echo "make bench       speed against peers: masks, training step, loader, attention; two processes against one"
	@echo "make bench-gpu   training steps and more on one GPU, at most 9 minutes; OUT=folder, SECTIONS=\"demo\", PYTHON=python3"
	@echo "make real DATA=/path/to/ut_interaction   the experiment of the demo on real video"
	@echo "make objectives  every objective with equal compute on the demo's clips (CPU, an hour); THERMAL=/path UT=/path add real video"
	@echo "make language    captions, answers, retrieval and sound on generated scenes: tables (CPU, 20 min)"
	@echo "make zoo         every encoder trained with labels, pretrained, probed: one table (CPU, an hour)"

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml setup.py
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing $(VENV) && uv pip install --python $(PYTHON) -r requirements.txt; \
	else \
	  python3 -m venv $(VENV) || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; \
	  $(PYTHON) -m pip install --progress-bar on -r requirements.txt; \
	fi
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(PYTHON) --no-deps -e .; \
	else $(PYTHON) -m pip install --quiet --no-deps -e .; fi
	@touch $(INSTALLED)

demo: install
	$(PYTHON) -m app.study --fname configs/study/demo.yaml

real: install
	@test -n "$(DATA)" || { echo "make real DATA=/path/to/ut_interaction (the folder with labels.csv)"; exit 1; }
	$(PYTHON) -m app.study --fname configs/study/real.yaml data=$(DATA)

objectives: install
	$(PYTHON) -m app.study --fname configs/study/objectives.yaml \
	  $(if $(THERMAL),datasets.thermal.data=$(THERMAL)) $(if $(UT),datasets.ut_interaction.data=$(UT))

language: install
	$(PYTHON) -m app.comparison --fname configs/study/language.yaml

zoo: install
	$(PYTHON) -m app.zoo --fname configs/study/zoo.yaml

# One thread each: a test that forks a process whose torch has run threads would hang.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest
JOBS ?= 2

test: install
	$(PYTEST) -n $(JOBS) --dist loadfile

test-all: install
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not slurm and not gpu"

test-slurm: install
	$(PYTEST) -m slurm --timeout 900 tests/slurm

test-gpu: $(ENVIRONMENT)
	$(HERE) timeout --kill-after 10 530 $(PYTHON) -m pytest -v -m gpu --timeout 120 --durations 10 tests/gpu

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: install
	$(HERE) $(PYTHON) -m tools.docs

bench: install
	$(PYTHON) -m benchmarks

bench-gpu: $(ENVIRONMENT)
	$(HERE) $(PYTHON) -m benchmarks.gpu --out $(OUT) $(SECTIONS)
