# make demo · make test · make check · make bench: each makes .venv first where it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu check format bench clean

demo: $(INSTALLED)
	$(BIN)/captune demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine with a CUDA card; the card's own torch must be in .venv.
test-gpu: $(INSTALLED)
	CAPTUNE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/training/test_cuda.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# make bench DATA=folder CAPTIONS=file.json AGAIN=1: without DATA, what needs photos is left out (the
# bank's part takes a file of captions, too); without AGAIN, what lies in benchmarks/results is not
# measured again.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/all.py $(if $(DATA),--data $(DATA)) $(if $(CAPTIONS),--captions $(CAPTIONS)) $(if $(AGAIN),--again)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
