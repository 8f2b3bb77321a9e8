#!/usr/bin/env bash
# Cropping a sliding-window cache twice is not cropping it once by the sum: the second crop takes tokens that the window needs.
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
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

transformers.logging.set_verbosity_error()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: crop(-3) and crop(-1) three times leave the same cache, crop(0) leaves it as it is, every cache has crop")
config = MistralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, sliding_window=8, max_position_embeddings=128,
)
torch.manual_seed(0)
model = MistralForCausalLM(config).eval()
ids = torch.randint(0, 64, (1, 20))


@torch.no_grad()
def after(crops: list[int], record: bool = True, static: bool = False) -> str:
    """Read 20 tokens, crop, read on; what comes of it."""
    cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
    if record:
        cache.activate_past_recording()
    model(ids, past_key_values=cache)
    try:
        for crop in crops:
            cache.crop(crop)
        length = cache.get_seq_length()
        logits = model(ids[:, length : length + 1], past_key_values=cache).logits[0, -1]
    except (RuntimeError, AttributeError) as e:
        return f"{type(e).__name__}: {str(e)[:75]}"
    whole = model(ids[:, : length + 1], use_cache=False).logits[0, -1]
    return f"right, at length {length}" if torch.allclose(logits, whole, atol=1e-5) else f"wrong, at length {length}"


seen = {
    "crop(-3)": after([-3]),
    "crop(-1) three times": after([-1, -1, -1]),
    "crop(0), crop(-3)": after([0, -3]),
    "crop(-3) without activate_past_recording": after([-3], record=False),
    "crop(-3) of a StaticCache": after([-3], record=False, static=True),
}
for what, came in seen.items():
    print(f"seen: window 8, 20 tokens read, {what}: {came}")
found = [came.split(",")[0].split(":")[0] for came in seen.values()] == ["right", "RuntimeError", "RuntimeError", "RuntimeError", "AttributeError"]
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
