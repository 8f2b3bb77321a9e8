"""The linear layers of a target's program: those that read the same input are one product, for each kind of layer."""

from __future__ import annotations

from typing import Any

import torch

from speckv_online.cpu_engine.gguf_layers import GgufProduct
from speckv_online.cpu_engine.kernels import bnb as kernels_bnb
from speckv_online.cpu_engine.llama_program import Step
from speckv_online.io.mapped_tensors import joined


class Packed:
    """Linear layers of the same input as one, of :class:`~speckv_online.cpu_engine.pack.PackedLinear`."""

    to = "float"

    def __init__(self, layers: list[Any]) -> None:
        kernels = {layer._kernel for layer in layers}
        self.kernel, self.inputs = kernels.pop(), layers[0].in_features
        if kernels:
            raise ValueError("weights of several types")
        self.weight, self.scales = (joined(parts) for parts in zip(*(x._packed for x in layers), strict=True))
        self.outputs, at = sum(layer.out_features for layer in layers), 0
        for layer in layers:  # they share the memory
            weight, scales = (len(part) for part in layer._packed)
            start = at * len(self.scales) // len(self.weight)
            layer._packed = self.weight[at : at + weight], self.scales[start : start + scales]
            at += weight

    def steps(self, x: int, out: int, room: Any) -> list[Step]:
        """Return the kernels that multiply what is at ``x``."""
        scales = self.scales.data_ptr()
        return [(self.kernel, x, self.weight.data_ptr(), out, 0, self.inputs, self.outputs, scales)]


class FourBit:
    """Linear layers of the same input as one, of bitsandbytes' ``Linear4bit``."""

    to = "bfloat"

    def __init__(self, layers: list[Any]) -> None:
        weights, scales, codes, sizes, blocks = zip(*(layer._patched for layer in layers), strict=True)
        self.inputs, self.outputs, self.block = sizes[0][1], sum(outputs for outputs, _ in sizes), blocks[0]
        if len(set(blocks)) > 1 or any(not torch.equal(code, codes[0]) for code in codes):
            raise ValueError("weights of several types")
        self.weight, at = joined([weight.reshape(-1) for weight in weights]), 0
        self.scales = torch.cat([s.view(self.inputs // self.block, -1) for s in scales], 1).contiguous()
        self.codes = codes[0]
        for layer, weight in zip(layers, weights, strict=True):  # they share the memory
            layer._patched = self.weight[at : at + weight.numel()].view(weight.shape), *layer._patched[1:]
            at += weight.numel()

    def steps(self, x: int, out: int, room: Any) -> list[Step]:
        """Return the kernels that multiply what is at ``x``, in fp32 with bf16's values."""
        kernel, pointers = kernels_bnb.compiled()["four_bit"], (self.scales.data_ptr(), self.block)
        there = x, self.weight.data_ptr(), out
        return [(kernel, *there, 0, self.inputs, self.outputs, *pointers, self.codes.data_ptr())]


class Int8:
    """Linear layers of the same input as one, of bitsandbytes' ``Linear8bitLt``."""

    to = "float"

    def __init__(self, layers: list[Any]) -> None:
        weights, scales, sums, thresholds, sizes = zip(*(layer._patched for layer in layers), strict=True)
        self.inputs, self.outputs, self.threshold = sizes[0][1], sum(outputs for outputs, _ in sizes), thresholds[0]
        if len(set(thresholds)) > 1:
            raise ValueError("weights of several types")
        # Scales are copies: the layers' own may be written to.
        self.weight, self.sizes, self.sums, at = joined(weights), torch.cat(scales), torch.cat(sums), 0
        for layer, weight in zip(layers, weights, strict=True):  # they share the memory
            layer._patched = self.weight[at : at + len(weight)], *layer._patched[1:]
            at += len(weight)

    def steps(self, x: int, out: int, room: Any) -> list[Step]:
        """Return the kernels that multiply what is at ``x``; outliers are each row's own."""
        kernels, (numbers, tops, columns) = kernels_bnb.compiled(), room.pointers
        weight, sizes, shape = self.weight.data_ptr(), self.sizes.data_ptr(), (0, self.inputs, self.outputs)
        return [
            (kernels["quantize"], x, numbers, tops, 0, self.inputs, self.threshold, columns),
            (kernels["int8"], numbers, weight, out, *shape, tops, sizes, self.sums.data_ptr()),
            (kernels["outliers"], x, columns, out, *shape, weight, sizes),
        ]


_KINDS: Any = {"PackedLinear": Packed, "Linear4bit": FourBit, "Linear8bitLt": Int8, "GgufLinear": GgufProduct}


def together(*layers: Any) -> Any:
    """Return linear layers of the same input as one."""
    kinds = {type(layer).__name__ for layer in layers}
    if len(kinds) > 1 or any(layer.bias is not None for layer in layers):
        raise ValueError("layers of several kinds, or with a bias")
    return _KINDS[kinds.pop()](list(layers))
