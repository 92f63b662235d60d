# make demo | test | test-all | check | bench | doctor
#
# Each target makes its own environment in .venv the first time, with the torch of constraints.txt.
#   make test PYTHON=python3.12      another interpreter for that environment
#   make demo VENV= PYTHON=python3   no environment: an interpreter that has torch and the other packages already
#   make test TESTS=tests/ops PYTEST_ARGS="-k dropout"

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
WORKERS ?= 2
TESTS ?= tests
PYTEST_ARGS ?=
BENCH_ARGS ?=

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH=. $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test test-all check bench doctor clean

demo: $(READY)
	$(RUN) -m varlen_inductor demo

test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup $(TESTS) $(PYTEST_ARGS)

# With those marked thorough.
test-all: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup -m "" $(TESTS) $(PYTEST_ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) benchmarks/attention.py $(BENCH_ARGS)
	$(RUN) benchmarks/model.py $(BENCH_ARGS)

doctor: $(READY)
	$(RUN) -m varlen_inductor doctor

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,demo,bench]'
	touch $@
