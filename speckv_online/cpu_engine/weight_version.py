"""Whether a layer's weight, or a whole model, is still the one that something was made of.

Kernels read weights in layouts of their own, and a program of kernels keeps their addresses. Both look at the marks of
the weights before they answer, and are made anew where a weight was changed: by an optimizer, by ``load_state_dict``,
by a library that puts another one in its place. Only what is written through ``weight.data`` leaves no mark.

A program also takes the place of a model's modules. So it looks at all of them: a module that was put in place of
another makes it anew, and hooks, or a forward that somebody put on a module, make it stand back while they are there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

#: Which parameter, where its numbers lie, and how often they were written.
WeightVersion = tuple[int, int, int]
#: What :func:`state_of` finds of a module: which one it is, its class, whether it trains, marks of its tensors.
ModuleState = tuple[int, type, bool, tuple[WeightVersion, ...]]
#: transformers leaves hooks on modules that do nothing until hidden states are asked for.
_SILENT = "transformers.utils.output_capturing"


def weight_version(layer: nn.Module) -> WeightVersion:
    """Return the mark of a layer's weight."""
    weight = layer._parameters.get("weight")
    return (0, 0, 0) if weight is None else _mark(weight)


def _mark(weight: torch.Tensor) -> WeightVersion:
    if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
        return id(weight), 0, 0  # bitsandbytes lays its own out anew whenever a state is asked for
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version


def state_of(model: nn.Module, ours: Collection[Any]) -> tuple[list[ModuleState], bool]:
    """Return the state of all modules of a model, and whether somebody changes what they do.

    Parameters
    ----------
    model : Module
        Its own hooks and forward do not count: whoever takes the place of its modules calls the model itself.
    ours : collection of functions
        Forwards on modules that change nothing.
    """
    states, watched, waiting, seen = list[ModuleState](), False, [model], set[int]()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        tensors = [t for part in (own["_parameters"], own["_buffers"]) for t in part.values() if t is not None]
        states.append((id(module), type(module), own["training"], tuple([_mark(t) for t in tensors])))
        if module is not model:
            forward = own.get("forward")
            watched |= forward is not None and getattr(forward, "__func__", None) not in ours
            for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
                watched |= bool(hooks) and any(getattr(h, "__module__", "") != _SILENT for h in hooks.values())
        waiting += [part for part in own["_modules"].values() if part is not None]
    return states, watched
