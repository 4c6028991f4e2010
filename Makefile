# The menu. PYTHON chooses the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
STRICT = -Wall -Wextra -Wstrict-prototypes -Werror
C_FILES = $(shell find csrc tests/emulated benchmarks -name '*.[ch]' -o -name '*.inc')

.PHONY: help build test parity emulated asan bench format check wheel ci clean
help:
	@echo "make build     the extension, in place, warnings are errors"
	@echo "make test      all tests"
	@echo "make parity    every kernel of this CPU's instruction sets against the reference"
	@echo "make emulated  the same on emulated CPUs: NEON, AVX-512, x86-64 without AVX"
	@echo "make asan      kernel tests and harness under address and undefined sanitizers"
	@echo "make bench     every kernel beside every installed peer and the machine's limits; BENCH=--full"
	@echo "make format    clang-format and ruff, in place"
	@echo "make check     what format would change, linters"
	@echo "make wheel     sdist and wheel, audited, tried on other Pythons without torch"
	@echo "make ci        everything, in a fresh environment"

build:
	QUANTIZATION_CFLAGS="$(STRICT)" $(PYTHON) setup.py -q build_ext --inplace

test: build
	$(PYTHON) -m pytest

parity: build
	$(PYTHON) tests/emulated/targets.py native
	$(PYTHON) -m pytest -q tests/kernels

emulated:
	$(PYTHON) tests/emulated/targets.py

asan:
	tools/asan.sh $(PYTHON)

bench: build
	$(PYTHON) -m benchmarks $(BENCH)

format:
	clang-format -i $(C_FILES)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:
	clang-format --dry-run -Werror $(C_FILES)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

wheel:
	tools/check_wheel.sh $(PYTHON)

ci:
	.ci/run

clean:
	rm -rf build dist *.egg-info quantization/_kernels*.so
