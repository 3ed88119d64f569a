PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
BENCH ?= bench
FAMILY ?= sd1
READY := $(VENV)/.ready

.PHONY: demo test test-all coverage fuzz mutants lint bench clean
# What make starts must not wait by spinning: on a shared machine that slows everything down.
export OMP_WAIT_POLICY ?= PASSIVE
# Compiled tests are kept for the next time, wherever Python is told to keep nothing: collecting takes half as long.
test test-all: export PYTHONDONTWRITEBYTECODE =

demo: $(READY)
	$(RUN) -m trainer demo --output-dir demo/output --family $(FAMILY)

test: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow and not comfy and not webui and not browser and not gpu" $(ARGS)

test-all: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal --hypothesis-profile=thorough $(ARGS)

coverage: $(READY)
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest -n 2 --dist worksteal --hypothesis-profile=thorough $(ARGS)
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

fuzz: $(READY)
	$(RUN) tools/fuzz.py $(ARGS)

mutants: $(READY)
	$(RUN) tools/mutate.py $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict -p trainer
	$(RUN) tools/lint_imports.py
	$(RUN) tools/npm.py run lint

bench: $(READY)
	$(RUN) benchmarks/$(BENCH).py $(ARGS)

$(READY): requirements.txt requirements-dev.txt requirements-webui3.txt requirements-webui4.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) tools/make_webui_hosts.py
	touch $@

clean:
	rm -rf $(VENV) node_modules demo/output output
