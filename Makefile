# `make demo` and `make test` set up .venv by themselves, on a machine with Python 3.11+, git and make.
PYTHON ?= python3
# torch first and by itself: other requirements would pull its newest build. Give TORCH=torch for your own choice.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test check docs audit clean

$(VENV)/run: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@echo "setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/run
	@$(PIP) --editable ".[dev]"
	@touch $@

demo: $(VENV)/run
	@mkdir -p demo
	@$(BIN)/ecar sample --classes all --per-class 1 --dtype bf16 --out demo/samples.png >/dev/null
	@$(BIN)/ecar sample --classes "Monarch,Luna Moth,Purple Hairstreak,Adonis" --per-class 4 --dtype bf16 --out demo/four.png --stages demo/stages.png --gif demo/stages.gif >/dev/null
	@$(BIN)/ecar sample --classes Monarch --per-class 1 --out demo/monarch.png >/dev/null
	@$(BIN)/ecar edit demo/monarch.png --class "Luna Moth" --box 128,0,128,256 --count 4 --dtype bf16 --out demo/edit.png >/dev/null
	@echo "look at demo/samples.png, demo/stages.png, demo/stages.gif and demo/edit.png"

TESTS ?= -m "not slow"
test: $(VENV)/dev
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(TESTS)

check: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/run
	@$(PIP) --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Known vulnerabilities of what is installed; needs the network.
audit: $(VENV)/dev
	@$(BIN)/pip-audit --local --skip-editable --progress-spinner off

clean:
	@rm -rf $(VENV) demo site
