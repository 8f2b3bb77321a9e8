#!/usr/bin/env bash
# The confidence threshold reads the assistant's probability after temperature and top-k: with top_k=1 every draft is certain, and the threshold is off.
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
print("expected: a threshold of 0.999 is passed by no token of an unsure model, however tokens are then drawn")
print("expected: and a token below the threshold is not drafted")
ids = torch.tensor([[1, 2, 3, 4, 5]])
target, draft = tiny(), tiny()
top = target(ids).logits[0, -1].softmax(-1).max().item()
print(f"seen: the model's top probability is about {top:.2f}")
draft.generation_config.assistant_confidence_threshold = 0.999
greedy = drafted(target, draft, ids, max_new_tokens=40)[0]
cold = drafted(target, draft, ids, max_new_tokens=40, do_sample=True, temperature=0.001, top_k=0)[0]
one = drafted(target, draft, ids, max_new_tokens=40, do_sample=True, top_k=1)[0]
print(f"seen: drafted in each round, greedy {greedy}")
print(f"seen:                        temperature 0.001 {cold}")
print(f"seen:                        top_k=1 {one}")
found = top < 0.2 and set(greedy) <= {0, 1} and 1 in greedy and max(cold) > 10 and max(one) > 10
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
