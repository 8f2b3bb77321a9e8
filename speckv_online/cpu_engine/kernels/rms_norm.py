"""RMS norms of transformers' models in one call, with the bits that transformers gives.

A norm of a few rows is six operations of torch, and takes longer to be asked for than to be done. The kernel adds up
the squares in the order in which torch does it, as the next layer may round what it reads, and then a last bit decides.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from speckv_online.cpu_engine.kernels.llvm import Code, Kernel, Library, double, features

#: How torch adds up a row: so many vectors in turn, of so many lanes, and what so many turns give is added up apart.
_TURNS, _LANES, _BLOCK = 4, 8, 16
#: Longer rows are added up in yet another way.
_LONGEST = 16 * _BLOCK * _TURNS * _LANES


def rms_norm() -> str:
    """Return the kernel ``rms_norm(x, weight, out, rows, inputs, eps)``, ``eps`` a double's bits.

    ``out = weight * (x / sqrt(mean(x ** 2) + eps))`` for ``x`` of shape (rows, inputs) in fp32.
    """
    wide = f"<{_LANES} x float>"
    c = Code("rms_norm")
    x, weight, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs = c.argument(3), c.argument(4)
    eps = c.single(c.argument(5))
    length = c.let(f"sitofp i64 {inputs} to float")
    turn = _TURNS * _LANES
    even, blocks = (c.whole("mul", c.whole("udiv", inputs, step), step) for step in (turn, turn * _BLOCK))

    low, high = c.share(rows)
    with c.loop(low, high) as row:
        start = c.whole("mul", row, inputs)
        here, there = c.at(x, start, "float"), c.at(out, start, "float")
        totals, sums = ([c.slot(wide, "zeroinitializer") for _ in range(_TURNS)] for _ in range(2))

        def add(total: str, value: str) -> None:
            old = c.load(wide, total)
            c.do(f"store {wide} {c.let(f'fadd {wide} {old}, {value}')}, ptr {total}")

        def add_squares(sums: list[str], first: str, here: str = here) -> None:
            for number, total in enumerate(sums):
                place = c.at(here, c.whole("add", first, number * _LANES), "float")
                value = c.load(wide, place, 4)
                add(total, c.let(f"fmul {wide} {value}, {value}"))

        with c.loop(0, blocks, turn * _BLOCK) as block:
            with c.loop(block, c.whole("add", block, turn * _BLOCK), turn) as i:
                add_squares(sums, i)
            for total, part in zip(totals, sums, strict=True):
                add(total, c.load(wide, part))
                c.do(f"store {wide} zeroinitializer, ptr {part}")
        with c.loop(blocks, even, turn) as i:
            add_squares(sums, i)
        for total, part in zip(totals, sums, strict=True):
            add(part, c.load(wide, total))
        with c.loop(even, inputs, _LANES) as i:
            add_squares(sums[:1], i)
        for other in sums[1:]:
            add(sums[0], c.load(wide, other))
        first = c.load(wide, sums[0])
        total = c.let(f"call float @llvm.vector.reduce.fadd.v{_LANES}f32(float 0.0, {wide} {first})")  # lane by lane
        variance = c.let(f"fadd float {c.let(f'fdiv float {total}, {length}')}, {eps}")
        root = c.let(f"call float @llvm.sqrt.f32(float {variance})")
        factor = c.everywhere(_LANES, "float", c.let(f"fdiv float 1.0, {root}"))
        with c.loop(0, inputs, _LANES) as i:
            value, scale = (c.load(wide, c.at(p, i, "float"), 4) for p in (here, weight))
            answer = c.let(f"fmul {wide} {scale}, {c.let(f'fmul {wide} {value}, {factor}')}")
            c.do(f"store {wide} {answer}, ptr {c.at(there, i, 'float')}, align 4")
    return c.text()


@cache
def compiled() -> Kernel:
    """Return the kernel for one thread; errors as of :class:`~speckv_online.cpu_engine.kernels.llvm.Library`."""
    if "avx2" not in features():
        raise RuntimeError("a processor without vectors of eight")
    return Library("declare float @llvm.sqrt.f32(float)\n" + rms_norm()).function("rms_norm", parallel=False)


def norm_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what an RMS norm gives for ``x``, shape (..., size)."""
    if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous() or torch.is_grad_enabled():
        found: torch.Tensor = type(layer).forward(layer, x)
        return found
    return normed(x, *layer._patched)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: int) -> torch.Tensor:
    """Return the RMS norm of rows of shape (..., size); ``eps`` is a double's bits.

    Both tensors are fp32, contiguous and on the CPU; the size is a multiple of 8.
    """
    out, size = torch.empty_like(x), len(weight)
    compiled()(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
    return out


def ready(layer: Any) -> bool:
    """Return True if a norm may be tried, and note what its forward needs."""
    weight = layer.weight.detach()
    usable = weight.dtype == torch.float32 and weight.is_contiguous() and weight.dim() == 1
    if not usable or len(weight) % _LANES or len(weight) >= _LONGEST:
        return False
    layer._patched = weight, double(layer.variance_epsilon)
    return True
