PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
BENCH ?= bench
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean
# What make starts must not wait by spinning: on a shared machine that slows everything down.
export OMP_WAIT_POLICY ?= PASSIVE

demo: $(READY)
	$(RUN) -m trainer demo --output-dir demo/output

test: $(READY)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict -p trainer
	$(RUN) tools/lint_imports.py

bench: $(READY)
	$(RUN) benchmarks/$(BENCH).py $(ARGS)

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) demo/output output
