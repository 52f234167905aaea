# Two commands: `make book` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin
# The venv is made again when the dependencies change.
READY = .venv/.ready

.PHONY: book test pages setup clean

book: $(READY)
	$(BIN)/axmoe book

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What `make book` built, page by page in a real browser, and the explorer in a live JupyterLab.
pages: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 tests/test_pages.py tests/test_lab.py

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --editable ".[book,fast,sweep,test]"
	touch $(READY)

clean:
	rm -rf .venv book/_build
