#!/usr/bin/env bash
# GGUF: for very small weights the 8-bit Q8_0 is worse than the 4-bit Q4_0 and Q4_1, as its float16 scale vanishes first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet gguf==0.19.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

print(f"gguf {version('gguf')}, numpy {np.__version__}")
print("expected: eight bits are never worse than four, whatever the scale: every block has its own")
rng = np.random.default_rng(0)
weights = rng.standard_normal((64, 256)).astype(np.float32)
error = {}
for scale in (1.0, 1e-3, 1e-5, 1e-6):
    for name in ("Q8_0", "Q4_0", "Q4_1"):
        kind = GGMLQuantizationType[name]
        x = (scale * weights).astype(np.float32)
        error[name, scale] = float(np.sqrt(((dequantize(quantize(x, kind), kind) - x) ** 2).mean() / (x**2).mean()))
    print(f"seen: weights of size {scale:g}: relative error " + ", ".join(f"{name} {error[name, scale]:.3f}" for name in ("Q8_0", "Q4_0", "Q4_1")))
found = error["Q8_0", 1.0] < 0.02 and error["Q8_0", 1e-6] > 2 * max(error["Q4_0", 1e-6], error["Q4_1", 1e-6])
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
