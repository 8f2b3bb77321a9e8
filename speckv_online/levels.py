"""Compression levels of the target. Another format is one more entry in :data:`LEVELS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from speckv_online.errors import UserError


@dataclass(frozen=True)
class Level:
    """One way of storing the target's weights.

    Attributes
    ----------
    name, summary : str
        Name on the command line, and one line about it.
    bits : float
        Bits per weight of the linear layers.
    dtype : torch.dtype
        Type that the checkpoint is loaded as.
    quantization : callable or None
        Makes the transformers quantization config for a compute dtype, if the level is quantized.
    """

    name: str
    summary: str
    bits: float
    dtype: torch.dtype
    quantization: Callable[[torch.dtype], Any] | None = None

    def load_arguments(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of ``from_pretrained`` that give this level on ``device``."""
        if self.quantization is None:
            return {"dtype": self.dtype}
        # bitsandbytes' CPU kernels are fastest, and free of rounding in between, with fp32 activations.
        compute = torch.float16 if device.type == "cuda" else torch.float32
        return {
            "dtype": compute,
            "quantization_config": self.quantization(compute),
            "device_map": {"": str(device)},
        }

    def widen(self, device: torch.device) -> bool:
        """Return True if weights of this level are widened to fp32 for arithmetic on ``device``."""
        return self.quantization is None and device.type == "cpu" and self.dtype != torch.float32

    def arithmetic(self, device: torch.device) -> str:
        """Describe for reports how this level computes on ``device``."""
        if self.widen(device):
            return f"weights rounded to {self.name}, arithmetic in fp32"
        if self.quantization is not None:
            compute = "fp16" if device.type == "cuda" else "fp32"
            return f"bitsandbytes {self.name}, activations in {compute}"
        return f"weights and arithmetic in {self.name}"


def _int8(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _four_bit(kind: str) -> Callable[[torch.dtype], Any]:
    def make(compute: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)

    return make


LEVELS = {
    level.name: level
    for level in (
        Level("fp32", "32-bit floats, the reference for exactness", 32, torch.float32),
        Level("fp16", "16-bit floats (on a CPU: fp16 weights, fp32 arithmetic)", 16, torch.float16),
        Level("bf16", "bfloat16 (on a CPU: bf16 weights, fp32 arithmetic)", 16, torch.bfloat16),
        Level("int8", "bitsandbytes LLM.int8", 8, torch.float16, _int8),
        Level("nf4", "bitsandbytes 4-bit NormalFloat", 4.5, torch.float16, _four_bit("nf4")),
        Level("fp4", "bitsandbytes 4-bit float", 4.5, torch.float16, _four_bit("fp4")),
    )
}


def get_level(name: str) -> Level:
    """Return the level called ``name``; raises :class:`UserError` if there is none."""
    try:
        return LEVELS[name]
    except KeyError:
        raise UserError(f"unknown compression level {name!r}: choose from {', '.join(LEVELS)}") from None
