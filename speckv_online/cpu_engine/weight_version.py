"""Whether a layer's weight is still the one that something was made of.

Kernels read weights in layouts of their own, and a program of kernels keeps their addresses. Both look at the marks of
the weights before they answer, and are made anew where a weight was changed: by an optimizer, by ``load_state_dict``,
by a library that puts another one in its place. Only what is written through ``weight.data`` leaves no mark.
"""

from __future__ import annotations

from torch import nn

#: Which parameter, where its numbers lie, and how often they were written.
WeightVersion = tuple[int, int, int]


def weight_version(layer: nn.Module) -> WeightVersion:
    """Return the mark of a layer's weight."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return 0, 0, 0
    if type(weight) is not nn.Parameter:  # bitsandbytes lays its own out anew whenever a state is asked for
        return id(weight), 0, 0
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version
