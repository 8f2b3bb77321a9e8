"""Linear layers for the few rows of a verification, compiled for this processor.

A verification of some tokens need not take longer than one token: the weights are read from memory once either way,
and there is time for the arithmetic meanwhile. Stock kernels do not get there, as they lay out small products as they
do large ones. Here the weights of a few output features lie together in the order in which they are read, are fetched
ahead, and meet all rows while they are in registers. A row is summed in the same order whatever the number of
rows, so its result has the same bits at every width. docs/performance.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from speckv_online.cpu_engine.kernels.llvm import Code, Kernel, Library, features

#: Weights as they are stored: bytes, LLVM's type.
_STORED = {torch.float16: (2, "half"), torch.bfloat16: (2, "i16"), torch.float32: (4, "float"), torch.int8: (1, "i8")}
#: So many inputs have one scale if weights have 8 bits, as in GGUF's Q8_0.
SCALED = 32


@dataclass(frozen=True)
class Shape:
    """How a processor's registers are used: floats in one, output features and rows of input at once."""

    lanes: int
    features: int
    rows: int


def shape() -> Shape | None:
    """Return what suits this processor; None where there is nothing to gain."""
    found = features()
    if {"avx512f", "avx512bw", "avx512vl"} <= found:
        return Shape(16, 2, 12)
    return Shape(8, 2, 5) if {"avx2", "fma", "f16c"} <= found else None


def linear(stored: torch.dtype, use: Shape) -> str:
    """Return the kernel ``linear(x, weights, out, rows, inputs, outputs, scales)`` in fp32 for weights of a type.

    ``x`` has shape (rows, inputs) and ``out`` (rows, outputs), both fp32; :func:`lay_out` gives weights and scales.
    """
    size, kind = _STORED[stored]
    lanes, wide, whole = use.lanes, f"<{use.lanes} x float>", f"<{use.lanes} x i32>"
    c = Code(f"linear_{kind}")
    x, weights, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    scales = c.argument(6, "ptr")

    def weight(pointer: str, scale: str) -> str:
        found = c.load(f"<{lanes} x {kind}>", pointer, size)
        if kind == "half":
            return c.let(f"fpext <{lanes} x half> {found} to {wide}")
        if kind == "i16":  # bf16 is the upper half of an fp32
            moved = c.let(f"shl {whole} {c.let(f'zext <{lanes} x i16> {found} to {whole}')}, splat (i32 16)")
            return c.let(f"bitcast {whole} {moved} to {wide}")
        if kind == "i8":
            value = c.let(f"sitofp {whole} {c.let(f'sext <{lanes} x i8> {found} to {whole}')} to {wide}")
            return c.let(f"fmul {wide} {value}, {c.everywhere(lanes, 'float', c.load('float', scale))}")
        return found

    def block(x: str, weights: str, scales: str, out: str, count: int) -> None:
        """Some output features of ``count`` rows."""
        sums = [[c.slot(wide, "zeroinitializer") for _ in range(count)] for _ in range(use.features)]
        with c.loop(0, inputs, use.lanes) as i:
            first = c.at(weights, c.whole("mul", i, use.features * size), "i8")
            c.fetch(first, use.features * use.lanes * size)
            scale = c.at(scales, c.whole("mul", c.whole("udiv", i, SCALED), use.features), "float")
            w = [weight(c.at(first, f * use.lanes * size, "i8"), c.at(scale, f, "float")) for f in range(use.features)]
            for row in range(count):
                place = c.at(x, c.whole("add", c.whole("mul", inputs, row), i), "float")
                value = c.load(wide, place, 4)
                for f in range(use.features):
                    c.add_product(use.lanes, sums[f][row], w[f], value)
        for row in range(count):
            for f in range(use.features):
                total = c.load(wide, sums[f][row])
                one = c.let(f"call reassoc float @llvm.vector.reduce.fadd.v{use.lanes}f32(float 0.0, {wide} {total})")
                c.do(f"store float {one}, ptr {c.at(out, c.whole('add', c.whole('mul', outputs, row), f), 'float')}")

    low, high = c.share(c.whole("udiv", outputs, use.features))
    with c.loop(low, high) as part:
        feature = c.whole("mul", part, use.features)
        before = c.whole("mul", feature, inputs)
        there = (
            c.at(weights, c.whole("mul", before, size), "i8"),
            c.at(scales, c.whole("udiv", before, SCALED), "float"),
        )

        def some(done: str, count: int) -> None:
            to = c.at(out, c.whole("add", c.whole("mul", done, outputs), feature), "float")
            block(c.at(x, c.whole("mul", done, inputs), "float"), *there, to, count)

        c.chunks(rows, use.rows, some)
    return c.text()


def lay_out(weight: torch.Tensor, use: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight in the order in which :func:`linear` reads it, in the smallest type that holds it exactly.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs), fp32
    use : Shape
        Outputs are a multiple of its ``features`` and inputs of its ``lanes``.

    Returns
    -------
    tuple of Tensor
        The weight, and its scales if it has 8 bits, else an empty tensor.
    """
    outputs, inputs = weight.shape
    parts, scales = outputs // use.features, weight.new_empty(0)
    if (found := _in_8_bits(weight)) is not None:
        weight, scales = found
        scales = scales.view(parts, use.features, -1).transpose(1, 2).contiguous()
    for kind in (torch.float16, torch.bfloat16):
        if weight.dtype == torch.float32 and torch.equal(weight.to(kind).float(), weight):
            weight = weight.to(kind)
    return weight.view(parts, use.features, inputs // use.lanes, use.lanes).transpose(1, 2).contiguous(), scales


def round_to_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight as GGUF's Q8_0 does: to whole numbers with one fp16 scale for :data:`SCALED` inputs.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs), fp32
        Inputs are a multiple of :data:`SCALED`.

    Returns
    -------
    tuple of Tensor
        Whole numbers of shape (outputs, inputs / SCALED, SCALED), and scales of shape (outputs, inputs / SCALED, 1);
        both fp32, the weight is their product.
    """
    blocks = weight.reshape(len(weight), -1, SCALED)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127.0).half().float()
    return (blocks / scales.clamp_min(1e-30)).round().clamp(-127, 127), scales


def _in_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a weight's whole numbers and scales if it comes from GGUF's Q8_0; no bit is lost."""
    if weight.shape[1] % SCALED:
        return None
    numbers, scales = round_to_8_bits(weight)
    same = torch.equal((numbers * scales).view_as(weight), weight)
    return (numbers.to(torch.int8), scales) if same else None


@cache
def compiled(use: Shape, cpu: str | None = None) -> dict[torch.dtype, Kernel]:
    """Return the kernel :func:`linear` for each type of weights; errors as of
    :class:`~speckv_online.cpu_engine.kernels.llvm.Library`."""
    library = Library("".join(linear(stored, use) for stored in _STORED), cpu)
    return {stored: library.function(f"linear_{kind}") for stored, (_, kind) in _STORED.items()}
