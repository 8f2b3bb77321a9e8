"""Other libraries' layers on a CPU with the same results bit for bit, in less time.

A layer that can be done in fewer calls is compared first: its first forward is its own, and it takes the short way from
then on if that gives the same for the same input, until its weight is changed. So another version of a library costs
speed and nothing else. The ways are those of bitsandbytes' layers (:mod:`speckv_online.cpu_engine.bnb_layers`) and of
RMS norms (:mod:`speckv_online.cpu_engine.kernels.rms_norm`). docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from speckv_online.cpu_engine import bnb_layers as bnb_cpu
from speckv_online.cpu_engine.kernels import rms_norm as norms
from speckv_online.cpu_engine.notes import EngineNotes, describe
from speckv_online.cpu_engine.weight_version import weight_version

#: By the name of a layer's class: whether it can take the short way, and that way.
WAYS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "Linear8bitLt": (bnb_cpu.ready_int8, bnb_cpu.int8_forward),
    "Linear4bit": (bnb_cpu.ready_four_bit, bnb_cpu.four_bit_forward),
    **{f"{family}RMSNorm": (norms.ready, norms.norm_forward) for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
}


def patch_layers(
    model: nn.Module, notes: EngineNotes | None = None, kept: Mapping[str, Sequence[torch.Tensor]] | None = None
) -> int:
    """Let a model's layers on the CPU take short ways in inference; return how many may. They stay what they are.

    Why a layer does not take its way is known at its first forward, and then noted. A layer of which there are ``kept``
    tensors was compared when they were made, and takes its way at once.
    """
    notes = EngineNotes(type(model).__name__, logged=True) if notes is None else notes
    found: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if type(m).__name__ in WAYS and m.weight.device.type == "cpu"
    ]
    for name, layer in found:
        layer.forward, layer._notes = MethodType(_first_forward, layer), notes
        if name in (kept or {}):
            bnb_cpu.take(layer, kept[name])  # type: ignore[index]
            layer._way, layer._made_of = WAYS[type(layer).__name__][1], weight_version(layer)
            layer.forward = MethodType(_short_forward, layer)
    return len(found)


@contextmanager
def stock_layers(model: nn.Module) -> Iterator[None]:
    """Let all layers of a model take their own forward, not ours, for a while."""
    ours, kept = (_first_forward, _short_forward), list[tuple[nn.Module, Any]]()
    for layer in model.modules():
        if type(layer).__name__ == "PackedLinear":
            kept.append((layer, None))
            layer.forward = MethodType(nn.Linear.forward, layer)
        elif getattr(own := layer.__dict__.get("forward"), "__func__", None) in ours:
            kept.append((layer, own))
            del layer.forward
    try:
        yield
    finally:
        for layer, own in kept:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _first_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = type(layer).forward(layer, x)
    if x.dtype == torch.float32 and x.numel() > 0 and not torch.is_grad_enabled():
        del layer.forward
        kind = type(layer).__name__
        part, (ready, forward) = f"short way for {kind}", WAYS[kind]
        try:
            if not ready(layer):
                layer._notes.lacks(part, "not for this processor, or a layer of this size or type")
            elif not torch.equal(forward(layer, x), answer):
                layer._notes.lacks(part, "its results are not the layer's", failed=True)
            else:
                layer._way, layer._made_of = forward, weight_version(layer)
                layer.forward = MethodType(_short_forward, layer)
        # Another version of a library, or none; a processor that lacks an instruction.
        except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            layer._notes.lacks(part, describe(error), failed=True)
    return answer


def _short_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer._made_of != weight_version(layer):
        return _first_forward(layer, x)
    answer: torch.Tensor = layer._way(layer, x)
    return answer


#: Forwards on layers that give what the layers give.
OVERRIDES = frozenset({_first_forward, _short_forward})
