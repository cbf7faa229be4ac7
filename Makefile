# Everything runs in a virtual environment that the first target makes ($(VENV)); later calls reuse it.
#   make quickstart ARGS="--data pairs.jsonl --eval-data test.jsonl"       make test ARGS="tests/test_demo.py -k learn"
VENV ?= .venv
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv gpu quickstart test test-long lint clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

venv:            ## make or reuse the virtual environment (Python 3.11, 3.12 or 3.13)
	@bash tools/make_venv.sh $(VENV)

gpu:             ## Transformer Engine and flash-attn, compiled for this machine's GPU (half an hour or more)
	@VENV=$(VENV) bash tools/install_gpu.sh $(ARGS)

quickstart: venv ## demonstration: data, tokenizer, stage 1, stage 2, export, accuracy before and after
	@$(VENV)/bin/python -m gram_engine.reproduce.quickstart $(ARGS)

# Two lanes: tests of several processes share one pool of workers, the others run beside them. A file or -k goes without lanes.
LANES = $(if $(ARGS),,-n 2 --dist loadgroup)
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(LANES)

test: venv       ## the tests, in under 8 minutes on 2 cores; PART=unit, distributed, faults or examples runs a part of them
	@$(PYTEST) $(if $(PART),-m "$(PART) and not long") $(ARGS)

test-long: venv  ## all tests, with those marked `long`, and more faults of each kind: most of an hour
	@GRAM_FAULTS=long $(PYTEST) -m "" $(ARGS)

lint: venv       ## style and unused names
	@$(VENV)/bin/python -m ruff check gram_engine tests tools setup.py

clean:           ## remove runs/, caches and the virtual environment
	rm -rf runs build dist .whl *.egg-info gram_engine/kernels/*.so .pytest_cache .ruff_cache $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
