# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv and installs the package into it.
PYTHON ?= python3
# The torch CI runs. Any torch the package admits will do: make test TORCH="torch>=2.4"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(BIN)/python
	$(BIN)/pip install --quiet '$(TORCH)' '.[demo]'
	$(BIN)/ncsr-fast demo --out demo_output

# the tests run against what was installed, not against the checkout
test: $(BIN)/python
	$(BIN)/pip install --quiet '$(TORCH)' '.[test]'
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info demo_output
