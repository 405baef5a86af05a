# `make vae` and `make test` need Python 3.10 or newer and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# This release has a CPU build on the package index, a tenth of the size of the CUDA build.
TORCH ?= torch==2.13.0

.PHONY: vae test test-slow lint bench tutorials docs clean

vae: $(VENV)/vae.done
	$(BIN)/python -m pyro_hollow.experiments.vae table --data digits

test: $(VENV)/test.done
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(VENV)/test.done
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/vae.done
	$(BIN)/python -m pyro_hollow.experiments.speed

tutorials: $(VENV)/tutorials.done
	env -u CI $(BIN)/jupyter execute --inplace tutorials/*.ipynb

docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -W --keep-going -b html tutorials build/docs

clean:
	rm -rf $(VENV) build results

$(VENV)/python.done:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/vae.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/%.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
