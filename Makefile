# Each target sets up .venv by itself. The same by hand:
#   python3 -m venv .venv
#   .venv/bin/pip install -c constraints.txt -e ".[dev]"
#   .venv/bin/python examples/delayed_cue.py      (make demo)
#   scripts/check && scripts/test                 (make test, which first builds mamba-ssm to test against)
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported: most of what is installed never is, and it takes minutes. Where
# Python is told to keep nothing of that, each process would compile all of it again, which triples its time to start.
QUIETLY := --disable-pip-version-check -q --no-compile
export PYTHONDONTWRITEBYTECODE :=
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test slow check docs wheel learn test-nightly minerl test-minerl clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIETLY) -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import cyborg_torchrl.cli.main"
	touch $@

install: .venv/installed  ## .venv with the package and its tools, from the pinned lock

demo: install  ## train on delayed cue at horizon 1000
	$(BIN)/python examples/delayed_cue.py

# The official Mamba package, without its CUDA kernels: its pure-PyTorch code is what ours is tested against
.venv/official: .venv/installed
	$(BIN)/pip install $(QUIETLY) -c constraints.txt einops ninja packaging setuptools wheel
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install $(QUIETLY) \
	  --no-build-isolation --no-deps -c constraints.txt mamba-ssm \
	  && touch $@ || echo "mamba-ssm could not be built here: the tests against it will be skipped"

# Memory Gym, without what it pins (an old gymnasium); pygame-ce is there already
.venv/memory-gym: .venv/installed
	$(BIN)/pip install $(QUIETLY) --no-deps -c constraints.txt memory-gym pygame-ce \
	  && touch $@ || echo "memory-gym could not be installed here: its tests will be skipped"

# Triton, which interprets and compiles the GPU kernels without a GPU. PyTorch's CPU build does not bring it.
.venv/triton: .venv/installed
	$(BIN)/pip install $(QUIETLY) --no-deps -c constraints.txt triton \
	  && touch $@ || echo "Triton could not be installed here: the tests of its kernels will be skipped"

test: install .venv/official .venv/memory-gym .venv/triton  ## linters and tests
	scripts/check
	scripts/test --numprocesses logical --maxprocesses 4 --dist loadfile

check: install  ## linters alone
	scripts/check

docs: install  ## the site, in site/; a warning is an error (the tests build it, too)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: install .venv/official .venv/memory-gym .venv/triton  ## what takes too long for every change
	scripts/test -m slow --numprocesses logical --maxprocesses 4 --dist loadfile

learn: install  ## full learning runs: about an hour
	scripts/test -m learning

test-nightly:  ## tests with the newest builds of TorchRL, in .venv-nightly (slow)
	scripts/test_versions --python $(PYTHON) --torchrl nightly --env .venv-nightly

wheel: install  ## a wheel and a source archive, in dist/
	$(BIN)/python -m build

# MineRL 0.4.4 beside this package, in a .venv of its own: it needs a gym that others do not get along with, and builds
# only in this order. Its setup builds Minecraft with Java 8 and a network, unless READTHEDOCS is set: then there is its
# client alone, which is what the tests need. With Minecraft: make minerl READTHEDOCS=
MINERL := .venv-minerl/bin
READTHEDOCS ?= 1
.venv-minerl/installed: pyproject.toml constraints.txt requirements-minerl.txt
	$(PYTHON) -m venv .venv-minerl
	$(MINERL)/pip install $(QUIETLY) "setuptools==65.5.0" "wheel<0.39"
	$(MINERL)/pip install $(QUIETLY) --no-build-isolation --no-deps gym==0.19.0
	$(if $(READTHEDOCS),READTHEDOCS=$(READTHEDOCS)) $(MINERL)/pip install $(QUIETLY) --no-deps minerl==0.4.4
	$(MINERL)/pip install $(QUIETLY) -c constraints.txt -e . -r requirements-minerl.txt \
	  beartype gymnasium pytest
	touch $@

minerl: .venv-minerl/installed  ## .venv-minerl with MineRL's client (docs/treechop.md)

test-minerl: minerl  ## tests of the MineRL adapter
	$(MINERL)/python -m pytest -q tests/minerl -m minerl

clean:  ## remove .venv, .venv-minerl, .venv-nightly and caches (not runs/)
	rm -rf .venv .venv-minerl .venv-nightly .pytest_cache .ruff_cache .import_linter_cache dist site
