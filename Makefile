# Each target sets itself up: a fresh machine needs Python 3.11+ and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The kernels are rebuilt when any of these changes.
NATIVE = $(wildcard native/* native/*/* native/*/*/*) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test check lint types docs bench sanitize aarch64 fuzz clean

$(VENV)/pip.stamp:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core.stamp: $(VENV)/pip.stamp $(NATIVE)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(PIP) --editable ".[test,lint,docs]"
	@touch $@

# The main job on the embedded digits: train, prune, share, pack, reload, evaluate, report.
demo: $(VENV)/core.stamp
	$(BIN)/gossamer compress --recipe digits-demo --out demo --restart

# Everything that must be green. One torch thread per test process.
test: $(VENV)/test.stamp lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=25
	$(BIN)/mkdocs build --strict # not --quiet, which lets warnings pass

check: test

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/test.stamp
	$(BIN)/mypy

docs: $(VENV)/test.stamp
	$(BIN)/mkdocs build --strict

bench: $(VENV)/test.stamp
	for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

# The kernels under AddressSanitizer and UBSan: the longer job.
sanitize: $(VENV)/test.stamp
	sh native/sanitize.sh $(BIN)/python

# The kernels on every instruction set, and for aarch64 under user-mode emulation; by hand.
# Needs aarch64-linux-gnu-g++ and qemu-aarch64; what lacks is named, and skipped.
aarch64: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m slow tests/native

# Damaged .gsm files, guided by coverage: the longer job. A finding is written to build/fuzz-*.
FUZZ_SECONDS ?= 60

$(VENV)/fuzz.stamp: $(VENV)/core.stamp
	$(PIP) atheris
	@touch $@

fuzz: $(VENV)/fuzz.stamp
	mkdir -p build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python fuzz/fuzz_pack.py -max_total_time=$(FUZZ_SECONDS) \
		-max_len=4096 -timeout=60 -artifact_prefix=build/fuzz- build/fuzz tests/pack/golden

clean:
	rm -rf $(VENV) build site demo .mypy_cache .ruff_cache .pytest_cache
