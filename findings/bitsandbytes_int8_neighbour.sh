#!/usr/bin/env bash
# LLM.int8: a row's output depends on its neighbours in the batch, and beside an outlier an innocent row becomes more exact.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import sys
import warnings

import torch

warnings.filterwarnings("ignore")
import bitsandbytes as bnb

print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, CPU")
print("expected: rows of a linear layer do not know of each other; if an outlier does anything, it costs the others digits")
torch.manual_seed(0)
exact = torch.nn.Linear(256, 64, bias=False)
pair = torch.randn(2, 256).half()


def layer(threshold: float) -> bnb.nn.Linear8bitLt:
    """The same layer in int8."""
    made = bnb.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False, threshold=threshold)
    made.load_state_dict(exact.state_dict())
    return made.to("cpu").eval()


moved, errors = {}, {}
with torch.no_grad():
    want = exact(pair[:1].float())
    for threshold in (6.0, 0.0):
        int8 = layer(threshold)
        alone = int8(pair[:1]).float()
        calm = int8(pair)[:1].float()
        loud = pair.clone()
        loud[1] *= 1000
        beside = int8(loud)[:1].float()
        moved[threshold] = (beside - alone).abs().max().item()
        errors[threshold] = [(y - want).abs().mean().item() for y in (alone, beside)]
        print(
            f"seen: threshold {threshold}: row 0 alone or beside a calm row the same: {torch.equal(alone, calm)}; beside a row of outliers it moves by "
            f"{moved[threshold]:.4f}; mean error alone {errors[threshold][0]:.5f}, beside {errors[threshold][1]:.5f}"
        )
found = moved[6.0] > 0.003 and errors[6.0][1] < 0.5 * errors[6.0][0] and moved[0.0] == 0
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
