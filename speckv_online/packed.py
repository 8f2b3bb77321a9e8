"""Linear layers whose weights are laid out for the few rows of a verification, on a CPU.

A stock fp32 ``nn.Linear`` on a CPU handles 2 to 16 rows badly: a verification of five tokens takes up to twice the time
of one. oneDNN's pre-packed weights, which torch's own compiler uses when it freezes a model, take nearly the same time
for one row as for nine. The operators are private, so they are tried before they are used, and where they are missing
or wrong the model stays as it is. docs/performance.md has the measurements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Rows that the layout is chosen for: the verification of a few drafts.
ROWS = 5
#: Smaller weights stay as they are: a packed layer costs some 15 us more per call, which only a large one wins back.
LEAST_WEIGHTS = 500_000
#: Largest difference from nn.Linear, relative to the largest output, that passes for rounding.
_TOLERANCE = 1e-5


def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """An ``nn.Linear`` in inference, with its weight in oneDNN's blocked layout.

    ``state_dict`` gives the weight in the usual layout and under the usual name.

    Parameters
    ----------
    linear : nn.Linear
        In fp32 on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.eval()

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight, shape (out_features, in_features)."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``, shape (..., out_features)."""
        return _linear(x, self.packed, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


def can_pack() -> bool:
    """Return True if oneDNN's packed linear exists in this torch and agrees with ``nn.Linear``."""
    linear = nn.Linear(96, 160)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        try:
            y = PackedLinear(linear)(x)
        except (AttributeError, RuntimeError, TypeError):  # another torch, a build without oneDNN
            return False
        expected = linear(x)
    return y.shape == expected.shape and bool((y - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def pack(model: nn.Module) -> int:
    """Pack the large fp32 linear layers of a model on the CPU, in place; return how many.

    Layers that a quantization library put there stay; so does everything where packing does not work. Logits change by
    rounding only. The model can no longer be trained.
    """
    if not can_pack():
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # The exact type: bitsandbytes' layers are subclasses with weights of their own.
            if type(child) is not nn.Linear or child.weight.numel() < LEAST_WEIGHTS:
                continue
            if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
