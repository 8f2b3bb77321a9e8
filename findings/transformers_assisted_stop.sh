#!/usr/bin/env bash
# Assisted generation runs on past a stopping criterion that plain generation obeys: it is asked once a round, about the last token only.
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
from transformers import StoppingCriteria, StoppingCriteriaList
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


class AtToken(StoppingCriteria):
    """Stop where the newest token is a given one."""

    def __init__(self, token: int) -> None:
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: greedy assisted generation gives exactly the tokens of plain greedy generation, criteria or not")
ids = torch.tensor([[1, 2, 3, 4, 5]])
target, draft = tiny(), tiny()
draft.generation_config.assistant_confidence_threshold = 0.0
free = target.generate(ids, do_sample=False, max_new_tokens=30)[0, 5:].tolist()
stop = free[2]
plain = target.generate(ids, do_sample=False, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([AtToken(stop)]))[0, 5:].tolist()
rule = AtToken(stop)
_, assisted = drafted(target, draft, ids, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([rule]))
print(f"seen: stop at token {stop}: plain {plain}, assisted {assisted}")
found = plain[-1] == stop and assisted[: len(plain)] == plain and len(assisted) > len(plain)
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
