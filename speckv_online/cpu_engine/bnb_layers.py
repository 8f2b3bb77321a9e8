"""bitsandbytes' layers on a CPU without the detours: the same results bit for bit, in less time.

For a few rows much of the time of a quantized layer on a CPU goes into dispatch: custom operators that call one
another, an autograd function, half precision that the processor lacks, boolean indexing in search of outliers. And its
kernels read the weights once per few rows. Here a layer is one or two calls of a kernel of
:mod:`speckv_online.cpu_engine.kernels.bnb` with the same arithmetic (LLM.int8, Dettmers et al., 2022; the 4-bit types
as bitsandbytes multiplies them in bf16), for processors on which bitsandbytes takes its own quick paths. Layers take
this way by :func:`speckv_online.cpu_engine.layer_patches.patch_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from speckv_online.cpu_engine.kernels.bnb import FEATURES, INPUTS, ONE, compiled, lay_out_int8
from speckv_online.cpu_engine.kernels.llvm import double


def int8_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a ``Linear8bitLt`` layer gives for ``x``, shape (..., out_features)."""
    if layer.state.CB is None or not _plain(x):
        return _stock(layer, x)
    weights, scales, sums, threshold, (outputs, inputs) = layer._patched
    rows = x.reshape(-1, inputs).contiguous()
    count, kernels = len(rows), compiled()
    numbers, tops = torch.empty((count, inputs), dtype=torch.uint8), torch.empty(count)
    columns, out = torch.empty((count, inputs + 1), dtype=torch.int32), torch.empty((count, outputs))
    to = numbers.data_ptr(), tops.data_ptr()
    kernels["quantize"](rows.data_ptr(), *to, count, inputs, threshold, columns.data_ptr())
    outliers = columns[0, :0].long()
    if columns[:, 0].any():  # a column with an outlier in one row is one in all
        some = columns[columns[:, 0] > 0]
        outliers = some[:, 1:][torch.arange(inputs) < some[:, :1]].unique().long()
        numbers[:, outliers] = 128
    pointers = numbers.data_ptr(), weights.data_ptr(), out.data_ptr()
    kernels["int8"](*pointers, count, inputs, outputs, tops.data_ptr(), scales.data_ptr(), sums.data_ptr())
    if layer.bias is not None:
        out += layer.bias
    if len(outliers):  # they are multiplied in floating point
        columns = weights[:, outliers // INPUTS, :, outliers % INPUTS].reshape(len(outliers), outputs)
        weight = columns.t().contiguous() * scales.view(-1, 1) * ONE
        out = out.addmm(rows.index_select(1, outliers), weight.t())
    return out.view(*x.shape[:-1], outputs)


def four_bit_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a ``Linear4bit`` layer gives for ``x``, shape (..., out_features)."""
    if not _plain(x):
        return _stock(layer, x)
    # Our own references: bitsandbytes puts the weights back into another layout when a state is asked for.
    weights, scales, codes, (outputs, inputs), block = layer._patched
    rows = x.reshape(-1, inputs).contiguous().to(torch.bfloat16).float()  # the type that bitsandbytes multiplies in
    out = torch.empty((len(rows), outputs))
    pointers = rows.data_ptr(), weights.data_ptr(), out.data_ptr()
    compiled()["four_bit"](*pointers, len(rows), inputs, outputs, scales.data_ptr(), block, codes.data_ptr())
    if layer.bias is not None:
        out += layer.bias
    return out.view(*x.shape[:-1], outputs)


def _plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and not torch.is_grad_enabled()


def _stock(layer: Any, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = type(layer).forward(layer, x)
    return answer


def ready_int8(layer: Any) -> bool:
    """Return True if a ``Linear8bitLt`` layer may be tried, and note what its forward needs."""
    # Without AVX-512 bitsandbytes itself multiplies in floating point, as torch's integers are slow there.
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or layer.state.has_fp16_weights:
        return False
    weight = layer.state.CB
    outputs, inputs = weight.shape
    if outputs % FEATURES or inputs % 16:  # inputs are rounded 16 at a time
        return False
    blocks = lay_out_int8(weight)
    sums = weight.sum(1, dtype=torch.int32) * 128
    threshold = layer.state.threshold if layer.state.threshold > 0.0 else float("inf")
    layer._patched = blocks, layer.state.SCB.float().contiguous(), sums, double(threshold), (outputs, inputs)
    return True


def ready_four_bit(layer: Any) -> bool:
    """Return True if a ``Linear4bit`` layer may be tried, and note what its forward needs."""
    state, weight = layer.weight.quant_state, layer.weight.data
    usable = getattr(state, "packing_format_for_cpu", False) and not state.nested and weight.is_contiguous()
    if not usable or layer.compute_dtype not in (None, torch.float32, torch.bfloat16):
        return False
    outputs, inputs = map(int, state.shape)
    block = int(state.blocksize)
    if outputs % 32 or inputs % block:
        return False
    codes = state.code.to(torch.bfloat16).float().contiguous()
    layer._patched = weight, state.absmax.to(torch.bfloat16).contiguous(), codes, (outputs, inputs), block
    return True


def laid_out(layer: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a layer's short way reads, to be kept."""
    return tuple(part for part in layer._patched if isinstance(part, torch.Tensor))


def take(layer: Any, kept: Sequence[torch.Tensor]) -> None:
    """Let a layer have what :func:`laid_out` returned of one with the same weight."""
    shape = layer.out_features, layer.in_features
    if type(layer).__name__ == "Linear4bit":
        layer._patched = *kept, shape, int(layer.weight.quant_state.blocksize)
        return
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    layer._patched = *kept, double(layer.state.threshold if layer.state.threshold > 0.0 else float("inf")), shape
