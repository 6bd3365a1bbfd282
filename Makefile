# Two commands do all the set-up: `make demo` and `make test`. To change the code, `make dev` once, then `make check`.
#
#   make demo      super-resolve three photographs into demo_output/
#   make dev       install the checkout for development; again after a change in csrc/, of which it compiles what changed
#   make check     before every commit, under 2 minutes: lint and the fast tests, in what `make dev` installed
#   make lint      ruff, clang-format, mypy
#   make test      what CI runs: lint, and every test but those marked exhaustive, against an installed copy
#   make test-all  the exhaustive ones too
#   make matrix    the fast tests with other versions of Python and torch, and on lesser CPUs
#   make docs      the pages of docs/ and the API as a site in build/site, with what `make dev` installed
#   make figures PUBLISHED=CHECKOUT  measure all that the pages' tables say, on an idle machine, and write them: an hour
#   make wheels    a wheel for each Python in dist/, tried in a new environment without a compiler
#   make wheel-gpu wheels with CUDA kernels in wheels/, for benchmarks/gpu.sh on a machine with a GPU; minutes for each Python
#
# Two environments, which never touch each other. $(VENV) has a copy of the package, as users get it: `demo` and `test`
# install it anew from the checkout, CUDA kernels included where there is nvcc. $(DEV) has the checkout itself: a change in
# Python is seen at once. `make dev NCSR_FAST_CUDA=1` compiles the CUDA kernels as well, which takes minutes the first time.
# `test` compiles CUDA kernels for one architecture, which newer GPUs run as well; `demo` and `test-all` for all of them.
# One test: .venv-dev/bin/pytest tests/nn/test_flow.py -k round_trip
PYTHON ?= python3
# The torch CI runs. Any torch the package admits will do: make test TORCH="torch>=2.4"
TORCH ?= torch==2.13.0
# of `wheels` and `wheel-gpu`, all by default: make wheels PYTHONS=3.12
PYTHONS ?=
VENV := .venv
BIN := $(VENV)/bin
DEV := .venv-dev
PYTEST_FLAGS := -n auto --maxprocesses 4 --dist worksteal
# of slow tests some wait for processes of their own: one process more than cores, up to four
PYTEST_FLAGS_SLOW := -n $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4))) --dist worksteal
# what [build-system] in pyproject.toml requires, for builds that find their objects of the last time
BUILD := 'setuptools>=68' 'pybind11>=2.13' ninja

.PHONY: demo dev check lint test test-all matrix docs figures wheels wheel-gpu clean

demo: $(BIN)/python
	$(call install_copy,demo)
	$(BIN)/ncsr-fast demo --out demo_output

dev: $(DEV)/bin/python
	$(DEV)/bin/pip install --quiet $(BUILD)
	NCSR_FAST_CUDA=$${NCSR_FAST_CUDA:-0} $(DEV)/bin/pip install --quiet --no-build-isolation '$(TORCH)' --editable '.[dev]'
	@cat ncsr_fast/build_info.txt

check: $(DEV)/bin/ruff
	$(call lint_with,$(DEV)/bin)
	$(DEV)/bin/pytest $(PYTEST_FLAGS) -m 'not slow'

lint: $(DEV)/bin/ruff
	$(call lint_with,$(DEV)/bin)

test: export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
test: $(BIN)/python
	$(call install_copy,dev)
	$(call lint_with,$(BIN))
	$(BIN)/pytest $(PYTEST_FLAGS_SLOW) -m 'not exhaustive'

test-all: $(BIN)/python
	$(call install_copy,dev)
	$(call lint_with,$(BIN))
	$(BIN)/pytest $(PYTEST_FLAGS_SLOW)

matrix:
	$(PYTHON) .ci/matrix.py --torch '$(TORCH)'

docs: $(DEV)/bin/ruff
	$(DEV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site

figures: export OMP_NUM_THREADS := 2
figures: $(BIN)/python
	$(call install_copy,dev)
	$(BIN)/python -m ncsr_fast.benchmarks.end_to_end --published $(PUBLISHED) --threads 2 --out benchmarks/results
	$(BIN)/ncsr-fast bench --threads 2 --no-compile --out benchmarks/results
	$(BIN)/python -m ncsr_fast.benchmarks.pages

wheels:
	$(PYTHON) .ci/wheels.py --torch '$(TORCH)' $(PYTHONS)

wheel-gpu:
	$(PYTHON) .ci/wheels.py --cuda $(PYTHONS)

# build/lib holds the copy of an earlier time, with files that the checkout may have no more; objects stay
define install_copy
	rm -rf build/lib* build/bdist*
	$(BIN)/pip install --quiet '$(TORCH)' '.[$(1)]'
endef

define lint_with
	$(1)/ruff check
	$(1)/ruff format --check
	$(1)/clang-format --dry-run --Werror csrc/*.cpp csrc/*/* tests/native/*.cpp
	$(1)/mypy
endef

$(BIN)/python $(DEV)/bin/python:
	$(PYTHON) -m venv $(@D:/bin=)

$(DEV)/bin/ruff:
	$(MAKE) dev

clean:
	rm -rf $(VENV) $(DEV) .matrix wheels dist build *.egg-info demo_output
