# Everything a clone needs, in a virtual environment of its own. Works with GNU make 3.81 and newer.
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
TEMPLATE := configs/chat-templates/chatml-tools.jinja
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
RUNS ?= 3
MINUTES ?= 10
COUNT ?= 100
SEED ?=
MODELS ?= PHW
# Left to test-all: what takes minutes on its own (kills at random moments, every scenario of the
# benchmark) or needs more than Python (Ray, systemd). Without a browser the page's tests skip.
TESTS ?= tests --ignore tests/faults/test_batch_kill.py --ignore tests/live/test_demo_live.py \
	--ignore tests/live/test_fleet_live.py --ignore tests/live/test_fleet_cluster_live.py \
	--ignore tests/live/test_systemd_live.py

FLEET_TESTS := tests/live/test_fleet_live.py tests/live/test_fleet_cluster_live.py \
	tests/live/test_fleet_node_live.py tests/unit/test_fleet_shared.py

# The first Python that is new enough; `make PYTHON=/path/to/python` names another one.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; break; fi; done)
endif

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-fast test-fleet test-clients lint format bench soak \
	soak-series faults clean

help:
	@echo "make demo       show what Keepwarm does, on a small model (about five minutes)"
	@echo "make setup      install everything into $(VENV) and fetch the model; others do so too"
	@echo "make test       run the tests, those with the real engine too"
	@echo "make test-all   run the long ones as well"
	@echo "make test-fleet run those of the fleet, on a Ray of their own (installs Ray: 200 MB)"
	@echo "make test-clients run real coding agents against Keepwarm (installs them: 1 GB, needs npm)"
	@echo "make test-fast  run the tests that need neither engine nor model"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format the code"
	@echo "make bench      measure everything, $(RUNS) runs (RUNS=1 for one); Markdown on stdout"
	@echo "make soak       an agent's low load for $(MINUTES) minutes: does anything grow or get lost?"
	@echo "make soak-series  $(COUNT) random series a model kind, tokens beside the bare engine's"
	@echo "make faults     break something $(COUNT) times and look; SEED=n replays a campaign"
	@echo "make clean      remove .venv and caches; the fetched model stays"

demo: $(VENV)/.installed $(MODEL)
	@$(BIN)/keepwarm demo $(DEMO_FLAGS)

setup: $(VENV)/.installed-dev $(MODEL)

test: $(VENV)/.installed-dev $(MODEL)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

test-all: $(VENV)/.installed-dev $(MODEL)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-fast: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m "not live" $(PYTEST_FLAGS)

# Nodes are killed under load here; on a machine that does other things too a second try is fair.
test-fleet: $(VENV)/.installed-fleet $(MODEL)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) $(FLEET_TESTS) || \
		$(BIN)/python -m pytest $(PYTEST_FLAGS) --last-failed $(FLEET_TESTS)

# Pinned versions, installed below $(CLIENTS) and nowhere else. They run on a model of random weights
# for the counts, and on one that can call tools where it lies among the models.
CLIENTS := .cache/clients
test-clients: $(VENV)/.installed-dev $(MODEL)
	@$(BIN)/python scripts/install_clients.py --aider $(CLIENTS)
	@KEEPWARM_TEST_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/clients

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed $(MODEL)
	@$(BIN)/keepwarm bench all --runs $(RUNS) --markdown --model $(MODEL) \
		--chat-template $(TEMPLATE) $(BENCH_FLAGS)

soak: $(VENV)/.installed $(MODEL)
	@$(BIN)/python -m benchmarks.soak --model $(MODEL) --chat-template $(TEMPLATE) \
		--minutes $(MINUTES)

# P plain attention, H hybrid, W sliding window; what fails is made as short as it can be.
soak-series: $(VENV)/.installed-dev $(MODEL)
	@PYTHONPATH=tests:tests/live $(BIN)/python tests/live/differential.py --count $(COUNT) \
		--models $(MODELS) $(if $(SEED),--seed $(SEED)) $(SERIES_FLAGS)

# As root with file systems that can be full, read-only, frozen or gone; else those are skipped.
faults: $(VENV)/.installed-dev $(MODEL)
	@PYTHONPATH=tests $(BIN)/python tests/faults/campaign.py --count $(COUNT) \
		$(if $(SEED),--seed $(SEED)) $(FAULTS_FLAGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamps make a second call quick; a changed pyproject.toml installs again.
$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "error: Keepwarm needs Python 3.11 or newer, and none was found." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) can't be used: Keepwarm needs Python 3.11 or newer." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) can't make a virtual environment (see above)." >&2; \
		echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing Keepwarm and its engine into $(VENV): some 100 MB, one to three minutes ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing Keepwarm with its test tools into $(VENV): some 200 MB, two to five minutes ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-fleet: pyproject.toml | $(VENV)/.installed-dev
	@echo "Installing Ray Serve into $(VENV): some 200 MB, one to three minutes ..."
	@$(PIP) --editable '.[dev,fleet]' 'moto[server]'
	@touch $@

$(MODEL): | $(BIN)/python
	@echo "Fetching the model SmolLM2-135M-Instruct: 98 MB, once ..."
	@$(BIN)/python scripts/fetch_model.py $(dir $(MODEL)) >/dev/null
