# make train: set up everything and run the default experiment. make test: set up everything and prove it.
# The newest supported Python that really starts is taken (a version manager's shim may exist and not run).
PYTHON ?= $(firstword $(foreach v,3.13 3.12 3.11,$(shell python$(v) -c 'import ensurepip, venv' 2>/dev/null && echo python$(v))))
BIN := .venv/bin
MINOR = $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: install train test test-fast test-release check format
install: .venv/installed
train: .venv/installed
	$(BIN)/python -m sdx.train $(ARGS)
test: .venv/installed-test check
	$(BIN)/python -m pytest -m "not release" $(ARGS)
test-fast: .venv/installed-test
	$(BIN)/python -m pytest -m fast $(ARGS)
test-release: .venv/installed-test
	$(BIN)/python -m pytest -m release $(ARGS)
check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "sdx needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
.venv/installed: pyproject.toml $(wildcard constraints/*.txt) | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints/py$(MINOR).txt -e .
	touch $@
.venv/installed-test: pyproject.toml $(wildcard constraints/*.txt) | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints/py$(MINOR).txt -e '.[test]'
	touch $@ .venv/installed
