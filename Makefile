# Everything here sets up what it needs by itself and is safe to repeat and to interrupt.
#   make setup    virtual environment, packages, default model
#   make serve    set up what is missing and serve on 127.0.0.1:8000 (ARGS="--port 9000")
#   make test     set up what is missing and run the tests           (ARGS="-k tokenizer")
#   make test-vllm  tests against a real vLLM server, which it installs
#   make test-docker    real Prometheus against a running server, with what docker/ ships
#   make bench    the performance benchmarks, ratios into benchmarks/results (ARGS="--only decode-1")
#   make lint     ruff (lint and format) and mypy

# A Python of 3.11 or newer to make the virtual environment with.
PYTHON ?= python3
MODEL ?= qwen2.5-coder-0.5b
TEST_MODELS := smollm2-135m qwen2.5-coder-0.5b
ARGS ?=

BIN := .venv/bin
FETCH := $(BIN)/ponderttt models fetch

.PHONY: setup serve test test-docker test-vllm bench lint runtime dev

setup: runtime
	$(FETCH) $(MODEL)

# The server fetches what it serves; MODEL=… is short for ARGS="--model …".
serve: runtime
	exec $(BIN)/ponderttt serve $(if $(filter command line environment,$(origin MODEL)),--model $(MODEL)) $(ARGS)

test: dev
	for model in $(TEST_MODELS); do $(FETCH) $$model || exit; done
	$(BIN)/python -m pytest $(ARGS)

# vLLM gets an environment of its own in the cache directory: 3 minutes and 3.5 GB, once.
test-vllm: dev
	$(FETCH) smollm2-135m
	$(BIN)/python -m ponderttt.bench.vllm_env
	$(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

test-docker: dev
	docker/check.sh prometheus

bench: dev
	$(FETCH) smollm2-135m
	$(BIN)/ponderttt bench engine --output benchmarks/results --json benchmarks/results/engine.json $(ARGS)

lint: dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

runtime dev:
	@$(PYTHON) scripts/setup_env.py $@
