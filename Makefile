# The two commands a fresh clone needs; both set up everything with nothing but Python.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Processes that share the tests, each with one thread: one more than cores, since some tests wait.
WORKERS ?= 3
# Tests start a hundred processes: what one compiles, the next should find.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types layers unit clean

demo: $(VENV)/.installed
	$(BIN)/python -m apps.medical.demo

# Two at once: the types are checked while tests wait for other processes.
test: $(VENV)/.installed
	$(MAKE) --no-print-directory -j2 lint types layers unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

layers: $(VENV)/.installed
	$(BIN)/lint-imports

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term-missing:skip-covered

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# The pip that comes with Python may be years old and take twice as long.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	# Python compiles what it imports, and most of what comes with the packages never is.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[apps,dev]"
	touch $@

clean:
	rm -rf $(VENV)
