"""bitsandbytes' layers on a CPU without the detours: the same arithmetic bit for bit, in fewer calls.

For a few rows much of the time of a quantized layer on a CPU goes into dispatch: custom operators that call one
another, an autograd function, half precision that the processor lacks, boolean indexing in search of outliers. Here the
same steps are plain torch calls in fp32 (LLM.int8, Dettmers et al., 2022), or one call of bitsandbytes' own kernel
(4-bit types). Every layer is compared with bitsandbytes before it takes the short way; where they are not equal, or the
processor lacks what bitsandbytes' quick paths need, it stays as it is. docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

#: What LLM.int8 multiplies by in bitsandbytes: 1 / 127 squared (its literal is one zero short), and 1 / 127.
_BOTH, _ONE = 6.200124e-05, 7.874015718698502e-3
#: bitsandbytes' kernels by 4-bit type.
_kernels: dict[str, Any] = {}


def int8_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a ``Linear8bitLt`` layer gives for ``x``, shape (..., out_features)."""
    state = layer.state
    if state.CB is None or not _plain(x):
        return _stock(layer, x)
    rows = x.reshape(-1, x.shape[-1])
    rounded = rows.half().float()  # quantization starts from fp16
    sizes = rounded.abs()
    tops = sizes.amax(1, keepdim=True)
    columns = None
    if state.threshold > 0.0 and float(tops.max()) >= state.threshold:
        outliers = sizes >= state.threshold
        columns = outliers.any(0).nonzero().view(-1)
        tops = sizes.masked_fill_(outliers, 0.0).amax(1, keepdim=True)
    quantized = rounded.mul_(127.0 / tops).round_()
    if columns is not None:
        quantized.index_fill_(1, columns, 0.0)
    out = torch._int_mm(quantized.to(torch.int8), state.CB.t()) * (tops * state.SCB)
    out.mul_(_BOTH)
    if layer.bias is not None:
        out += layer.bias
    if columns is not None:  # outliers are multiplied in floating point
        apart = state.CB.index_select(1, columns) * state.SCB.view(-1, 1) * _ONE
        out = out.addmm(rows.index_select(1, columns), apart.t())
    return out.view(*x.shape[:-1], out.shape[-1])


def four_bit_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a ``Linear4bit`` layer gives for ``x``, shape (..., out_features)."""
    if not _plain(x):
        return _stock(layer, x)
    # Our own references: bitsandbytes puts the weights back into another layout when a state is asked for.
    weight, scales, (kind, rows, columns, block) = layer._light
    a = x.reshape(-1, columns).to(torch.bfloat16)  # the kernel's type
    out = torch.empty((len(a), rows), dtype=torch.bfloat16)
    _kernels[kind](
        len(a), rows, columns, a.data_ptr(), weight.data_ptr(), scales.data_ptr(), out.data_ptr(), block, columns, rows
    )
    answer = out.to(torch.float32).view(*x.shape[:-1], rows)
    if layer.bias is not None:
        answer += layer.bias
    return answer


def lighten(model: nn.Module) -> int:
    """Let a model's bitsandbytes layers on the CPU take these ways in inference; return how many may.

    The layers stay what they are, with their weights. Each one's first forward is bitsandbytes' own, and the layer
    takes the short way from then on if that gives the same for the same input.
    """
    found: list[Any] = [m for m in model.modules() if type(m).__name__ in _WAYS and m.weight.device.type == "cpu"]
    for layer in found:
        layer.forward = MethodType(_first_forward, layer)
    return len(found)


def _first_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    answer = _stock(layer, x)
    if _plain(x):
        del layer.forward
        ready, forward = _WAYS[type(layer).__name__]
        try:
            if ready(layer) and torch.equal(forward(layer, x), answer):
                layer.forward = MethodType(forward, layer)
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):  # another bitsandbytes
            pass
    return answer


def _plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and not torch.is_grad_enabled()


def _stock(layer: Any, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = type(layer).forward(layer, x)
    return answer


def _ready_int8(layer: Any) -> bool:
    # Without AVX-512 bitsandbytes itself multiplies in floating point, as torch's integers are slow there.
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not layer.state.has_fp16_weights


def _ready_four_bit(layer: Any) -> bool:
    state, weight = layer.weight.quant_state, layer.weight.data
    usable = getattr(state, "packing_format_for_cpu", False) and not state.nested and weight.is_contiguous()
    if not usable or layer.compute_dtype not in (None, torch.float32, torch.bfloat16):
        return False
    if state.quant_type not in _kernels:
        import ctypes

        from bitsandbytes.cextension import lib

        kernel = getattr(lib, f"gemv_4bit_inference_cpu_{state.quant_type}_bf16")
        whole, pointer = ctypes.c_int64, ctypes.c_void_p
        kernel.argtypes = [whole, whole, whole, pointer, pointer, pointer, pointer, whole, whole, whole]
        _kernels[state.quant_type] = kernel
    shape = state.quant_type, int(state.shape[0]), int(state.shape[1]), int(state.blocksize)
    layer._light = weight, state.absmax.to(torch.bfloat16).contiguous(), shape
    return True


#: By the name of a layer's class: whether it can take the short way, and that way.
_WAYS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "Linear8bitLt": (_ready_int8, int8_forward),
    "Linear4bit": (_ready_four_bit, four_bit_forward),
}
