"""Matrices in 8 bits on both sides, for the few rows of a draft's step.

The inputs of a matrix are rounded to 8 bits as its weights are, with a scale for each :data:`BLOCK`, as llama.cpp does
with GGUF's Q8_0: products are then whole numbers, and multiplying takes a third of the time. What a row's results are
depends on that row alone, to the last bit. Argument 3 of each kernel is the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from speckv_online.cpu_engine.kernels.linear import SCALED, round_to_8_bits, shape
from speckv_online.cpu_engine.kernels.llvm import features, single
from speckv_online.cpu_engine.kernels.vector import VectorCode

#: So many inputs have one scale.
BLOCK = SCALED


@dataclass(frozen=True)
class Form:
    """What the kernels are compiled for.

    Parameters
    ----------
    lanes : int
        Floats in a register: 16 where there is AVX-512 VNNI, else 8.
    heads, groups, size : int
        Query heads, key and value heads, and the size of each.
    """

    lanes: int
    heads: int
    groups: int
    size: int

    @property
    def bytes(self) -> int:
        """Bytes of a rounded input: VNNI multiplies bytes, AVX2 pairs of 16 bits."""
        return 1 if self.lanes == 16 else 2

    @property
    def rows(self) -> int:
        """Rows that meet a weight at once."""
        return 12 if self.lanes == 16 else 5

    @property
    def stride(self) -> int:
        """Bytes from a row's block of rounded inputs to the next row's: its numbers, its scale, its correction."""
        return 64 * self.bytes

    def inputs(self, rows: int, width: int) -> torch.Tensor:
        """Return room for rows of rounded inputs, of shape (parts, blocks, rows at once, bytes)."""
        return torch.empty(-(-rows // self.rows), width // BLOCK, self.rows, self.stride, dtype=torch.uint8)


def lanes() -> int | None:
    """Return how many floats this processor's registers hold; None where there are no kernels for it."""
    use = shape()
    if use is None:
        return None
    return use.lanes if "avx512vnni" in features() else 8


def lay_out(weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to 8 bits, in the order in which :func:`linear` reads it.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs), fp32
        Outputs are a multiple of ``width`` and inputs of :data:`BLOCK`.
    width : int
        ``lanes`` of the form.

    Returns
    -------
    tuple of Tensor
        Unsigned bytes, 128 added, and fp16 scales.
    """
    # A piece after the other: rounding needs several times the room of what it rounds.
    numbers, scales = zip(*(_lay_out(piece, width) for piece in weight.split(64 * width)), strict=True)
    return torch.cat(numbers), torch.cat(scales)


def _lay_out(weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers, scales = round_to_8_bits(weight)
    outputs, blocks = scales.shape[:2]
    together = 4 if width == 16 else 2
    parts = (numbers + 128.0).to(torch.uint8).view(outputs // width, width, blocks, BLOCK // together, together)
    return (
        parts.permute(0, 2, 3, 1, 4).contiguous(),
        scales.view(outputs // width, width, blocks).transpose(1, 2).half().contiguous(),
    )


def block_of(c: VectorCode, form: Form, numbers: str, row: str, block: str, blocks: str) -> str:
    """Return where a row's block of rounded inputs is, of so many blocks."""
    return c.place(numbers, row, block, blocks, form.rows, form.stride)


def round_block(c: VectorCode, form: Form, values: list[str], numbers: str) -> None:
    """Round a block of inputs: its numbers, its scale and, for :func:`linear`, -128 times the sum of its numbers."""
    size, correction = (c.at(numbers, BLOCK * form.bytes + offset, "i8") for offset in (0, 4))
    (top, factor), total = c.rounding(values, "127.0"), "zeroinitializer"
    kind = f"<{form.lanes} x i{8 * form.bytes}>"
    for place, value in enumerate(values):
        even = c.call("rint", c.f("fmul", value, factor))
        number = c.let(f"fptosi {c.wide} {even} to {c.ints}")
        total = c.let(f"add {c.ints} {total}, {number}")
        short = c.let(f"trunc {c.ints} {number} to {kind}")
        c.do(f"store {kind} {short}, ptr {c.at(numbers, place * form.lanes * form.bytes, 'i8')}, align 1")
    c.do(f"store float {c.let(f'fmul float {top}, {single(1 / 127)}')}, ptr {size}")
    added = c.let(f"call i32 @llvm.vector.reduce.add.v{form.lanes}i32({c.ints} {total})")
    c.do(f"store i32 {c.let(f'mul i32 {added}, -128')}, ptr {correction}")


def norm(form: Form) -> str:
    """Return the kernel ``norm(x, numbers, eps, rows, inputs)``: an RMS norm without weights, rounded.

    ``x`` is fp32 of shape (rows, inputs), ``eps`` a double's bits, ``numbers`` as of :meth:`Form.inputs`.
    """
    c = VectorCode("norm", form.lanes)
    x, numbers, rows, inputs = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(3), c.argument(4)
    blocks = c.whole("udiv", inputs, BLOCK)
    eps = c.single(c.argument(2))
    length = c.let(f"sitofp i64 {inputs} to float")
    low, high = c.share(rows)
    with c.loop(low, high) as row:
        start, squares = c.whole("mul", row, inputs), c.slot(c.wide, "zeroinitializer")
        with c.loop(0, inputs, form.lanes) as i:
            value = c.load(c.wide, c.at(x, c.whole("add", start, i), "float"), 4)
            c.add_product(form.lanes, squares, value, value)
        mean = c.let(f"fdiv float {c.total(c.load(c.wide, squares))}, {length}")
        root = c.let(f"call float @llvm.sqrt.f32(float {c.let(f'fadd float {mean}, {eps}')})")
        factor = c.everywhere(form.lanes, "float", c.let(f"fdiv float 1.0, {root}"))
        with c.loop(0, blocks) as block:
            place = c.at(x, c.whole("add", start, c.whole("mul", block, BLOCK)), "float")
            values = [c.load(c.wide, c.at(place, j, "float"), 4) for j in range(0, BLOCK, form.lanes)]
            normed = [c.f("fmul", value, factor) for value in values]
            round_block(c, form, normed, block_of(c, form, numbers, row, block, blocks))
    return c.text()


def linear(form: Form) -> str:
    """Return the kernel ``linear(numbers, weights, out, rows, inputs, outputs, scales, add)``.

    ``out`` of shape (rows, outputs), fp32, becomes the product of the rounded inputs and weights, or where ``add`` is 1
    has it added to it. ``numbers`` are as of :meth:`Form.inputs`; :func:`lay_out` gives weights and scales.
    """
    c = VectorCode("linear", form.lanes)
    lanes, wide, whole, together = form.lanes, c.wide, c.ints, 4 // form.bytes
    size = lanes * together  # bytes of weights that one instruction takes
    x, weights, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    scales, add = c.argument(6, "ptr"), c.let(f"trunc i64 {c.argument(7)} to i1")
    blocks = c.whole("udiv", inputs, BLOCK)
    low, high = c.share(c.whole("udiv", outputs, lanes))
    with c.loop(low, high) as part:
        feature = c.whole("mul", part, lanes)
        before = c.whole("mul", part, blocks)
        w = c.at(weights, c.whole("mul", before, BLOCK * lanes), "i8")
        s = c.at(scales, c.whole("mul", before, lanes), "i16")

        def some(done: str, count: int) -> None:
            start = block_of(c, form, x, done, "0", blocks)
            totals = [c.slot(wide, "zeroinitializer") for _ in range(count)]
            with c.loop(0, blocks) as block:
                first = c.at(w, c.whole("mul", block, BLOCK * lanes), "i8")
                c.fetch(first, BLOCK * lanes)
                half = c.load(f"<{lanes} x half>", c.at(s, c.whole("mul", block, lanes), "i16"), 2)
                scale = c.let(f"fpext <{lanes} x half> {half} to {wide}")
                here = c.at(start, c.whole("mul", block, form.rows * form.stride), "i8")

                def number(row: int, offset: int, kind: str = "i32", here: str = here) -> str:
                    value = c.load(kind, c.at(here, row * form.stride + offset, "i8"))
                    return c.everywhere(lanes, kind, value)

                sums = [number(row, BLOCK * form.bytes + 4) for row in range(count)]
                for step in range(BLOCK // together):
                    weight = c.load(f"<{size} x i8>", c.at(first, step * size, "i8"), 1)
                    sums = [_dot(c, form, total, weight, number(row, 4 * step)) for row, total in enumerate(sums)]
                for row, total in enumerate(sums):
                    factor = c.f("fmul", scale, number(row, BLOCK * form.bytes, "float"))
                    c.add_product(lanes, totals[row], c.let(f"sitofp {whole} {total} to {wide}"), factor)
            for row in range(count):
                at = c.whole("add", c.whole("mul", c.whole("add", done, row), outputs), feature)
                to = c.at(out, at, "float")
                old = c.let(f"select i1 {add}, {wide} {c.load(wide, to, 4)}, {wide} zeroinitializer")
                c.do(f"store {wide} {c.f('fadd', old, c.load(wide, totals[row]))}, ptr {to}, align 4")

        c.chunks(rows, form.rows, some)
    return c.text()


def _dot(c: VectorCode, form: Form, total: str, weight: str, x: str) -> str:
    """Add the products of each lane's unsigned weights and signed inputs to a register of 32-bit integers."""
    whole = c.ints
    if form.lanes == 16:
        weight = c.let(f"bitcast <64 x i8> {weight} to {whole}")
        return c.let(f"call {whole} @llvm.x86.avx512.vpdpbusd.512({whole} {total}, {whole} {weight}, {whole} {x})")
    longer, pairs = c.let(f"zext <16 x i8> {weight} to <16 x i16>"), c.let(f"bitcast {whole} {x} to <16 x i16>")
    product = c.let(f"call {whole} @llvm.x86.avx2.pmadd.wd(<16 x i16> {longer}, <16 x i16> {pairs})")
    return c.let(f"add {whole} {total}, {product}")


def declarations(lanes: int) -> str:
    """Return what of LLVM's own :func:`linear` calls besides."""
    if lanes == 16:
        return "declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)\n"
    return "declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)\n"
