# Needs make and Python 3.11 or newer. Everything else is installed into .venv, pinned by
# constraints.txt, and installed again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev
# Test files that run side by side: most of them wait for processes.
TEST_JOBS ?= 2
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
# Both stamps install into the same .venv.
.NOTPARALLEL:
.PHONY: help demo notebook lint check test soak bench fix docs-notebooks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO) ## Index the sample photos and search them: no network, no settings
	@$(BIN)/toolkit demo

notebook: $(DEV) ## Open JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

check: lint ## Format, lint, types, layers and the fast tests
	$(BIN)/pytest -m "not slow and not soak"

lint: $(DEV) ## Format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --keep-id --verify $(NOTEBOOKS))

test: $(DEV) ## Every test but the soak
	$(BIN)/pytest -m "not soak" -n $(TEST_JOBS) --dist loadfile

soak: $(DEV) ## The long tests, minutes to hours
	$(BIN)/pytest -m soak --timeout=0

bench: $(DEV) ## Run every benchmark, an hour or two, and write its numbers
	for part in small workers large vit command; do \
		$(BIN)/python benchmarks/roads.py --parts $$part --json benchmarks/results/$$part.json || exit 1; \
	done
	$(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json --svg docs/growth.svg
	$(BIN)/python benchmarks/monitor.py

fix: $(DEV) ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs-notebooks: $(DEV) ## Run the notebooks and write them to docs/ as HTML
	$(BIN)/jupyter nbconvert --to html --execute --output-dir docs $(NOTEBOOKS)

clean: ## Remove caches and build output; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -c constraints.txt -e ".[demo,fast]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@ $(DEMO) # the extra dev holds the extra demo

# pip, not python: pip comes last, so a .venv that was left half made is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
