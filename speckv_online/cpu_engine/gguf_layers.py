"""Layers whose weights stay in the blocks of a GGUF file, on a CPU.

A :class:`GgufLinear` has its blocks in the order of :mod:`speckv_online.cpu_engine.kernels.gguf_blocks`, once. Weights
in floating point stay in their own type, for the kernels of :mod:`speckv_online.cpu_engine.kernels.linear`. A
:class:`GgufEmbedding` reads rows out of the mapped file.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from speckv_online.cpu_engine.kernels import gguf_blocks as kernels
from speckv_online.cpu_engine.kernels import linear as floating
from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.llama_program import UNUSABLE, Step
from speckv_online.cpu_engine.notes import describe
from speckv_online.io.mapped_tensors import joined
from speckv_online.modeling.gguf_types import BlockType, dequantize, floats

#: Largest difference from the de-quantized matrix, relative to the largest output, by how inputs are rounded.
_TOLERANCE = {"float": 1e-5, "b8": 2e-2, "b16": 1e-4}


class GgufLinear(nn.Module):
    """A linear layer; a row's result has the same bits whatever the number of rows.

    Parameters
    ----------
    data : Tensor of uint8, shape (outputs, bytes)
        Blocks in the order of the file.
    kind : BlockType
    bias : Tensor, optional
    to : str
        How inputs of quantized weights are rounded: ``b8`` or ``b16``.
    kept : Tensor, optional
        The attribute ``weight`` of another layer of the same blocks, which are then not read.
    """

    def __init__(
        self,
        data: torch.Tensor,
        kind: BlockType,
        bias: torch.Tensor | None = None,
        to: str = "b8",
        kept: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        width, use = lanes(), floating.shape()
        if width is None or use is None:
            raise RuntimeError("no kernels for this processor, or no llvmlite")
        self.kind, self.lanes, self._use = kind, width, use
        #: What its inputs are rounded to.
        self.rounding = to if kind.bits else "float"
        self.out_features, self.in_features = len(data), data.shape[1] // kind.bytes * kind.size
        together = width if kind.bits else use.features
        #: Outputs with those that fill up the last register.
        self.outputs = -(-self.out_features // together) * together
        if kept is None and self.outputs > self.out_features:
            data = torch.cat((data, data.new_zeros(self.outputs - self.out_features, data.shape[1])))
        if kept is not None:
            packed = kept
        elif kind.bits:
            packed = kernels.lay_out(data, kind, width)
        elif self.in_features % use.lanes:
            raise ValueError(f"a matrix of {kind.name} with {self.in_features} inputs, which the kernels do not take")
        else:
            shaped = floats(data, kind).view(-1, use.features, self.in_features // use.lanes, use.lanes)
            packed = shaped.transpose(1, 2).contiguous()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``, shape (..., out_features)."""
        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        count, out = len(rows), torch.empty(len(rows), self.outputs)
        weight, shape = self.weight.data_ptr(), (count, self.in_features, self.outputs)
        if not count:
            pass
        elif self.kind.bits:
            numbers = kernels.inputs_for(count, self.in_features)
            there = rows.data_ptr(), numbers.data_ptr()
            kernels.compiled(self.lanes, f"rounded_{self.rounding}")(*there, 0, count, self.in_features)
            kernel = kernels.compiled(self.lanes, f"dot_{self.rounding}_{self.kind.name}")
            kernel(numbers.data_ptr(), weight, out.data_ptr(), *shape, 0, self.outputs)
        else:
            floating.compiled(self._use)[self.weight.dtype](rows.data_ptr(), weight, out.data_ptr(), *shape, 0)
        answer = out[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        return answer if self.bias is None else answer + self.bias

    def extra_repr(self) -> str:
        """Describe the layer as torch's do."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind.name}"


class GgufEmbedding(nn.Module):
    """An embedding that reads its rows out of a mapped file.

    Parameters
    ----------
    data : Tensor of uint8, shape (tokens, bytes)
        Blocks in the order of the file.
    kind : BlockType
    """

    def __init__(self, data: torch.Tensor, kind: BlockType) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(data, requires_grad=False)
        self.num_embeddings, self.embedding_dim = len(data), data.shape[1] // kind.bytes * kind.size
        #: What reads rows in a program.
        self.kernel = kernels.compiled(lanes() or 8, f"rows_{kind.name}")
        self.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of some tokens, shape (..., embedding_dim), fp32."""
        flat = ids.reshape(-1).long().contiguous()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"a token id that is none of the model's {self.num_embeddings}")
        out = torch.empty(*ids.shape, self.embedding_dim)
        self.kernel(flat.data_ptr(), self.weight.data_ptr(), out.data_ptr(), len(flat), self.embedding_dim)
        return out


class GgufProduct:
    """Linear layers of the same input as one, for a program of kernels.

    Parameters
    ----------
    layers : list of GgufLinear
    """

    def __init__(self, layers: list[Any]) -> None:
        if any(layer.outputs != layer.out_features for layer in layers):
            raise ValueError("outputs that do not fill the registers")
        self.inputs, self.outputs = layers[0].in_features, sum(layer.outputs for layer in layers)
        kinds = {layer.rounding for layer in layers}
        if len(kinds) > 1:
            raise ValueError("weights of several types")
        self.layers, self.to, self.weight = layers, kinds.pop(), layers[0].weight.detach()
        if self.to == "float" and len(layers) > 1:  # their kernel writes whole rows: they are one matrix
            if len({layer.weight.dtype for layer in layers}) > 1:
                raise ValueError("weights of several types")
            self.weight, at = joined([layer.weight.detach() for layer in layers]), 0
            for layer in layers:  # they share the memory
                end = at + len(layer.weight)
                layer.weight, at = nn.Parameter(self.weight[at:end], requires_grad=False), end

    def steps(self, x: int, out: int, room: Any, add: int = 0) -> list[Step]:
        """Return the kernels that multiply what is at ``x``, rounded unless weights are in floating point."""
        first, found, at = self.layers[0], list[Step](), out
        if self.to == "float":
            kernel = floating.compiled(first._use)[self.weight.dtype]
            return [(kernel, x, self.weight.data_ptr(), out, 0, self.inputs, self.outputs, 0)]
        for layer in self.layers:
            kernel = kernels.compiled(layer.lanes, f"dot_{self.to}_{layer.kind.name}")
            there = x, layer.weight.data_ptr(), at, 0, self.inputs, layer.outputs
            found.append((kernel, *there, add, self.outputs))
            at += 4 * layer.outputs
        return found


def input_types(model: nn.Module) -> set[str]:
    """Return what inputs the linear layers of a model multiply: fp32, bf16's values in fp32, or rounded ones."""
    found = set[str]()
    for layer in model.modules():
        if isinstance(layer, GgufLinear):
            found.add(layer.rounding)
        elif type(layer).__name__ == "Linear4bit":
            return {"bfloat"}
    return found or {"float"}


@cache
def why_not(kind: BlockType, to: str = "b8") -> str:
    """Return why there are no such layers on this processor, empty if there are: a small one is tried."""
    if lanes() is None:
        return "this processor has neither AVX-512 nor AVX2 with FMA and F16C, or llvmlite is missing"
    generator = torch.Generator().manual_seed(0)
    x, numbers = (torch.randn(rows, 96, generator=generator) for rows in (14, 72))
    if kind.bits:
        blocks = torch.randint(0, 256, (72, 96 // kind.size, kind.bytes), generator=generator, dtype=torch.uint8)
        heads = numbers[:, : kind.head // 2 * (96 // kind.size)].half().contiguous().view(torch.uint8)
        blocks[..., : kind.head] = heads.view(72, -1, kind.head)
        data = blocks.view(72, -1)
    else:
        data = numbers.to(floats(numbers.view(torch.uint8), kind).dtype).view(torch.uint8)
    weight = dequantize(data, kind)
    try:
        layer = GgufLinear(data, kind, to=to)
        found, rows = layer(x), GgufEmbedding(data, kind)(torch.arange(72))
    except UNUSABLE as error:
        return describe(error)
    expected = x @ weight.T
    right = (found - expected).abs().max() <= _TOLERANCE[layer.rounding] * expected.abs().max() and torch.equal(
        rows, weight
    )
    return "" if right else f"the results of its kernels for {kind.name} are not those of the matrix"
