# Each target sets up what it needs: `make demo` and `make test` work alone on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/polygraft_api/v1/*.proto)
# Writes the stubs below the folder that follows.
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos $(PROTOS) \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1)
CPP := $(wildcard server/polygraft/layers/native/*.h server/polygraft/layers/native/*.cpp)
THREADS := OMP_NUM_THREADS=2
OUT ?= build/compare
# The contract of the last release.
RELEASED := $(lastword $(sort $(wildcard protos/released/*.binpb)))
# Processes that share the tests. Each takes up to 3 GiB; 0 runs the tests in one, which a debugger needs.
WORKERS ?= 2
PYTEST = -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 10
# With the lowest versions that pyproject.toml allows. torch's comes with CUDA's libraries, 5 GB together, unless pip
# is configured to find a CPU build.
OLDEST := build/oldest

.PHONY: help setup model demo serve test test-full test-oldest attacks check format docs docs-tables protos adapters bench bench-w bench-compare bench-peers bench-boundary clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.done  ## Create .venv with pinned versions and build the C++ operators

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,train,bench,dev]'
	# For the tests of the CUDA side path; aside, since torch imports it into every process where it can.
	case "$$(uname -sm)" in "Linux x86_64" | "Linux aarch64") \
		$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
			--target $(VENV)/triton triton ;; esac
	$(BIN)/python -m polygraft.layers.native.build || echo 'no C++ compiler: the slower torch operators will serve'
	touch $@

$(OLDEST)/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[server,train,bench,test]'
	$(OLDEST)/bin/python -m polygraft.layers.native.build || echo 'no C++ compiler: the slower torch operators will serve'
	touch $@

model: setup  ## Fetch and convert the default model into the user's cache directory, once
	$(BIN)/python -m polygraft.base.default_model

demo: model  ## Serve the sample adapters, send one mixed burst, show the answers
	$(BIN)/polygraft demo

serve: model  ## Serve the sample adapters until interrupted
	@echo 'call it:  $(BIN)/polygraft generate "What is the capital of Japan?" --adapter pirate'
	@echo '          $(BIN)/grpcurl -plaintext -d '\''{"prompt": "The opposite of hot is", "stopping": {"max_new_tokens": 2}}'\'' 127.0.0.1:50051 polygraft.v1.InferenceService/Generate'
	@echo 'metrics:  http://127.0.0.1:9464/metrics'
	$(BIN)/polygraft serve --adapters adapters

test: model  ## Run the tests, the demo included
	$(BIN)/python $(PYTEST) -m 'not full'

test-full: model  ## Run the tests with the whole equivalence matrix
	$(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/.done  ## Run the tests with the oldest versions that are allowed, in an environment of its own
	$(OLDEST)/bin/python -m polygraft.base.default_model
	$(OLDEST)/bin/python $(PYTEST) -m 'not full'

attacks: model  ## Attack a server of the default model, one fault after another, and report what others felt
	$(BIN)/python -m tests.attacks

check: setup  ## Lint, format, types, imports, protos and their stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(RELEASED)
	$(BIN)/python -m tools.docs_tables --check
	rm -rf build/stubs && mkdir -p build/stubs && $(call PROTOC,build/stubs)
	diff -r -x '*.proto' -x __init__.py -x __pycache__ build/stubs/polygraft_api/v1 protos/polygraft_api/v1

format: setup  ## Mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: setup  ## Build the documents as a site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-tables: setup  ## Write the tables of kinds into docs/reference/kinds.md
	$(BIN)/python -m tools.docs_tables

protos: setup  ## Generate the stubs
	$(call PROTOC,protos)

adapters: model  ## Train the sample adapters again
	$(BIN)/python adapters/train.py

bench-w: model  ## Workload W: 16 requests over 8 LoRA adapters, against the base alone and PEFT
	$(THREADS) $(BIN)/python benchmarks/workload_w.py

bench: model  ## The benchmark suite: tables and plots into docs/performance.md, JSON into build/bench
	$(THREADS) $(BIN)/python -m benchmarks.suite --document docs/performance.md

bench-compare: model  ## Merged against unmerged LoRA, the short form: table, compare.json and compare.html in OUT
	$(THREADS) $(BIN)/python -m benchmarks.compare_store build/compare/store
	$(THREADS) $(BIN)/polygraft bench compare --adapters build/compare/store --threads 2 \
		--concurrency 1,4,16 --mix 1,2,8 --rounds 2 --new-tokens 32 --out $(OUT)

bench-peers: model  ## Workload W on vLLM, OpenVINO, llama.cpp and PEFT, each installed below build/peers
	$(THREADS) $(BIN)/python -m benchmarks.peers

bench-boundary: model  ## Engine on a thread against engine in a process of its own
	$(THREADS) $(BIN)/python benchmarks/boundary.py

clean:  ## Remove what these targets made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build
