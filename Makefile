# make run    a short night: baseline and six experiments by the built-in agent (no GPU, no network needed)
# make test   all tests, two at a time (JOBS=1 for one)
# make clients   Claude Code and Codex into .clients/, for the tests that drive the real ones (npm; no key needed)
# make sandbox   installs bubblewrap (as root)
# make lint   ruff; make types  mypy; make bench  CPU benchmarks; make seal  after a change of sealed files
# make soak   300 experiments under faults of every kind, driver killed again and again (no GPU, minutes)
# make gate   every shipped kernel configuration compiled without a GPU; make gate-write  accept what it found
# make gpu-check   everything that needs a GPU, in twenty minutes (DATA=folder of rows of 2048 tokens, else stdlib's text);
#   half of them are PART=baseline, train.py beside plain PyTorch; PART="tests kernels step sandbox experiment" the rest;
#   PART=overheads, two short nights against the targets of start, compile, evaluation and experiments an hour, is extra

PYTHON      ?= python3
VENV        ?= .venv
EXPERIMENTS ?= 6
TAG         ?=
JOBS        ?= 2
BIN         := $(VENV)/bin

.PHONY: run install test lint types bench gate gate-write gpu-check soak seal clients sandbox browser doctor clean

run: $(VENV)/.installed
	$(BIN)/hotloop prepare
	$(BIN)/hotloop loop --experiments $(EXPERIMENTS) $(if $(TAG),--tag $(TAG))

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hotloop: $(PYTHON) is older than 3.11; say for example: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements/lock.txt pyproject.toml tools/install.py | $(BIN)/python
	$(BIN)/python tools/install.py
	@touch $@

$(VENV)/.installed-test: requirements/test.txt $(VENV)/.installed
	$(BIN)/python tools/install.py --test
	@touch $@

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q bench/bench_packing.py bench/bench_harness.py bench/bench_night.py --benchmark-only -o addopts=--import-mode=importlib

soak: $(VENV)/.installed-test
	SOAK=300 $(BIN)/python -m pytest -q -s tests/agent_loop/test_soak.py

gate: $(VENV)/.installed
	$(BIN)/hotloop bench gate

gate-write: $(VENV)/.installed
	$(BIN)/hotloop bench gate --write

gpu-check: $(VENV)/.installed-test
	$(BIN)/hotloop bench check $(if $(DATA),--data $(DATA)) $(foreach part,$(PART),--part $(part))

seal: $(VENV)/.installed
	$(BIN)/hotloop seal

CLIENTS := @anthropic-ai/claude-code@2.1.330 @openai/codex@0.169.0

clients:
	npm install --no-fund --no-audit --no-save --prefix .clients $(CLIENTS)

sandbox:  # bubblewrap, for the best sandbox; Debian's and Ubuntu's package
	@command -v bwrap >/dev/null || { apt-get update -qq && apt-get install -y -qq bubblewrap; }

browser:  # Chromium, for the tests of report.html; Debian's package
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }

doctor: $(VENV)/.installed
	$(BIN)/hotloop doctor

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
