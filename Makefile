# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python ≥ 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
PLAIN   = $(VENV)/.plain

.PHONY: demo test slow fuzz docs figures lint bench clean

demo: $(PLAIN)
	$(BIN)/circuitlens demo

# COVERAGE=1 measures lines and branches too, which takes longer.
test: $(STAMP)
	$(BIN)/python -m pytest $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

# What takes long: several processes, kills, a notebook in a browser, whole trainings.
slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Ten thousand random inputs; a few of each kind are among the tests.
fuzz: $(STAMP)
	FUZZ=1000 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_models.py

# Builds the site, runs every block of the README and of the site, and every notebook.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -m docs -n 2

figures: $(STAMP)
	$(BIN)/python -m figures.draw
	$(BIN)/python -m figures.gallery
	$(BIN)/python -m figures.speech --draw

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "circuitlens needs Python 3.11 or newer; give one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What users install, which is all that the demo needs. Modules are compiled when they are first used: that saves a third of
# the space and of the time.
$(PLAIN): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(PLAIN)
