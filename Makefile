# make demo       train GPT-2 on 4 processes, print the plan, compare with one process
# make test       all quick tests         make test-full   the slow ones too
# make check      format, lint, types     make bench       emitted module against eager
# make fuzz       200 random modules under odd plans on 3 meshes, about 20 CPU minutes
# The virtual environment .venv is made when missing and used again afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test test-full check format bench fuzz clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,hf]'
	@touch $@

demo: install
	$(BIN)/python examples/train_gpt2.py --demo

test: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not slow'

test-full: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@echo "core: $$(find netmind_autopar -name '*.py' | xargs cat | wc -l) lines in $$(find netmind_autopar -name '*.py' | wc -l) files"

format: install
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .

bench: install
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/planning.py

fuzz: install
	$(BIN)/python benchmarks/fuzz.py --jobs $(WORKERS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
