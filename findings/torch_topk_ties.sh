#!/usr/bin/env bash
# topk and argmax name different tokens of a tie, also for k = 1, and bfloat16 logits of a real vocabulary tie often.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys

import torch

print(f"torch {torch.__version__}, CPU")
print("expected: the first index that topk(2) gives is the one that argmax gives, so both pick the same greedy token")
row = torch.zeros(8)
print(f"seen: eight equal logits: argmax {row.argmax().item()}, topk(1) {row.topk(1).indices[0].item()}, topk(2) {row.topk(2).indices.tolist()}, "
      f"stable sort {row.sort(descending=True, stable=True).indices[0].item()}")
torch.manual_seed(0)
logits = (2.0 * torch.randn(4000, 49152)).bfloat16()
tied = ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1)
differ = logits.argmax(-1) != logits.topk(2).indices[:, 0]
print(f"seen: 4,000 rows of 49,152 random bfloat16 logits: {tied.sum().item()} tied at the top, greedy tokens differ in {differ.sum().item()}")
found = row.topk(1).indices[0] != row.argmax() and differ.sum() > 20 and not (differ & ~tied).any()
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
