# make demo     a small model from nothing to tokens, with a table of what happened
# make test     every test
# make check    format, lint, types
# make install  the virtual environment alone (.venv)
# make clean    remove what these made
#
# PYTHON=python3.12 make ...   chooses the interpreter. Where pip looks for packages is pip's own configuration.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Run by any Python, old ones too, so the sentence below can be printed and not a syntax error.
PROBE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# The first interpreter that will do; `python3` is asked first, because it is the one the user chose.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(PROBE)' >/dev/null 2>&1; then echo $$p; exit; fi; done)

.PHONY: demo test check install clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python benchmarks/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# mypy is shown the root under its package name by a link inside its own cache, which every other tool skips.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p .mypy_cache/path && ln -sfn ../.. .mypy_cache/path/motrt
	cd .mypy_cache/path && ../../$(BIN)/mypy --config-file motrt/pyproject.toml motrt

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(PROBE)' 2>/dev/null || { \
		echo "make install needs Python 3.11 or newer with the venv and ensurepip modules, and found none" \
		"(tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11))." \
		"Python 3.10 runs this package with PyTorch alone: no onnxruntime that knows opset 24 is built for it." \
		"Install one (on Debian and Ubuntu: apt install python3-venv), or name one: make install PYTHON=/path/to/python3" >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,tensorrt-rtx,serve,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo motrt.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
