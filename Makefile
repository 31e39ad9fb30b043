# Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test format clean bubblewrap

# A few minutes of GRPO on any CPU: a tiny model learns from random weights.
demo: .venv/base.stamp
	$(BIN)/python -m grpo.launch --config=experiments/tiny.py --workdir=runs/demo

# What a change must pass.
test: .venv/test.stamp bubblewrap
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" -rs

# The strongest tier of the sandbox needs it. Where it is missing and cannot be installed, the tests
# of that tier are skipped, and say so.
APT_INSTALL = timeout 120 apt-get install -y --no-install-recommends bubblewrap libseccomp2
bubblewrap:
	@command -v bwrap >/dev/null 2>&1 \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 \
	     && export DEBIAN_FRONTEND=noninteractive \
	     && { $(APT_INSTALL) || { timeout 120 apt-get update && $(APT_INSTALL); }; } >/dev/null 2>&1; } \
	|| true
	@command -v bwrap >/dev/null 2>&1 \
	|| echo "bubblewrap is not installed; the sandbox falls back to Landlock"

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info

# A stamp is written last: an interrupted installation is done again.
.venv/base.stamp: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e .
	touch $@

.venv/test.stamp: .venv/base.stamp
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[test]'
	touch $@
