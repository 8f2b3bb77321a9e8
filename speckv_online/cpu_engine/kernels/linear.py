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
#: Pairs of output features that are summed before any is added up across lanes.
_TOGETHER = 8
#: Bytes of input that meet weights at once, to stay in the first cache; bytes of weights that all rows meet before
#: others come, to stay in the second one.
_FIRST, _SECOND = 21_000, 192 * 1024
#: Up to so many rows weights are fetched into the first cache: there is little else to do. Else into the second one.
FEW = 2
#: How far ahead, in bytes, other kernels fetch into the second cache.
FAR = "16384"


@dataclass(frozen=True)
class Shape:
    """How a processor's registers are used: floats in one, output features and rows of input at once.

    Where there are more rows than that, so ``many`` of them: their inputs must not fill the first cache.
    """

    lanes: int
    features: int
    rows: int
    many: int = 5


def shape() -> Shape | None:
    """Return what suits this processor; None where there is nothing to gain."""
    found = features()
    if {"avx512f", "avx512bw", "avx512vl"} <= found:
        return Shape(16, 2, 12, 8)
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

    width = c.whole("mul", inputs, use.features * size)  # bytes of some output features
    sums_of = [(row, f) for row in range(use.rows) for f in range(use.features)]
    scratch = c.let(f"alloca {wide}, i64 {_TOGETHER * len(sums_of)}, align 64")

    def products(x: str, w: str, s: str, sums: list[str], first: str, last: str, ahead: str | None) -> None:
        """Add the products of some inputs of some rows to sums."""
        with c.loop(first, last, use.lanes) as i:
            here = c.at(w, c.whole("mul", i, use.features * size), "i8")
            c.fetch(here, use.features * use.lanes * size, ahead)
            scale = c.at(s, c.whole("mul", c.whole("udiv", i, SCALED), use.features), "float")
            found = [weight(c.at(here, f * lanes * size, "i8"), c.at(scale, f, "float")) for f in range(use.features)]
            for row in range(len(sums) // use.features):
                value = c.load(wide, c.at(x, c.whole("add", c.whole("mul", inputs, row), i), "float"), 4)
                for f in range(use.features):
                    c.add_product(lanes, sums[row * use.features + f], found[f], value)

    def block(x: str, out: str, start: str, stop: str, count: int) -> None:
        """Some rows and a few pairs of features: sums over pieces of the inputs, then across lanes."""
        known, ahead = sums_of[: count * use.features], None if count <= FEW else c.whole("mul", width, _TOGETHER)

        def places(part: str) -> list[str]:
            mine = c.at(scratch, c.whole("mul", c.whole("sub", part, start), len(known)), wide)
            return [c.at(mine, j, wide) for j in range(len(known))]

        def piece(first: str, last: str, fresh: bool) -> None:
            with c.loop(start, stop) as part:
                before = c.whole("mul", c.whole("mul", part, use.features), inputs)
                w = c.at(weights, c.whole("mul", part, width), "i8")
                s = c.at(scales, c.whole("udiv", before, SCALED), "float")
                kept = places(part)
                sums = [c.slot(wide, "zeroinitializer" if fresh else c.load(wide, place, 64)) for place in kept]
                products(x, w, s, sums, first, last, ahead)
                for total, place in zip(sums, kept, strict=True):
                    c.do(f"store {wide} {c.load(wide, total)}, ptr {place}, align 64")

        step = str(_FIRST // (4 * count) // lanes * lanes)
        once = c.let(f"call i64 @llvm.umin.i64(i64 {step}, i64 {inputs})")
        piece("0", once, True)
        with c.loop(once, inputs, step) as first:
            piece(first, c.let(f"call i64 @llvm.umin.i64(i64 {c.whole('add', first, step)}, i64 {inputs})"), False)
        with c.loop(start, stop) as part:
            kept, feature = places(part), c.whole("mul", part, use.features)
            for j in range(0, len(known), lanes):
                totals = c.across(lanes, [c.load(wide, place, 64) for place in kept[j : j + lanes]])
                for at, (row, f) in enumerate(known[j : j + lanes]):
                    if f == 0:
                        picked = ", ".join(f"i32 {at + other}" for other in range(use.features))
                        few = f"<{use.features} x i32> <{picked}>"
                        some = c.let(f"shufflevector {wide} {totals}, {wide} poison, {few}")
                        to = c.at(out, c.whole("add", c.whole("mul", outputs, row), feature), "float")
                        c.do(f"store <{use.features} x float> {some}, ptr {to}, align 4")

    low, high = c.share(c.whole("udiv", outputs, use.features))
    # Features whose weights all rows meet before others come.
    tile = c.whole("mul", c.whole("add", c.whole("udiv", _SECOND // _TOGETHER, width), 1), _TOGETHER)
    several = c.let(f"icmp ugt i64 {rows}, {use.rows}")
    tile = c.slot("i64", c.let(f"select i1 {several}, i64 {tile}, i64 {c.whole('add', high, 1)}"))
    with c.loop(low, high, tile) as first:
        last = c.let(f"call i64 @llvm.umin.i64(i64 {c.whole('add', first, c.load('i64', tile))}, i64 {high})")

        def some(done: str, count: int) -> None:
            with c.loop(first, last, _TOGETHER) as start:
                stop = c.let(f"call i64 @llvm.umin.i64(i64 {c.whole('add', start, _TOGETHER)}, i64 {last})")
                from_, to = (c.at(p, c.whole("mul", done, of), "float") for p, of in ((x, inputs), (out, outputs)))
                block(from_, to, start, stop, count)

        c.chunks(rows, use.rows, some, c.let(f"select i1 {several}, i64 {use.many}, i64 {use.rows}"))
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
