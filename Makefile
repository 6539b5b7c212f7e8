# Every target sets up what it needs: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
BIN := .venv/bin
WORK ?= work/tiny
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow test-parity test-reliability lint install bench clean

demo: .venv/installed
	$(BIN)/modjax data prepare --data-dir=work/data
	$(BIN)/modjax sweep --config=configs/tiny.py --workdir=$(WORK) --data-dir=work/data --jobs 2
	$(BIN)/modjax fit --workdir=$(WORK)
	$(BIN)/modjax report --workdir=$(WORK)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --ignore=tests/reliability

test-parity: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[parity]'
	$(BIN)/python -m pytest tests/nn/test_moe_parity.py tests/nn/test_streams_parity.py

test-reliability: .venv/installed
	$(BIN)/python -m pytest -m slow tests/reliability

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[data,tensorboard,dev]'
	touch $@

bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/modjax bench all

clean:
	rm -rf .venv work
