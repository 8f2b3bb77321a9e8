#!/usr/bin/env bash
# Installing scikit-learn changes how many tokens an assistant drafts: the confidence threshold is then fitted anew in every round.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat >draft.py <<'PY'
import importlib.util
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


target, draft = tiny(), tiny()
with torch.no_grad():
    for model in (target, draft):
        model.lm_head.weight.mul_(40)
found = drafted(target, worse(draft, 0.03), torch.tensor([[1, 2, 3, 4, 5]]), max_new_tokens=120)
print(f"transformers {transformers.__version__}, scikit-learn installed: {importlib.util.find_spec('sklearn') is not None}", file=sys.stderr)
print(*found, sep="\n")
PY
echo "expected: a package that the script never imports changes nothing, least of all with fixed weights and greedy decoding"
venv/bin/python -I draft.py >without
venv/bin/python -m pip install --quiet scikit-learn==1.9.1
venv/bin/python -I draft.py >with
venv/bin/python -I draft.py >again
echo "seen: drafted in each round, without: $(sed -n 1p without)"
echo "seen: drafted in each round, with:    $(sed -n 1p with)"
if [ "$(sed -n 2p without)" = "$(sed -n 2p with)" ] && [ "$(sed -n 1p without)" != "$(sed -n 1p with)" ] && cmp -s with again; then
    echo "seen: the same 120 tokens, other drafts"
    echo "as found"
else
    echo "CHANGED"
    exit 1
fi
