# make demo and make test do all their set-up by themselves, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lab foundation export readme api package lock audit clean setup

VENV := .venv
BIN := $(VENV)/bin
# The environment is made anew when the pinned set or the package's own description changes.
READY := $(VENV)/.ready-$(shell cat requirements.txt requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

help: ## show this list
	@echo "make ..."
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

demo: $(READY) ## the whole comparison on the embedded data, down to runs/demo/report.html
	@$(BIN)/blip2mgm run demo

test: $(READY) ## every check: notebooks, package, parameters, a small run of the whole pipeline
	@echo "== library notebooks: running their examples and assertions"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs --file_re '^((0[0-9]+|8[1-9])_.*|index)\.ipynb$$' --n_workers 2 --do_print
	@echo "== tests/: contracts, project, command line, pipeline"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=5

lab: $(READY) ## open the notebooks in JupyterLab (this machine only)
	@$(BIN)/blip2mgm lab

foundation: $(READY) ## train the shipped small models again
	@$(BIN)/blip2mgm run foundation

export: $(READY) ## write blip2mgm/ from the notebooks and clean the notebooks
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export && echo "blip2mgm/ is up to date"

readme: $(READY) ## run nbs/index.ipynb and write README.md from it
	@$(BIN)/python tests/readme.py
	@echo "README.md is up to date"

api: $(READY) ## a reference of all modules, in _docs/api
	@$(BIN)/python -W ignore -m pdoc blip2mgm --docformat markdown -o _docs/api && echo "open _docs/api/blip2mgm.html"

package: $(READY) ## the wheel and the source archive, in dist/
	@$(BIN)/python tests/package.py dist
	@rm -rf build *.egg-info && ls dist

lock: $(READY) ## resolve requirements.txt anew and write requirements.lock
	@$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.10 --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  requirements.txt -o $(VENV)/lock.txt
	@{ sed -n '/^#/p' requirements.lock; cat $(VENV)/lock.txt; } > $(VENV)/lock.new && mv $(VENV)/lock.new requirements.lock
	@echo "requirements.lock is up to date; try it with make test"

audit: $(READY) ## ask the package index for known weaknesses of what is installed; fails if it does not answer
	@$(BIN)/uv tool run -q pip-audit@2.10.1 --strict --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean: ## remove the environment and what Python left behind; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache && find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
	@echo "removed $(VENV) and caches; results in runs/ are kept"

setup: $(READY)

$(READY): requirements.txt requirements.lock pyproject.toml
	@python=""; for p in python3.11 python3.12 python3.10 python3 python; do \
	  if $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "No Python 3.10, 3.11 or 3.12 was found. Install one (3.11 is the one this was measured with) and try again." >&2; exit 1; fi; \
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	  echo "== making the environment $(VENV) with $$($$python --version)"; rm -rf $(VENV); \
	  $$python -m venv $(VENV) || { echo "Python's venv module failed (on Debian and Ubuntu it is the package python3-venv)." >&2; exit 1; }; fi
	@echo "== installing the pinned packages (about 2 GB, a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --progress-bar off -r requirements.txt -c requirements.lock
	@echo "== installing blip2mgm itself and its notebook kernel"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m ipykernel install --sys-prefix --name blip2mgm --display-name "Python (blip2mgm)" >/dev/null 2>&1
	@rm -f $(VENV)/.ready-* && touch $@
