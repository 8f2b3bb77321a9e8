#!/usr/bin/env bash
# Prompt lookup goes on from the oldest place where the last tokens stood, not from the latest: text that changed its mind is drafted as it was first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys

import torch
import transformers
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: of several earlier places the latest is taken, which is the likelier guide")
text = [7, 8, 1, 1, 1, 0, 7, 8, 2, 2, 2, 0, 7, 8, 2, 2, 2, 0, 7, 8]
lookup = PromptLookupCandidateGenerator(num_output_tokens=3, max_matching_ngram_size=2, max_length=100)
drafted = lookup.get_candidates(torch.tensor([text]))[0][0, len(text) :].tolist()
print(f"seen: 7 8 went on with 1 1 1 once, then twice with 2 2 2; drafted after the next 7 8: {drafted}")
found = drafted == [1, 1, 1]
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
