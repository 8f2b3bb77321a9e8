#!/usr/bin/env bash
# generate(num_assistant_tokens=3) changes nothing: the number is read from the assistant's own config, where `heuristic` leaves its last value.
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
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()


def tiny() -> LlamaForCausalLM:
    """A random model of 64 tokens, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=0, pad_token_id=0, eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def worse(model: LlamaForCausalLM, noise: float) -> LlamaForCausalLM:
    """Add noise to a model's weights: a draft that is right now and then."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def drafted(target, draft, ids, **options) -> tuple[list[int], list[int]]:
    """Generate with an assistant; tokens drafted in each round but the first, and the new tokens."""
    widths, forward = [], target.forward

    def count(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1] - 1)
        return forward(*args, **kwargs)

    target.forward = count
    out = target.generate(ids, assistant_model=draft, **{"do_sample": False, **options})
    del target.forward
    return widths[1:], out[0, ids.shape[1] :].tolist()


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: an option given to generate() is used in that call, and one call leaves nothing behind for the next")
ids = torch.tensor([[1, 2, 3, 4, 5]])
target, draft = tiny(), tiny()
draft.generation_config.assistant_confidence_threshold = 0.0
plain = drafted(target, draft, ids, max_new_tokens=60)[0]
asked = drafted(target, draft, ids, max_new_tokens=60, num_assistant_tokens=3)[0]
draft.generation_config.num_assistant_tokens = 3
owned = drafted(target, draft, ids, max_new_tokens=60)[0]
print(f"seen: drafted a round, no option {plain}; generate(num_assistant_tokens=3) {asked}; 3 in the assistant's config {owned[:5]}...")
draft.generation_config.num_assistant_tokens_schedule = "heuristic"
first, tokens = drafted(target, draft, ids, max_new_tokens=60)
kept = draft.generation_config.num_assistant_tokens
second, again = drafted(target, draft, ids, max_new_tokens=60)
print(f"seen: heuristic from 3: first call {first}, config then holds {kept}; the same call once more {second}; same tokens {tokens == again}")
found = asked == plain and max(owned) == 3 and kept > 3 and first != second and tokens == again
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
