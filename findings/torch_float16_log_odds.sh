#!/usr/bin/env bash
# A top token's log-odds, as logit(softmax) of float16 logits: infinite from a log-odds of 8.4 on (bfloat16: 6.3).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import math
import sys

import torch

print(f"torch {torch.__version__}")
print("expected: half precision costs digits, so a top token with true log-odds of 9 reads as about 9")


def read(odds: float, dtype: torch.dtype) -> tuple[float, float]:
    """Log-odds of the top token of 1,001: by way of its probability, and against the log-sum-exp of the others."""
    logits = torch.zeros(1001)
    logits[0] = odds + math.log(1000)
    logits = logits.to(dtype)
    return torch.logit(logits.softmax(-1)[0]).item(), (logits[0] - logits[1:].logsumexp(-1)).item()


for odds in (2, 4, 6, 7, 8, 9, 12):
    row = {str(dtype).split(".")[1]: read(odds, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    print(f"seen: true {odds:2}: " + "  ".join(f"{k} {a:.3f} (m - logsumexp: {b:.3f})" for k, (a, b) in row.items()))
steps = [odds for odds in range(10, 200) if math.isinf(read(odds / 10, torch.float16)[0])]
wide = [odds for odds in range(10, 200) if math.isinf(read(odds / 10, torch.bfloat16)[0])]
print(f"seen: infinite from a true log-odds of {steps[0] / 10} (float16) and {wide[0] / 10} (bfloat16): 1 - p is below the format's step at 1")
close = all(abs(read(odds, torch.float16)[1] - odds) < 0.02 for odds in (2, 4, 6, 8, 9, 12))
print(f"seen: m - logsumexp(others) in float16 stays within 0.02: {close}")
found = 80 <= steps[0] <= 86 and 55 <= wide[0] <= 66 and close
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
