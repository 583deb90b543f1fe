# make demo    quantize the two bundled models and let them write: no GPU, no model hub
# make test    all tests
# make lint    formatter, linter and type checker
#
# The first call makes an environment in .venv; later ones find it and start at once.
# Another Python: make demo PYTHON=/path/to/python3.12

VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROMPT := The people of the United States
WORKERS := 2
SAMPLING := --temperature 0.7 --top-p 0.95 --seed 1 --max-new-tokens 120

# Candidates are run and not only looked up: a shim that pyenv made exists for versions that are not selected.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.14 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$python" && break; done)

# Nothing here needs a GPU. After `make test`, JAX's compiler for GPUs is in the environment and would look for one.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/installed $(DEMO)/tiny-dense/manifest.json $(DEMO)/tiny-moe/manifest.json
	@for model in tiny-dense tiny-moe; do \
		echo; echo "== $$model in Q4K, as described by: gemma-jax info $(DEMO)/$$model"; \
		$(BIN)/gemma-jax info $(DEMO)/$$model | sed '/^memory/,$$d' || exit; \
		echo "== gemma-jax generate $(DEMO)/$$model \"$(PROMPT)\" $(SAMPLING)"; echo; \
		$(BIN)/gemma-jax generate $(DEMO)/$$model "$(PROMPT)" $(SAMPLING) --echo --stream --stats || exit; \
	done

# A conversion refuses to overwrite; one of an older checkpoint goes first.
$(DEMO)/%/manifest.json: gemma_jax/checkpoints/%/model.safetensors | $(VENV)/installed
	@mkdir -p $(DEMO) && rm -rf $(DEMO)/$*
	@echo; echo "== gemma-jax convert $* $(DEMO)/$* --format q4k"
	@$(BIN)/gemma-jax convert $* $(DEMO)/$* --format q4k

test: $(VENV)/installed-test
	@echo "== pytest: all tests, the examples in docstrings and in README.md; minutes, and fewer the second time"
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "gemma-jax needs Python 3.12 or newer with its venv module, and found none." >&2; \
		echo "Install one (apt install python3.12-venv, brew install python@3.12, pyenv install 3.12)" >&2; \
		echo "or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "== environment in $(VENV) with $$($(PYTHON) --version), $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "== installing gemma-jax and what it needs (about a minute the first time)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo "== installing gemma-jax with what '$*' needs (some minutes the first time)"
	@$(PIP) install --editable '.[$*]'
	@touch $@ $(VENV)/installed $(if $(filter dev,$*),$(VENV)/installed-test)
