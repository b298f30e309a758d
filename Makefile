# make compare   the main job on the embedded data: sets up .venv, then a live table and a report with a figure
# make test      sets up the same and runs the tests

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
OUT ?= runs/compare-digits
OPTIONS ?=
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4

.PHONY: compare test test-all test-sanitized check bench speed numerics clean

compare: .venv/base
	$(BIN)/anybatch compare --data digits --out $(OUT) $(OPTIONS)

test: .venv/dev
	$(PYTEST)

test-all: .venv/dev
	$(PYTEST) -m ""

# Kernels in C with every access watched, about 3 minutes; needs GCC and its sanitizers.
test-sanitized: .venv/dev
	tools/sanitized $(PYTEST) tests/kernels tests/contract/test_ops.py tests/methods/test_activated_norms.py -k "not compile and (native or norm or conv or clip)"

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)

bench: .venv/base
	@$(BIN)/anybatch bench --out benchmarks/rows $(OPTIONS); code=$$?; $(BIN)/python benchmarks/speed.py && exit $$code

speed: .venv/base
	$(BIN)/python benchmarks/speed.py

numerics: .venv/dev
	$(BIN)/python benchmarks/numerics.py

clean:
	rm -rf .venv

# uv where there is one, else venv and pip; both end in the same environment.
define install
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 to 3.13 is needed and was not found; make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "setting up .venv (about 6 GB with torch; minutes the first time) ..."
	@if command -v uv >/dev/null; then \
		test -x $(BIN)/python || uv venv -q --python $(PYTHON) .venv; uv pip install -q --python $(BIN)/python -e '.$(1)'; \
	else \
		test -x $(BIN)/pip || $(PYTHON) -m venv .venv; $(BIN)/python -m pip install -q --disable-pip-version-check -e '.$(1)'; \
	fi
	@touch $@
endef

.venv/base: pyproject.toml
	$(call install,)

.venv/dev: pyproject.toml
	$(call install,[dev])
	@touch .venv/base
