# The ways in. Everything runs in .venv, made from constraints.txt on first use; nothing outside of it is changed.
# Your pip settings (environment, pip.conf) hold. PYTHON=… chooses the interpreter that .venv is made with.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

MODEL ?= demo/model
HOST ?= 127.0.0.1
PORT ?= 50051
DEVICE ?= auto
WHEELS ?=
ARGS ?=
TOGETHER := -n 2 --dist loadfile # tests wait more than they compute; those of a file share its fixtures

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all lint bench-core bench-edge bench-scheduler bench-cpu bench-peers bench-anyscale bench-journal overload chaos soak gpu-check protos env clean

help:
	@echo "make demo              24 concurrent requests on the bundled model: watch the batch turn, compare with static"
	@echo "make serve MODEL=...   serve a checkpoint (a folder or a hub id) in the foreground, and say how to call it"
	@echo "                       more: HOST, PORT, DEVICE=auto|cpu|cuda|sim, ARGS='--any --other options'"
	@echo "make test              lint and the test suite; no GPU, no network but the package index"
	@echo "make test-all          the long property runs and the whole matrix too"
	@echo "make lint              ruff, mypy, import rules, stubs up to date"
	@echo "make bench-core        what the scheduler costs: targets S1, S2, S3, without a model (ARGS=--quick: a minute)"
	@echo "make bench-edge        what gRPC takes, with a null model: targets S4, S5, S6 (3 minutes; ARGS=--quick: 20 seconds)"
	@echo "make bench-journal     what the journal costs a step, by fsync policy"
	@echo "make overload          three times the load that a server can take, and 10,000 idle streams (8 minutes; ARGS=--quick: one)"
	@echo "make chaos             kill every kind of process in a loop under load: tokens lost or doubled, recovery (5 minutes; ARGS=--quick: one)"
	@echo "make soak              200,000 requests, all kinds of them, with kills at random times: at most 15 minutes"
	@echo "make bench-scheduler   what it decides, simulated: four workloads by three policies, and targets G11, G14, G15"
	@echo "make bench-cpu         Carousel and transformers on this CPU: targets C1, C3, C4, C5 (10 minutes; ARGS=--quick: two)"
	@echo "make bench-anyscale    continuous ÷ static, four caps and latency at two loads, and a report (45 minutes; ARGS=--quick: 10)"
	@echo "make bench-peers       Carousel beside OpenVINO GenAI, vLLM, llama.cpp on this CPU: target C2 (installs them on first use)"
	@echo "make gpu-check         all that needs a GPU, in ten minutes: parity, kernels, the G targets (ARGS=--quick; WHEELS=DIR offline)"
	@echo "make protos            generate the Python stubs from protos/carousel/v1/*.proto"
	@echo "make env               only make .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean             remove caches and build files; rm -rf .venv removes the environment"

demo: $(READY)
	@$(BIN)/python -m demo.run $(ARGS)

serve: $(READY)
	@echo "Call it, once it says that it serves:"
	@echo "  $(BIN)/carousel generate --target $(HOST):$(PORT) --prompt 'def fibonacci(n):' --max-tokens 64"
	@echo "  grpcurl -plaintext -d '{\"text\": \"def fibonacci(n):\", \"stopping\": {\"max_tokens\": 64}}' \\"
	@echo "    $(HOST):$(PORT) carousel.v1.Generation/Generate"
	@echo "  $(BIN)/python -c 'import client; [print(text, end=\"\", flush=True) for text in"\
	      "client.CarouselClient(\"$(HOST):$(PORT)\").generate(\"def fibonacci(n):\", max_tokens=64).text()]'"
	@echo "Ctrl-C stops it."
	@echo
	@exec $(BIN)/carousel serve --model '$(MODEL)' --device $(DEVICE) --host $(HOST) --port $(PORT) $(ARGS)

test: lint
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow" $(ARGS)

test-all: lint
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

# Leave the machine alone while these run: they say what load they saw.
bench-core: $(READY)
	$(BIN)/python -c 'import matplotlib' 2>/dev/null || PIP_USER=0 $(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.core --json bench/results/core.jsonl --plot docs/img/core_cost.png $(ARGS)

bench-edge: $(READY)
	$(BIN)/python -m bench.edge --json bench/results/edge.jsonl $(ARGS)

bench-scheduler: $(READY)
	$(BIN)/carousel simulate --workload azure-conv-like,azure-code-like,mooncake-like,anyscale-512 \
	  --policy continuous,prefill_first,static --model llama-3.1-8b --json bench/results/simulate.jsonl $(ARGS)
	-$(BIN)/python -m bench.targets --json bench/results/targets.jsonl

# The weights are made once, in the user's cache. The other shape: ARGS='--shape llama-3.2-1b'.
bench-cpu: $(READY)
	$(BIN)/python -m bench.cpu --json bench/results/cpu.jsonl $(ARGS)

# The post's experiment, scaled to this CPU; ARGS='--seed 1' adds another draw, ARGS=--full is for a GPU. Then the pictures, and
# the tables between the marks of README and docs.
bench-anyscale: $(READY)
	$(BIN)/python -c 'import matplotlib' 2>/dev/null || PIP_USER=0 $(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.anyscale --json bench/results/anyscale.jsonl $(ARGS)
	$(BIN)/python -m bench.anyscale_report --json bench/results/anyscale.jsonl --html docs/anyscale.html --images docs/img
	$(BIN)/python -m bench.written

# Each peer gets an environment of its own in bench/peers/.envs (7 GB in all); `rm -rf` it to be rid of them.
bench-peers: $(READY)
	$(BIN)/python -m bench.peers.run --json bench/results/peers.jsonl $(ARGS)

bench-journal: $(READY)
	$(BIN)/python -m bench.journal --json bench/results/journal.jsonl $(ARGS)

overload: $(READY)
	$(BIN)/python -m bench.overload --json bench/results/overload.jsonl $(ARGS)

# ARGS='--device sim' for the simulated worker; --json FILE keeps the results.
chaos: $(READY)
	$(BIN)/python -m bench.chaos $(ARGS)

# ARGS='--requests 20000 --seed 1 --minutes 3': a shorter one.
soak: $(READY)
	$(BIN)/python -m bench.soak $(ARGS)

# In .venv if it is there, else with python3, as GPU machines bring their own torch; PYTHON=… chooses. WHEELS: a folder of wheels
# for what is missing there. Nothing is installed for good.
gpu-check:
	$(or $(PYTHON),$(if $(wildcard $(READY)),$(BIN)/python,python3)) -m bench.gpu_check --json bench/results/gpu.jsonl $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

protos: $(READY)
	$(BIN)/python protos/generate.py

env: $(READY)

clean:
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './bench/peers/.envs/*' -prune -exec rm -rf {} +
	rm -rf examples/cpp/build examples/node/node_modules protos/dist
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

# torch is by far the largest: it goes first, so that the rest need not wait for a broken download twice.
$(READY): pyproject.toml constraints.txt
	@python=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: Carousel needs Python 3.11 or newer, and found none (tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)); install one, or say where it is: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),env)" >&2; \
	  exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "make: $$python can't make environments: install its venv package (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import pip' >/dev/null 2>&1; then \
	  echo "Making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	PIP_USER=0 $(BIN)/python -m pip install -c constraints.txt torch
	PIP_USER=0 $(BIN)/python -m pip install -c constraints.txt -e '.[worker,test]'
	@touch $@
