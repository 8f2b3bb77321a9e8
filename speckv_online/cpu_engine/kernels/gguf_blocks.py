"""Matrices in the blocks of a GGUF file, for the few rows of a verification.

A block's 32 weights are ``scale * (number - offset)``, or ``scale * number + minimum``. The inputs of a matrix are
rounded too, with a scale for each 32, so the products of a block are sums of whole numbers, which are exact. A row's
result depends on that row alone, to the last bit.

Inputs have 8 bits, as in llama.cpp (``b8``), or 16 in two digits (``b16``): the latter gives what the de-quantized
matrix gives in fp32 but for rounding, in nearly twice the time where several rows are read. Without AVX-512 VNNI either
is multiplied as 16 bits, with the same results.

Argument 3 of each kernel is the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from speckv_online.cpu_engine.kernels import vector as vector_code
from speckv_online.cpu_engine.kernels.int8_blocks import declarations as dot_declarations
from speckv_online.cpu_engine.kernels.linear import FAR, FEW
from speckv_online.cpu_engine.kernels.llvm import Kernel, Library, single
from speckv_online.cpu_engine.kernels.vector import VectorCode
from speckv_online.modeling.gguf_types import BLOCK, TYPES, BlockType, parts

#: Rows that meet a weight at once.
ROWS = 12
#: Bytes of a row's block of rounded inputs: its numbers; its scale; -8 and -128 times the sum of its numbers; that sum
#: times the scale.
STRIDE, _SCALE, _LESS, _SUM = 80, 64, {8: 68, 128: 72}, 76
#: The largest rounded input: 127 in the upper digit.
_MOST = {"b8": 127, "b16": 127 * 256}
_QUANTIZED = {kind.name: kind for kind in TYPES.values() if kind.bits}
_KINDS = {kind.name: kind for kind in TYPES.values()}


def inputs_for(rows: int, width: int) -> torch.Tensor:
    """Return room for rows of rounded inputs, of shape (parts, blocks, rows at once, bytes)."""
    return torch.empty(-(-rows // ROWS), width // BLOCK, ROWS, STRIDE, dtype=torch.uint8)


def lay_out(data: torch.Tensor, kind: BlockType, lanes: int) -> torch.Tensor:
    """Return the blocks of a matrix in the order in which :func:`dot` reads them; no bit is changed.

    The blocks of ``lanes`` rows lie together: their scales, their minima, then four bytes of each row in turn.

    Parameters
    ----------
    data : Tensor of uint8, shape (outputs, bytes)
        Outputs are a multiple of ``lanes``.
    kind : BlockType
    lanes : int
        Floats in a register.
    """
    head, numbers = parts(data, kind)
    groups, blocks = len(data) // lanes, head.shape[1]
    head = head.view(groups, lanes, blocks, -1).permute(0, 2, 3, 1).contiguous()
    numbers = numbers.reshape(groups, lanes, blocks, -1, 4).permute(0, 2, 3, 1, 4)
    if kind.bits == 8:  # signed to unsigned
        numbers = numbers ^ 128
    return torch.cat((head.view(torch.uint8).view(groups, blocks, -1), numbers.reshape(groups, blocks, -1)), -1)


def block_of(c: VectorCode, numbers: str, row: str, block: str, blocks: str) -> str:
    """Return where a row's block of rounded inputs is, of so many blocks."""
    return c.place(numbers, row, block, blocks, ROWS, STRIDE)


def round_block(c: VectorCode, to: str, values: list[str], numbers: str) -> None:
    """Round a block of inputs, and write what :func:`dot` needs of it."""
    (top, factor), total = c.rounding(values, single(_MOST[to])), "zeroinitializer"
    eight, shorts = f"<{c.lanes} x i8>", f"<{c.lanes} x i16>"
    for place, value in enumerate(values):
        number = c.let(f"fptosi {c.wide} {c.call('rint', c.f('fmul', value, factor))} to {c.ints}")
        total = c.let(f"add {c.ints} {total}, {number}")
        if c.lanes == 16:
            upper = c.let(f"ashr {c.ints} {c.let(f'add {c.ints} {number}, splat (i32 128)')}, splat (i32 8)")
            # The lower 8 bits are what the upper digit leaves.
            for digit, kept in enumerate((number,) if to == "b8" else (upper, number)):
                at = c.at(numbers, BLOCK * digit + 16 * place, "i8")
                c.do(f"store {eight} {c.let(f'trunc {c.ints} {kept} to {eight}')}, ptr {at}, align 1")
        else:
            short, order = c.let(f"trunc {c.ints} {number} to {shorts}"), (0, 2, 1, 3, 4, 6, 5, 7)
            picked = ", ".join(f"i32 {i}" for i in order)
            turned = c.let(f"shufflevector {shorts} {short}, {shorts} poison, <8 x i32> <{picked}>")
            c.do(f"store {shorts} {turned}, ptr {c.at(numbers, 16 * place, 'i8')}, align 1")
    scale = c.let(f"fmul float {top}, {single(1 / _MOST[to])}")
    added = c.let(f"call i32 @llvm.vector.reduce.add.v{c.lanes}i32({c.ints} {total})")
    c.do(f"store float {scale}, ptr {c.at(numbers, _SCALE, 'i8')}")
    for offset, place_ in _LESS.items():
        c.do(f"store i32 {c.let(f'mul i32 {added}, {-offset}')}, ptr {c.at(numbers, place_, 'i8')}")
    whole = c.let(f"fmul float {c.let(f'sitofp i32 {added} to float')}, {scale}")
    c.do(f"store float {whole}, ptr {c.at(numbers, _SUM, 'i8')}")


def rounded(lanes: int, to: str) -> str:
    """Return the kernel ``rounded_TO(x, numbers, _, rows, inputs)``: fp32 of shape (rows, inputs), rounded."""
    c = VectorCode(f"rounded_{to}", lanes)
    x, numbers, rows, inputs = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(3), c.argument(4)
    blocks = c.whole("udiv", inputs, BLOCK)
    low, high = c.share(c.whole("mul", rows, blocks))
    with c.loop(low, high) as unit:
        place = c.at(x, c.whole("mul", unit, BLOCK), "float")
        values = [c.load(c.wide, c.at(place, j, "float"), 4) for j in range(0, BLOCK, lanes)]
        row, block = c.whole("udiv", unit, blocks), c.whole("urem", unit, blocks)
        round_block(c, to, values, block_of(c, numbers, row, block, blocks))
    return c.text()


def normed(lanes: int, to: str) -> str:
    """Return the kernel ``normed_TO(x, numbers, weight, rows, inputs, eps)``: an RMS norm, rounded.

    ``x`` is fp32 of shape (rows, inputs), ``weight`` fp32 and ``eps`` a double's bits.
    """
    c = VectorCode(f"normed_{to}", lanes)
    x, numbers, weight = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, eps = c.argument(3), c.argument(4), c.single(c.argument(5))
    blocks = c.whole("udiv", inputs, BLOCK)
    length = c.let(f"sitofp i64 {inputs} to float")
    low, high = c.share(rows)
    with c.loop(low, high) as row:
        start, squares = c.whole("mul", row, inputs), c.slot(c.wide, "zeroinitializer")
        with c.loop(0, inputs, lanes) as i:
            value = c.load(c.wide, c.at(x, c.whole("add", start, i), "float"), 4)
            c.add_product(lanes, squares, value, value)
        mean = c.let(f"fdiv float {c.total(c.load(c.wide, squares))}, {length}")
        root = c.let(f"call float @llvm.sqrt.f32(float {c.let(f'fadd float {mean}, {eps}')})")
        factor = c.everywhere(lanes, "float", c.let(f"fdiv float 1.0, {root}"))
        with c.loop(0, blocks) as block:
            first, values = c.whole("mul", block, BLOCK), []
            for j in range(0, BLOCK, lanes):
                at = c.whole("add", first, j)
                value = c.load(c.wide, c.at(x, c.whole("add", start, at), "float"), 4)
                size = c.load(c.wide, c.at(weight, at, "float"), 4)
                values.append(c.f("fmul", size, c.f("fmul", value, factor)))
            round_block(c, to, values, block_of(c, numbers, row, block, blocks))
    return c.text()


def dot(lanes: int, to: str, name: str) -> str:
    """Return the kernel ``dot_TO_TYPE(numbers, weights, out, rows, inputs, outputs, add, stride)``.

    ``out``, fp32, becomes the product of rounded inputs and weights, or where ``add`` is 1 has it added to it. Rows of
    ``out`` are ``stride`` apart, and ``outputs`` a multiple of ``lanes``. :func:`lay_out` gives the weights.
    """
    kind = _QUANTIZED[name]
    c = VectorCode(f"dot_{to}_{name}", lanes)
    wide, whole = c.wide, c.ints
    x, weights, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    add, stride = c.let(f"trunc i64 {c.argument(6)} to i1"), c.argument(7)
    blocks, size = c.whole("udiv", inputs, BLOCK), lanes * kind.bytes
    first = kind.head * lanes
    low, high = c.share(c.whole("udiv", outputs, lanes))
    with c.loop(low, high) as part:
        w = c.at(weights, c.whole("mul", c.whole("mul", part, blocks), size), "i8")

        def some(done: str, count: int) -> None:
            start = block_of(c, x, done, "0", blocks)
            totals = [c.slot(wide, "zeroinitializer") for _ in range(count)]
            with c.loop(0, blocks) as block:
                there = c.at(w, c.whole("mul", block, size), "i8")
                # Blocks of 4 bits leave memory waiting as they are.
                c.fetch(there, size, None if count <= FEW or kind.bits < 8 else FAR)
                here = c.at(start, c.whole("mul", block, ROWS * STRIDE), "i8")
                heads = []
                for i in range(kind.head // 2):
                    half = c.load(f"<{lanes} x half>", c.at(there, 2 * lanes * i, "i8"), 2)
                    heads.append(c.let(f"fpext <{lanes} x half> {half} to {wide}"))
                numbers = _unpacked(c, kind, c.at(there, first, "i8"))

                def one(row: int, offset: int, of: str = "i32", here: str = here) -> str:
                    value = c.load(of, c.at(here, row * STRIDE + offset, "i8"), 4)
                    return c.everywhere(lanes, of, value)

                for row in range(count):
                    less = one(row, _LESS[kind.offset]) if kind.offset else "zeroinitializer"
                    total = _summed(c, to, numbers, less, lambda offset, row=row, one=one: one(row, offset))  # type: ignore[misc]
                    factor = c.f("fmul", heads[0], one(row, _SCALE, "float"))
                    c.add_product(lanes, totals[row], c.let(f"sitofp {whole} {total} to {wide}"), factor)
                    if kind.minimum:
                        c.add_product(lanes, totals[row], heads[1], one(row, _SUM, "float"))
            for row in range(count):
                at = c.whole("add", c.whole("mul", c.whole("add", done, row), stride), c.whole("mul", part, lanes))
                place = c.at(out, at, "float")
                old = c.let(f"select i1 {add}, {wide} {c.load(wide, place, 4)}, {wide} zeroinitializer")
                c.do(f"store {wide} {c.f('fadd', old, c.load(wide, totals[row]))}, ptr {place}, align 4")

        c.chunks(rows, ROWS, some)
    return c.text()


def _unpacked(c: VectorCode, kind: BlockType, place: str) -> list[tuple[str, int]]:
    """Return a block's unsigned weights, register by register, and the input that each begins with.

    With AVX-512 a lane of 32 bits has four inputs in 8 bits; else two in 16, of which the second is two behind.
    """
    short, size = c.lanes == 8, 4 * c.lanes
    of = f"<{size // 2} x i16>" if short else f"<{size} x i8>"
    element, found = ("i16" if short else "i8"), []
    for chunk in range(BLOCK * kind.bits // 8 // 4):
        packed = c.load(of, c.at(place, chunk * size, "i8"), 1)
        for shift in range(0, 16 if short else 8, kind.bits):
            value = c.let(f"lshr {of} {packed}, splat ({element} {shift})") if shift else packed
            if short or kind.bits == 4:
                value = c.let(f"and {of} {value}, splat ({element} {(1 << kind.bits) - 1})")
            first = 4 * chunk + (BLOCK // 2 if kind.bits == 4 and shift % 8 else 0) + shift // 8
            found.append((c.let(f"bitcast {of} {value} to {c.ints}"), first))
    return found


def _summed(c: VectorCode, to: str, numbers: list[tuple[str, int]], less: str, x: Callable[[int], str]) -> str:
    """Return the sums of products of a block's weights and a row's rounded inputs, ``less`` added."""
    whole = c.ints
    if c.lanes == 16:
        total = less if to == "b8" else "zeroinitializer"
        for digit in range(1 if to == "b8" else 2):
            if digit:
                total = c.let(f"add {whole} {c.let(f'shl {whole} {total}, splat (i32 8)')}, {less}")
            for number, first in numbers:
                given = f"{whole} {total}, {whole} {number}, {whole} {x(BLOCK * digit + first)}"
                total = c.let(f"call {whole} @llvm.x86.avx512.vpdpbusd.512({given})")
        return total
    total = less
    for number, first in numbers:
        # Of four inputs in a row the first and third lie together, then the second and fourth.
        place = 2 * (first // 4 * 4 + 2 * (first % 4))
        pairs = [c.let(f"bitcast {whole} {value} to <16 x i16>") for value in (number, x(place))]
        product = c.let(f"call {whole} @llvm.x86.avx2.pmadd.wd(<16 x i16> {pairs[0]}, <16 x i16> {pairs[1]})")
        total = c.let(f"add {whole} {total}, {product}")
    return total


def rows_of(lanes: int, name: str) -> str:
    """Return the kernel ``rows_TYPE(ids, table, x, rows, inputs)``: rows of a matrix as the file has it, in fp32."""
    kind = _KINDS[name]
    c = VectorCode(f"rows_{name}", lanes)
    ids, table, x = (c.argument(i, "ptr") for i in range(3))
    rows, inputs = c.argument(3), c.argument(4)
    width = c.whole("mul", c.whole("udiv", inputs, kind.size), kind.bytes)
    low, high = c.share(rows)
    with c.loop(low, high) as row, c.loop(0, inputs, BLOCK) as i:
        of = c.at(table, c.whole("mul", c.load("i64", c.at(ids, row)), width), "i8")
        there = c.at(of, c.whole("mul", c.whole("udiv", i, kind.size), kind.bytes), "i8")
        to = c.at(x, c.whole("add", c.whole("mul", row, inputs), i), "float")
        for half, value in enumerate(_quantized_row(c, kind, there) if kind.bits else _floating_row(c, kind, there)):
            c.do(f"store {_SIXTEEN} {value}, ptr {c.at(to, 16 * half, 'float')}, align 4")
    return c.text()


_SIXTEEN = "<16 x float>"


def _floating_row(c: VectorCode, kind: BlockType, there: str) -> list[str]:
    """Return 32 numbers of a row in two registers."""
    stored = {"F32": "float", "F16": "half", "BF16": "bfloat"}[kind.name]
    found = [c.load(f"<16 x {stored}>", c.at(there, 16 * half * kind.bytes, "i8"), 2) for half in range(2)]
    if stored == "float":
        return found
    return [c.let(f"fpext <16 x {stored}> {value} to {_SIXTEEN}") for value in found]


def _quantized_row(c: VectorCode, kind: BlockType, there: str) -> list[str]:
    """Return the 32 numbers of a block in two registers."""
    heads = [c.let(f"fpext half {c.load('half', c.at(there, 2 * j, 'i8'), 2)} to float") for j in range(kind.head // 2)]
    scale, *minimum = (c.everywhere(16, "float", head) for head in heads)
    found = []
    for half in range(2):
        number = c.load("<16 x i8>", c.at(there, kind.head + (16 * half if kind.bits == 8 else 0), "i8"), 1)
        if kind.bits == 4:
            number = c.let(f"{'lshr' if half else 'and'} <16 x i8> {number}, splat (i8 {4 if half else 15})")
            number = c.let(f"sub <16 x i8> {number}, splat (i8 {kind.offset})")
        longer = c.let(f"sext <16 x i8> {number} to <16 x i32>")
        value = c.let(f"fmul {_SIXTEEN} {c.let(f'sitofp <16 x i32> {longer} to {_SIXTEEN}')}, {scale}")
        found.append(c.let(f"fadd {_SIXTEEN} {value}, {minimum[0]}") if minimum else value)
    return found


@cache
def compiled(lanes: int, name: str, cpu: str | None = None) -> Kernel:
    """Return a kernel by its name, as in ``rounded_b8``, ``dot_b8_Q4_1`` or ``rows_Q4_1``.

    Errors are those of :class:`~speckv_online.cpu_engine.kernels.llvm.Library`.
    """
    kernel, _, rest = name.partition("_")
    if kernel == "rows":
        text = rows_of(lanes, rest)
    elif kernel == "dot":
        text = dot(lanes, *rest.split("_", 1))
    else:
        text = {"rounded": rounded, "normed": normed}[kernel](lanes, rest)
    return Library(vector_code.declarations(lanes) + dot_declarations(lanes) + text, cpu).function(name)
