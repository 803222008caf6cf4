# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Quantised bases are tested in processes of their own: where these packages are installed, every import is slow and noisy.
QUANTIZATION := $(VENV)/quantization

.DEFAULT_GOAL := help
.PHONY: help setup browser demo paper paper-full test check test-long bench docs gpu lint clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## prepare .venv with everything that demo and test need (quick when nothing changed)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"piflow needs Python 3.11 or 3.12, but $(PYTHON) is {v[0]}.{v[1]}; name another: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@command -v g++ >/dev/null || { echo "g++ is missing: DeepSpeed compiles a small extension at its first start. Debian and Ubuntu: apt-get install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[all]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(QUANTIZATION) bitsandbytes torchao gguf
	@touch $(STAMP)

demo: setup ## distil the digits teacher with pi-ID on ZeRO-3, sample, measure: report and pictures in outputs/digits
	$(BIN)/python -m piflow.digits.demo --out outputs/digits

paper: setup ## the paper's claims in small: a core of trainings on digits, tables and plots (at most 45 minutes)
	$(BIN)/python -m benchmarks.paper core

paper-full: setup ## all of its cells; hours, and it goes on where it was stopped
	$(BIN)/python -m benchmarks.paper full

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint browser ## lint, types and the fast tests
	$(BIN)/python -m pytest -m "not launcher and not slow and not long"

# The web demo is tested in a real browser.
browser: setup
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else $(BIN)/playwright install chromium; fi

test: lint browser ## lint, types and the whole test suite
	$(BIN)/python -m pytest -m "not long"

test-long: lint browser ## also the long trials
	$(BIN)/python -m pytest

bench: setup ## CPU benchmarks against their peers, on a quiet machine; then the tables of README and docs
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.run --suite all --device cpu
	$(BIN)/python -m benchmarks.report

docs: setup ## the documentation as a site in outputs/site; links and references are checked
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs outputs/site

gpu: setup ## on a machine with a GPU: correctness, benchmarks, launch table, into benchmarks/results/<gpu>
	$(BIN)/python -m benchmarks.gpu

clean: ## remove build products and caches; outputs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
