# Needs Git, make and Python. Each target first installs the versions in constraints.txt into .venv, once.
#   make setup  install only
#   make demo   run the whole pipeline and print its results
#   make test   project rules, all notebooks, and tests across modules: minutes
#   make test-all  the same with slow tests, notebooks on the exported package, coverage, and benchmarks
#   make try NB=models/conformer  export, clean and test one notebook, and the rules that apply to it: seconds
#   make benchmarks  run every benchmark on tiny data
#   make compare  train three families of models from scratch, five minutes each, and recommend one
#   make report  all reports, the comparison and the milestones as HTML, in _site
#   make s3     a real S3 server on this machine, for the remote `minio`
#   make docs   the front page, the tutorials and the library's notebooks as pages, in _docs
#   make lab    JupyterLab with this project's kernel
PYTHON  ?= python3
VENV    ?= .venv
# more notebook cells and tests to run: FLAGS="slow cuda"
FLAGS   ?=
# more options for pytest
PYTEST  ?=
WORKERS ?= 2
LAB_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)

# Keep the machine's Python settings out of the environment.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
HERE := $(if $(filter /%,$(VENV)),,$(CURDIR)/)
export PATH := $(HERE)$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
# DVC unpickles files in this folder: it must be writable by this user only.
export DVC_SITE_CACHE_DIR := $(CURDIR)/.dvc/tmp/site
export JUPYTER_PREFER_ENV_PATH := 1
# Jupyter, DVC and matplotlib write under HOME: set one if the machine has none.
ifneq ($(shell test -d "$$HOME" -a -w "$$HOME" && echo writable),writable)
export HOME := $(HERE)$(VENV)/home
export PIP_NO_CACHE_DIR := 1
endif

.PHONY: help demo compare report test test-all try check notebooks pytest benchmarks s3 lab docs setup
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	@$(BIN)/dvc repro
	@$(BIN)/ai2text summary

# A separate pipeline on the same shards.
compare: $(STAMP)
	@$(BIN)/dvc repro compare/dvc.yaml
	@cd compare && ai2text compare

# Self-contained HTML.
report: $(STAMP)
	@$(BIN)/ai2text report

test: check notebooks pytest

# Coverage combines the notebooks' tests on the exported package (tests/test_replay.py) and all other tests.
test-all:
	@$(MAKE) --no-print-directory test benchmarks FLAGS="slow $(FLAGS)" PYTEST=--cov

# NB: path under nbs/, with or without the number.
NOTEBOOK = $(firstword $(wildcard nbs/$(NB).ipynb nbs/$(dir $(NB))[0-9][0-9]_$(notdir $(NB)).ipynb))
try: $(STAMP)
	@test -n "$(NOTEBOOK)" || { echo "error: nbs/$(NB).ipynb: no such notebook; name one: make try NB=models/conformer" >&2; exit 1; }
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean --fname $(NOTEBOOK)
	@$(BIN)/ai2text identity
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path $(NOTEBOOK) --do_print
	@$(BIN)/ruff check ai2text $(NOTEBOOK)
	@$(BIN)/python -m pytest -q tests/test_house.py -k "$(basename $(notdir $(NOTEBOOK))) or sync or required"

# Static checks and project rules: seconds.
check: $(STAMP)
	@echo "--- ruff"
	@$(BIN)/ruff check ai2text nbs tests setup.py
	@echo "--- bandit"
	@$(BIN)/bandit -q -c pyproject.toml -r ai2text
	@echo "--- project rules"
	@$(BIN)/python -m pytest -q tests/test_house.py

# Runs every notebook with its own definitions; benchmarks have a target of their own.
notebooks: export OMP_NUM_THREADS := 1
notebooks: $(STAMP)
	@echo "--- nbdev_test"
	@$(BIN)/nbdev_test --n_workers $(WORKERS) --timing --flags "$(FLAGS)" --skip_folder_re '^[_.]|^benchmarks$$'

benchmarks: export OMP_NUM_THREADS := 1
benchmarks: $(STAMP)
	@echo "--- nbdev_test of benchmarks"
	@$(BIN)/nbdev_test --path nbs/benchmarks --n_workers $(WORKERS) --timing --flags "$(FLAGS)"

# Tests across modules, one file per process, in $(WORKERS) processes.
pytest: export OMP_NUM_THREADS := 1
pytest: $(STAMP)
	@echo "--- pytest"
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=12 --ignore=tests/test_house.py $(PYTEST) --flags "$(FLAGS)"

# The bucket of the remote `minio`, in .s3/; these keys are valid for this server only. Ctrl-C stops it.
s3: $(STAMP)
	@mkdir -p .s3/ai2text
	@echo "export AWS_ACCESS_KEY_ID=minio AWS_SECRET_ACCESS_KEY=minio123    # in another shell; then: dvc push -r minio"
	@$(BIN)/rclone serve s3 --config /dev/null --addr 127.0.0.1:9000 --auth-key minio,minio123 .s3

lab: $(STAMP)
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" $(LAB_ARGS)

# Stages and benchmarks are read as reports (`make report`).
docs: $(STAMP)
	@$(BIN)/ai2text docs

# The front page, from nbs/index.ipynb with its outputs; links to figures and tutorials get the prefix nbs/.
README.md: nbs/index.ipynb nbs/images/run.png nbs/images/people.png nbs/images/plan.png $(STAMP)
	@$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README $<
	@sed -i.bak -e 's|](images/|](nbs/images/|g' -e 's|](tutorials/|](nbs/tutorials/|g' $@ && rm $@.bak

nbs/images/run.png: results/conformer_ctc/ttq_log.json $(STAMP)
	@mkdir -p $(@D)
	@MPLBACKEND=agg MATPLOTLIBRC=ai2text/matplotlibrc $(BIN)/python -c "from ai2text.ttq.plots import plot_ttq; from ai2text.ttq.log import load_log; plot_ttq(load_log('$<')).figure.savefig('$@', dpi=110)"

# Figures from committed notebooks; FIGURE counts from 0.
nbs/images/people.png: papermill_runs/benchmarks/people.ipynb
nbs/images/people.png: FIGURE = 0
nbs/images/plan.png: nbs/tutorials/plan.ipynb
nbs/images/plan.png: FIGURE = 1
nbs/images/people.png nbs/images/plan.png: $(STAMP)
	@$(BIN)/python -c "import base64, json; found = [o['data']['image/png'] for c in json.load(open('$(filter %.ipynb,$^)'))['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]; open('$@', 'wb').write(base64.b64decode(found[$(FIGURE)]))"

setup: $(STAMP)

# The stamp is removed first and written last, so an interrupted install starts again from an empty environment.
$(STAMP): constraints.txt settings.ini setup.py
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' on this machine's PATH; name a Python >= $(MIN_PYTHON): make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { echo "error: this project needs Python >= $(MIN_PYTHON), and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "--- installing into $(VENV) (several GB; minutes, once)"
	@if test -e $@; then rm $@; else "$(PYTHON)" -m venv --clear $(VENV); fi
	@mkdir -p "$$HOME"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-user --progress-bar off -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (ai2text)" --env MATPLOTLIBRC "$(CURDIR)/ai2text/matplotlibrc" >/dev/null
	@touch $@
