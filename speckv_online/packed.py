"""Linear layers whose weights are laid out for the few rows of a verification, on a CPU.

A stock fp32 ``nn.Linear`` on a CPU is quick for one row and slow for 4 to 16: a verification of five tokens takes up to
twice the time of one. oneDNN's pre-packed weights, which torch's own compiler uses when it freezes a model, are slower
for one row and grow much less. So a layer keeps both, and takes the packed ones from :data:`FROM_ROWS` rows on. The
operators are private: they are tried before they are used, and where they are missing or wrong the model stays as it
is. docs/performance.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import nn

from speckv_online.bnb_cpu import lighten

#: Rows that the layout is chosen for: the verification of a few drafts.
ROWS = 5
#: Tokens of a sequence from which on the packed weight is the quicker one; how many sequences there are does not count.
FROM_ROWS = 4
#: Most bytes of weights that are kept twice; larger models stay as they are.
MOST_BYTES = 4 << 30
#: Smaller weights stay as they are: a packed layer costs some 15 us more per call, which only a large one wins back.
LEAST_WEIGHTS = 500_000
#: Largest difference from nn.Linear, relative to the largest output, that passes for rounding.
_TOLERANCE = 1e-5


def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` for inference that has its weight in oneDNN's blocked layout too.

    Parameters
    ----------
    linear : nn.Linear
        In fp32 on the CPU; its parameters are shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # Not a buffer: neither saved nor hashed.
        self._packed = [torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)]
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``, shape (..., out_features)."""
        if x.shape[-2] < FROM_ROWS:
            return nn.functional.linear(x, self.weight, self.bias)
        return _linear(x, self._packed[0], self.bias)


def can_pack() -> bool:
    """Return True if oneDNN's packed linear exists in this torch and agrees with ``nn.Linear``."""
    linear = nn.Linear(96, 160)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        try:
            y = PackedLinear(linear)(x)
        except (AttributeError, RuntimeError, TypeError):  # another torch, a build without oneDNN
            return False
        expected = linear(x)
    return y.shape == expected.shape and bool((y - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def pack(model: nn.Module) -> int:
    """Pack the large fp32 linear layers of a model on the CPU, in place; return how many.

    Layers of bitsandbytes stay, but are called with less ado, see :mod:`speckv_online.bnb_cpu`. Everything stays where
    packing does not work, and in a model whose weights are too large to be kept twice. Logits change by rounding only.
    The model can no longer be trained.
    """
    lighten(model)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        # The exact type: bitsandbytes' layers are subclasses with weights of their own.
        if type(child) is nn.Linear and child.weight.numel() >= LEAST_WEIGHTS
        if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
    ]
    if sum(child.weight.nbytes for _, _, child in found) > MOST_BYTES or not can_pack():
        return 0
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
