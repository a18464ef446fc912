# `make demo` and `make test` set up .venv by themselves, on a machine with Python 3.11+, git and make.
PYTHON ?= python3
# torch first and by itself: other requirements would pull its newest build. Give TORCH=torch for your own choice.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs audit clean

$(VENV)/run: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/run
	@mkdir -p demo
	$(BIN)/ecar sample --classes all --per-class 8 --out demo/samples.png --stages demo/stages.png --gif demo/stages.gif
	@echo "look at demo/samples.png, demo/stages.png and demo/stages.gif"

test: $(VENV)/dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/run
	$(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build

# Known vulnerabilities of what is installed; needs the network.
audit: $(VENV)/dev
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off

clean:
	rm -rf $(VENV) demo site
