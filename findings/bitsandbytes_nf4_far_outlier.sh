#!/usr/bin/env bash
# NF4 with compressed statistics (the default): one large weight spoils the scales of blocks that it is no part of, up to 16,384 weights away.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys

import torch
import bitsandbytes as bnb
from bitsandbytes import functional

print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, CPU")
print("expected: blocks of 64 keep an outlier to itself: the other blocks are stored as they would be without it")
torch.manual_seed(0)
weight = 0.02 * torch.randn(16, 256)
loud = weight.clone()
loud[0, 0] = 8.0


def stored(w: torch.Tensor, nested: bool) -> torch.Tensor:
    """Quantize and back."""
    return functional.dequantize_4bit(*functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested))


print(f"seen: default of Linear4bit: compress_statistics={bnb.nn.Linear4bit(64, 64).weight.compress_statistics}")
grown = {}
for nested in (True, False):
    other = slice(1, None)
    before, after = ((stored(w, nested) - w)[other].square().mean().sqrt().item() for w in (weight, loud))
    grown[nested] = after / before
    print(f"seen: compress_statistics={nested}: error of rows 1 to 15 {before:.5f}, with an outlier in row 0 {after:.5f} ({grown[nested]:.2f} times)")
found = grown[True] > 1.5 and grown[False] == 1
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
