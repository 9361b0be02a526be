# make demo    serve the example in the foreground, until Ctrl-C
# make test    check the code, then run the tests on private RabbitMQ and Redis servers, in several processes (WORKERS=3)
# make test-long  the seed's behaviours on real servers, and what is measured: `make test` has their embedded form
# make test-faults  each row of docs/reliability.md: processes and servers killed, frozen, cut off, filled
# make test-newer  everything on RabbitMQ 4 and Redis 8, in a folder of their own (as root on Debian, half an hour; TESTS=tests/broker for less)
# make coverage  `make test`, and then the lines of the product that no test of it reaches
# make fuzz    bytes that nobody would think of, for as long as it takes: `make test` has a short form of it
# make soak    steady load and random faults, five minutes (SECONDS=60 for one): prints what was injected and what came of it
# make check   formatting, lint, types
# make format  format the code and mend what ruff can mend
# make bench   measure against the peers (ARGS="--only noop-http --rounds 1" for less; `--help` has the rest)
# make bench-peers  install the peers that `make bench` measures beside, each into an environment of its own
# make compare  is a request dearer than at an earlier revision? (BASE=main~5 for another than the last commit)
# make clean   remove what the tools left behind (.venv stays)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-faults test-newer coverage fuzz soak check format bench bench-peers compare clean
.DELETE_ON_ERROR:

# `exec`: the Ctrl-C is the server's, which drains and ends with status 0
demo: .venv/.installed-examples
	@exec $(BIN)/mqserve run examples/digits.py

# Tests mostly wait, so that three workers keep two cores busy. Each has a RabbitMQ and a Redis of its own.
WORKERS ?= 3
RUN_TESTS := $(BIN)/python -m tests.run_tests -n $(WORKERS)

test: check
	$(RUN_TESTS) -m 'not long and not faults'

test-long: .venv/.installed-dev
	$(RUN_TESTS) -m long -o faulthandler_timeout=300

test-faults: .venv/.installed-dev
	$(RUN_TESTS) -m faults -o faulthandler_timeout=300

test-newer: .venv/.installed-dev
	$(BIN)/python -m tests.newer_servers .servers
	MQSERVE_TEST_SERVERS=$(CURDIR)/.servers/bin $(RUN_TESTS) $(TESTS)

coverage: .venv/.installed-dev
	$(RUN_TESTS) -m 'not long and not faults' --cov --cov-report=term-missing:skip-covered

fuzz: .venv/.installed-dev
	HYPOTHESIS_PROFILE=long $(RUN_TESTS) tests/fuzz -o faulthandler_timeout=0

SECONDS ?= 300
soak: .venv/.installed-dev
	$(BIN)/python -m tests.faults.soak --seconds $(SECONDS)

check: .venv/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/basedpyright

format: .venv/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: .venv/.installed-dev
	$(BIN)/python -m benchmarks.peers.install

BASE ?= HEAD
compare: .venv/.installed-dev
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# One stamp per extra (examples, dev): a demo need not wait for the test tools.
.venv/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing mqserve[$*] into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mqserve needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another one, e.g. make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
