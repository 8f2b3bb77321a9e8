#!/usr/bin/env bash
# The entropy -sum(p log p) of a large vocabulary is NaN in float16, in every row, though never in bfloat16, which has fewer digits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys

import torch

print(f"torch {torch.__version__}")
print("expected: float16, with 11 bits, is at least as good as bfloat16 with 8 for ordinary logits")
torch.manual_seed(0)
exact = 2.0 * torch.randn(200, 49152)
nan = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = exact.to(dtype)
    p = logits.softmax(-1)
    by_product = -(p * p.log()).sum(-1)
    by_log = -(p * logits.log_softmax(-1)).sum(-1)
    nan[dtype] = by_product.isnan().float().mean().item()
    print(
        f"seen: {dtype}: rows with NaN {nan[dtype]:.0%}, probabilities that are 0: {(p == 0).float().mean().item():.1%}, "
        f"with log_softmax instead: NaN {by_log.isnan().float().mean().item():.0%}, first row {by_log[0].item():.3f}"
    )
found = nan[torch.float16] == 1 and nan[torch.bfloat16] == 0 and nan[torch.float32] == 0
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
