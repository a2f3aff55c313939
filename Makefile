# make run    a short night: baseline and six experiments by the built-in agent (no GPU, no network needed)
#   (DEVICE=cpu: on the CPU, also on a machine with a GPU)
# make quick  lint, types, and the tests that your change touches, in 90 seconds
# make test   all tests but the slow ones, two at a time (JOBS=1 for one), in twenty minutes; it first installs what they
#   need and may be installed: bubblewrap and Chromium (as root), Claude Code and Codex (npm); INSTALL=0 turns that off
# make slow   for the night: long soaks, every architecture of the compile gate
# make sandbox, browser, clients   one of these programs alone
# make lint   ruff; make types  mypy; make bench  CPU benchmarks; make seal  after a change of sealed files
# make gate   every shipped kernel configuration compiled without a GPU; make gate-write  accept what it found
# make gate-step   train.py's whole step compiled without a GPU, for every architecture; make gate-step-write  accept it
# make gpu-check   everything that needs a GPU, part by part; the same command goes on where it was ended (MINUTES=9.5: begin
#   nothing that takes longer; PART="tune step": only these; AGAIN=1: though they were done; DATA=folder of rows of
#   2048 tokens, else the built-in text; TRIAL=1: all of it on a CPU at a minute size, which measures nothing)

PYTHON      ?= python3
VENV        ?= .venv
EXPERIMENTS ?= 6
TAG         ?=
DEVICE      ?=
JOBS        ?= 2
BIN         := $(VENV)/bin

.PHONY: run install quick test slow lint types bench gate gate-write gate-step gate-step-write gpu-check seal clients sandbox \
  browser doctor clean

run: $(VENV)/.installed
	$(BIN)/hotloop prepare $(if $(DEVICE),--device $(DEVICE))
	$(BIN)/hotloop loop --experiments $(EXPERIMENTS) $(if $(TAG),--tag $(TAG)) $(if $(DEVICE),--device $(DEVICE))

install: $(VENV)/.installed

$(VENV)/.installed: requirements/lock.txt pyproject.toml tools/install.py
	@$(PYTHON) tools/environment.py "$(VENV)"
	$(BIN)/python tools/install.py $(if $(filter cpu,$(DEVICE)),--cpu)
	@touch "$@"

$(VENV)/.installed-test: requirements/test.txt $(VENV)/.installed
	$(BIN)/python tools/install.py --test $(if $(filter cpu,$(DEVICE)),--cpu)
	@touch $@

test: $(VENV)/.installed-test
	@$(BIN)/python tools/programs.py
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(if $(CI),--durations=20)

quick: lint types
	@$(BIN)/python tools/touched.py | xargs -r $(BIN)/python -m pytest -q -x -n $(JOBS) --seconds 60

slow: $(VENV)/.installed-test gate gate-step
	@$(BIN)/python tools/programs.py
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q bench/bench_packing.py bench/bench_harness.py --benchmark-only -o addopts=--import-mode=importlib

gate: $(VENV)/.installed
	$(BIN)/hotloop bench gate --all

gate-write: $(VENV)/.installed
	$(BIN)/hotloop bench gate --write

gate-step: $(VENV)/.installed
	$(BIN)/hotloop bench gate --step --all

gate-step-write: $(VENV)/.installed
	$(BIN)/hotloop bench gate --step --all --write

gpu-check: $(VENV)/.installed-test
	$(BIN)/hotloop bench check $(if $(DATA),--data $(DATA)) $(foreach part,$(PART),--part $(part)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(AGAIN),--again) $(if $(TRIAL),--device cpu)

seal: $(VENV)/.installed
	$(BIN)/hotloop seal

sandbox: TOOL = bubblewrap
browser: TOOL = chromium
clients: TOOL = clients
sandbox browser clients:
	@$(PYTHON) tools/programs.py $(TOOL)

doctor: $(VENV)/.installed
	$(BIN)/hotloop doctor

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
