# `make vae` and `make test` need Python 3.10 or newer and the network, for pip; nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The package index has a CPU build of this release for macOS and Windows, and for Linux a CUDA build of several GB, which
# runs on a CPU, too. The small CPU build for Linux: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# NumPyro for `python -m pyro_hollow.experiments.posteriors --peer ...`; needs Python 3.11 or newer.
NUMPYRO_VENV := .venv-numpyro
NUMPYRO ?= numpyro==0.22.0 jax==0.10.2 jaxlib==0.10.2

# The sbi package for `python -m pyro_hollow.experiments.sbi --peer ...`.
SBI_VENV := .venv-sbi
SBI ?= sbi==0.27.0

.PHONY: vae test test-slow lint bench tutorials docs numpyro sbi clean

vae: $(VENV)/vae.done
	$(BIN)/python -m pyro_hollow.experiments.vae table --data digits

test: $(VENV)/test.done
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: $(VENV)/test.done
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/vae.done
	$(BIN)/python -m pyro_hollow.experiments.speed

tutorials: $(VENV)/tutorials.done
	env -u CI $(BIN)/jupyter execute --inplace tutorials/*.ipynb

docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -W --keep-going -b html tutorials build/docs

numpyro: $(NUMPYRO_VENV)/numpyro.done

$(NUMPYRO_VENV)/numpyro.done:
	$(PYTHON) -m venv $(NUMPYRO_VENV)
	$(NUMPYRO_VENV)/bin/python -m pip install --quiet $(NUMPYRO)
	touch $@

sbi: $(SBI_VENV)/sbi.done

$(SBI_VENV)/sbi.done:
	$(PYTHON) -m venv $(SBI_VENV)
	$(SBI_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(SBI_VENV)/bin/python -m pip install --quiet $(SBI)
	touch $@

clean:
	rm -rf $(VENV) $(NUMPYRO_VENV) $(SBI_VENV) build results

$(VENV)/python.done:
	@echo "Installing $(TORCH) from $(or $(TORCH_INDEX),pip's package index)."
	@echo "On Linux the usual index has a CUDA build of several GB; choose by TORCH=... and TORCH_INDEX=... (README)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@$(BIN)/python -c "import torch; print('Installed torch', torch.__version__, 'with CUDA', torch.version.cuda or 'left out')"
	touch $@

$(VENV)/vae.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/%.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
