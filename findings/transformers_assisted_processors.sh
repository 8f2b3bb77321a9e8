#!/usr/bin/env bash
# Assisted generation shows logits processors prefixes that are no part of the output, twice each, so one with a memory changes the text.
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
from transformers import LogitsProcessor, LogitsProcessorList
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


class Notes(LogitsProcessor):
    """Change nothing; note what was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids, scores):
        self.seen.append(tuple(input_ids[0, 5:].tolist()))
        return scores


class EveryFourth(LogitsProcessor):
    """Force token 9 at every fourth call, as a grammar or a watermark that counts its own calls would."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 4 == 0:
            scores = scores.clone()
            scores[:, 9] = 1e4
        return scores


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: a processor is asked once for each new token, about the text so far")
ids = torch.tensor([[1, 2, 3, 4, 5]])
target, draft = tiny(), worse(tiny(), 0.02)
draft.generation_config.assistant_confidence_threshold = 0.0
notes = Notes()
out = tuple(drafted(target, draft, ids, max_new_tokens=20, logits_processor=LogitsProcessorList([notes]))[1])
foreign = sum(out[: len(s)] != s for s in notes.seen)
print(f"seen: 20 new tokens, {len(notes.seen)} calls, {len(set(notes.seen))} different prefixes, {foreign} calls about text that is not in the output")
plain = target.generate(ids, do_sample=False, max_new_tokens=20, logits_processor=LogitsProcessorList([EveryFourth()]))[0, 5:].tolist()
assisted = drafted(target, draft, ids, max_new_tokens=20, logits_processor=LogitsProcessorList([EveryFourth()]))[1]
print(f"seen: token 9 forced at every fourth call: plain    {plain}")
print(f"seen:                                     assisted {assisted}")
found = len(notes.seen) > 40 and foreign > 20 and plain != assisted and plain[3::4] == [9] * 5
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
