"""Whether a compiled forward gives what the model gives, with transformers' and bitsandbytes' own layers.

Two things are compared, for a few tokens that are read one by one.

- The logits of the whole forward. With weights in floating point they may differ by fp32 rounding alone. Quantized
  layers round their inputs to bf16 or to 8 bits. There a difference of 1e-7 may tip a number to its neighbour, layers
  magnify that, and logits differ by percents.
- So in a quantized model each layer is compared by itself too, both times from the same inputs. A number that tips
  over changes one token in one layer. A wrong kernel changes all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaForCausalLM

from speckv_online.modeling.kv_cache import KVCache

#: Largest error of the logits relative to their standard deviation, by kind of weights. ``float`` (fp32, fp16, bf16 in
#: fp32 arithmetic) bounds the largest error of a logit; 9e-6 is seen with the default target. ``int8`` and ``4bit``
#: bound the standard deviation of the errors: three times the worst that is seen with the default target over 11 texts,
#: which is 0.098 at int8, 0.029 at nf4 and fp4. experiments/lossless.py shows what that does to decoded tokens.
#: ``b8`` and ``b16`` are GGUF's blocks by the bits of their inputs. The first bounds the standard deviation of the
#: errors, the second the largest error; 0.03 and 8e-4 are seen.
LOGITS = {"float": 1e-4, "int8": 0.3, "4bit": 0.09, "b8": 0.1, "b16": 5e-3}
#: Largest error of a layer's update relative to its norm, in the better quarter of the tokens, where no number tips
#: over. Seen with the default target, for the better half: 1.3e-7 at int8, 0 at nf4 and fp4.
UPDATE = 1e-5


def kind_of(model: torch.nn.Module) -> str:
    """Return the kind of a model's weights, as :data:`LOGITS` has them."""
    names = {type(m).__name__ for m in model.modules()}
    if "GgufLinear" in names:  # the coarser, of "b8", "b16" and "float"
        kinds = {str(m.rounding) for m in model.modules() if type(m).__name__ == "GgufLinear"}
        return next(kind for kind in ("b8", "b16", "float") if kind in kinds)
    return "int8" if "Linear8bitLt" in names else "4bit" if "Linear4bit" in names else "float"


def what_is_wrong(model: LlamaForCausalLM, ids: torch.Tensor, states: torch.Tensor, logits: torch.Tensor) -> str:
    """Return why a compiled forward must not be used, empty if it is right.

    Parameters
    ----------
    model : LlamaForCausalLM
        With its own layers.
    ids : Tensor, shape (tokens,)
    states : Tensor, shape (layers + 1, tokens, hidden)
        Of the compiled forward: what goes into each layer, and into the last norm.
    logits : Tensor, shape (tokens, vocab)
        Of the compiled forward.
    """
    kind, expected = kind_of(model), _one_by_one(model, ids)
    error, spread = logits - expected, float(expected.std())
    exact = kind in ("float", "b16")
    if reason := _excess("its logits", float(error.abs().max() if exact else error.std()) / spread, kind):
        return reason
    if exact:
        return ""
    with _fed(model, states) as updated:
        head = _one_by_one(model, ids)
    if reason := _excess("the logits of its head", float((logits - head).abs().max()) / spread, "float"):
        return reason
    if not torch.equal(states[0], model.model.embed_tokens(ids)):
        return "its embedding is not the model's"
    found = torch.stack([torch.stack(rows) for rows in updated])
    errors = (found - states[1:]).norm(dim=-1) / (found - states[:-1]).norm(dim=-1).clamp_min(1e-30)
    worst, layer = errors.quantile(0.25, dim=1).max(0)
    if not float(worst) <= UPDATE:
        return f"layer {int(layer)} is off by {float(worst):.2g} of its update, {UPDATE:g} is allowed"
    return ""


def _excess(what: str, error: float, kind: str) -> str:
    """Return the reason if an error is too large, or no number."""
    allowed = LOGITS[kind]
    return "" if error <= allowed else f"{what} are off by {error:.2g} of their deviation, {allowed:g} is allowed"


def _one_by_one(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after each token, read alone: what LLM.int8 makes of a token depends on those beside it."""
    cache = KVCache(int(model.config.num_hidden_layers), len(ids))
    return torch.cat([model(input_ids=one[None], past_key_values=cache).logits[0] for one in ids.split(1)])


@contextmanager
def _fed(model: LlamaForCausalLM, states: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
    """Put these states, token by token, in place of the inputs of layers and last norm; give what the layers return."""
    layers = [*model.model.layers, model.model.norm]
    waiting, found = [iter(rows) for rows in states], [list[torch.Tensor]() for _ in layers]

    def put(at: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = next(waiting[at]).view(1, 1, -1)
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

        return hook

    def take(at: int) -> Any:
        return lambda layer, args, out: found[at].append((out[0] if isinstance(out, tuple) else out).flatten())

    handles = [layer.register_forward_pre_hook(put(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(take(i)) for i, layer in enumerate(layers[:-1])]
    try:
        yield found[:-1]
    finally:
        for handle in handles:
            handle.remove()
