# `make help` lists what there is to make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?= *
LIMIT ?=
SIDE_BY_SIDE ?= --numprocesses 2 --dist loadfile
LIMITED = $(if $(LIMIT),task.max_train_samples=$(LIMIT) task.max_eval_samples=$(LIMIT))

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-results test test-all gpu lint format bench docs tables experiments \
	reproduce-gsm8k reproduce-glue reproduce-summarization reproduce-wikitext reproduce-metamath clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the package with its exact versions

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## LoRA-16, QLoRA, LoftQ and calibrated LoftQ on a small real model: one table, one plot (minutes, after the downloads)
	$(BIN)/python -m loftq_exp -m experiment=demo-lora,demo-qlora,demo-loftq,demo-calibrated

demo-results: $(STAMP) ## write the numbers and the picture of the last make demo into README.md and docs/
	$(BIN)/python scripts/demo_results.py
	$(BIN)/python scripts/result_tables.py

test: $(STAMP) ## the fast tests
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-all: $(STAMP) ## all tests, also the slow ones that fetch real weights; draws new examples
	HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m 'not gpu'

gpu: ## prove and measure the CUDA path with the machine's own packages, in ten minutes (make gpu PYTHON=python3); writes docs/gpu.md
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no CUDA device here; run it on a machine with one")'
	@mkdir -p outputs; export PYTHONPATH=.:$$PYTHONPATH; failed=0; \
	timeout --signal=INT 280 $(PYTHON) -m pytest -q -rfE --numprocesses 8 --junitxml outputs/gpu-tests.xml -m gpu tests/gpu || failed=1; \
	$(PYTHON) benchmarks/gpu.py --tests outputs/gpu-tests.xml || failed=1; \
	$(PYTHON) scripts/result_tables.py || failed=1; \
	exit $$failed

lint: $(STAMP) ## ruff, mypy, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## put the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure against PEFT's algorithm in one run; writes docs/performance.md
	$(BIN)/python benchmarks/initialisation.py
	$(BIN)/python benchmarks/packed.py time
	$(BIN)/python benchmarks/packed.py memory
	$(BIN)/python benchmarks/calibration_cost.py
	$(BIN)/python benchmarks/calibration_stage.py model
	$(BIN)/python benchmarks/calibration_stage.py block
	$(BIN)/python scripts/result_tables.py

docs: $(STAMP) tables ## write what documents have from the code: the picture of the packages, the API page, the result tables
	$(BIN)/python scripts/draw_architecture.py
	$(BIN)/python scripts/api_page.py
	$(BIN)/python scripts/model_table.py

tables: $(STAMP) ## write the result tables into README.md and docs/, from docs/results/*.json
	$(BIN)/python scripts/result_tables.py

experiments: $(STAMP) ## write conf/experiment/ from the published tables in benchmarks/published.py
	$(BIN)/python benchmarks/published.py

reproduce-gsm8k: $(STAMP) ## the paper's GSM8K rows, measured beside published (MODEL=llama-2-7b LIMIT=rows narrow them); needs a GPU
	$(BIN)/python -m loftq_exp -m 'experiment=glob($(MODEL)_*_gsm8k)' $(LIMITED)

reproduce-glue: $(STAMP) ## as above: GLUE, SQuAD and ANLI (MODEL=deberta-v3-base_nf2: those of one quantization)
	$(BIN)/python -m loftq_exp -m 'experiment=glob([$(MODEL)_*_glue-*,$(MODEL)_*_squad,$(MODEL)_*_anli])' $(LIMITED)

reproduce-summarization: $(STAMP) ## as above: XSum and CNN/DailyMail
	$(BIN)/python -m loftq_exp -m 'experiment=glob($(MODEL)_*_summarization-*)' $(LIMITED)

reproduce-wikitext: $(STAMP) ## as above: WikiText-2 (LIMIT counts blocks)
	$(BIN)/python -m loftq_exp -m 'experiment=glob($(MODEL)_*_wikitext)' $(LIMITED)

reproduce-metamath: $(STAMP) ## the rows of PEFT's MetaMathQA board, with quantized rows beside them
	$(BIN)/python -m loftq_exp -m 'experiment=glob($(MODEL)_*_metamath)' $(LIMITED)

clean: ## remove runs, sweeps, the cache and build leftovers
	rm -rf outputs/runs outputs/sweeps outputs/cache dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
