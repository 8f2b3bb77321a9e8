"""Kernels of a small draft's forward in 8 bits, for the few rows of a step.

They are the steps of a :class:`~speckv_online.jit.Program`; argument 3 of each is the number of rows. Inputs of a
matrix are rounded to 8 bits as weights are, with a scale for each :data:`BLOCK`, as llama.cpp does with GGUF's Q8_0:
products are then whole numbers, and multiplying takes a third of the time. What a row's results are depends on that
row alone, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from speckv_online.jit import Code, Kernel, Library, features, single
from speckv_online.kernels import SCALED, round_to_8_bits

#: So many inputs have one scale.
BLOCK = SCALED

#: e ** x: 1 / ln 2, ln 2 in two parts, and the polynomial of Cephes' expf.
_LOG2_E, _LN2 = 1.44269504088896341, (0.693359375, -2.12194440e-4)
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LEAST, _MOST = -87.0, 88.0
#: The score of a position that there is not.
_NEVER = -1e30
#: A position whose score is so far below the largest has no share.
_SMALLEST = -60.0


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

    @property
    def wide(self) -> str:
        """A register of floats."""
        return f"<{self.lanes} x float>"

    @property
    def whole(self) -> str:
        """A register of 32-bit integers."""
        return f"<{self.lanes} x i32>"


def lanes() -> int | None:
    """Return how many floats this processor's registers hold; None where there are no kernels for it."""
    found = features()
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= found:
        return 16
    return 8 if {"avx2", "fma", "f16c"} <= found else None


def check_ids(ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError unless all token ids, shape (n,), are rows of an embedding: kernels do not look."""
    numbers = ids.tolist()
    if min(numbers) < 0 or max(numbers) >= rows:
        raise IndexError(f"token ids from {min(numbers)} to {max(numbers)}, the model has {rows}")


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
    numbers, scales = round_to_8_bits(weight)
    outputs, blocks = scales.shape[:2]
    together = 4 if width == 16 else 2
    parts = (numbers + 128.0).to(torch.uint8).view(outputs // width, width, blocks, BLOCK // together, together)
    return (
        parts.permute(0, 2, 3, 1, 4).contiguous(),
        scales.view(outputs // width, width, blocks).transpose(1, 2).half().contiguous(),
    )


def _splat(number: float) -> str:
    return f"splat (float {single(number)})"


def _binary(c: Code, form: Form, operation: str, a: str, b: str) -> str:
    return c.let(f"{operation} {form.wide} {a}, {b}")


def _call(c: Code, form: Form, name: str, *values: str) -> str:
    listed = ", ".join(f"{form.wide} {value}" for value in values)
    return c.let(f"call {form.wide} @llvm.{name}.v{form.lanes}f32({listed})")


def _total(c: Code, form: Form, value: str) -> str:
    return c.let(f"call reassoc float @llvm.vector.reduce.fadd.v{form.lanes}f32(float 0.0, {form.wide} {value})")


def _totals(c: Code, form: Form, values: list[str]) -> str:
    """Return a register with the sums of as many registers as it has lanes: of neighbours, then pairs, and so on."""
    many = f"<{form.lanes} x i32>"
    while len(values) > 1:
        pairs = []
        for a, b in zip(values[::2], values[1::2], strict=True):
            halves = []
            for odd in (0, 1):
                picked = ", ".join(f"i32 {i}" for i in range(odd, 2 * form.lanes, 2))
                halves.append(c.let(f"shufflevector {form.wide} {a}, {form.wide} {b}, {many} <{picked}>"))
            pairs.append(_binary(c, form, "fadd", *halves))
        values = pairs
    return values[0]


def _power(c: Code, form: Form, x: str) -> str:
    """Return e ** x."""
    x = _call(c, form, "minnum", _call(c, form, "maxnum", x, _splat(_LEAST)), _splat(_MOST))
    n = _call(c, form, "rint", _binary(c, form, "fmul", x, _splat(_LOG2_E)))
    for part in _LN2:
        x = _call(c, form, "fma", n, _splat(-part), x)
    y = _splat(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        y = _call(c, form, "fma", y, x, _splat(coefficient))
    y = _call(c, form, "fma", y, _binary(c, form, "fmul", x, x), _binary(c, form, "fadd", x, _splat(1.0)))
    exponent = c.let(f"add {form.whole} {c.let(f'fptosi {form.wide} {n} to {form.whole}')}, splat (i32 127)")
    bits = c.let(f"shl {form.whole} {exponent}, splat (i32 23)")
    return _binary(c, form, "fmul", y, c.let(f"bitcast {form.whole} {bits} to {form.wide}"))


def _round(c: Code, form: Form, values: list[str], numbers: str) -> None:
    """Round a block of inputs: its numbers, its scale and, for :func:`linear`, -128 times the sum of its numbers."""
    size, correction = (c.at(numbers, BLOCK * form.bytes + offset, "i8") for offset in (0, 4))
    most = _call(c, form, "fabs", values[0])
    for value in values[1:]:
        most = _call(c, form, "maxnum", most, _call(c, form, "fabs", value))
    top = c.let(f"call float @llvm.vector.reduce.fmax.v{form.lanes}f32({form.wide} {most})")
    some = c.let(f"fcmp ogt float {top}, 0.0")
    inverse = c.let(f"select i1 {some}, float {c.let(f'fdiv float 127.0, {top}')}, float 0.0")
    factor, total = c.everywhere(form.lanes, "float", inverse), "zeroinitializer"
    kind = f"<{form.lanes} x i{8 * form.bytes}>"
    for place, value in enumerate(values):
        even = _call(c, form, "rint", _binary(c, form, "fmul", value, factor))
        number = c.let(f"fptosi {form.wide} {even} to {form.whole}")
        total = c.let(f"add {form.whole} {total}, {number}")
        short = c.let(f"trunc {form.whole} {number} to {kind}")
        c.do(f"store {kind} {short}, ptr {c.at(numbers, place * form.lanes * form.bytes, 'i8')}, align 1")
    c.do(f"store float {c.let(f'fmul float {top}, {single(1 / 127)}')}, ptr {size}")
    added = c.let(f"call i32 @llvm.vector.reduce.add.v{form.lanes}i32({form.whole} {total})")
    c.do(f"store i32 {c.let(f'mul i32 {added}, -128')}, ptr {correction}")


def _block(c: Code, form: Form, numbers: str, row: str, block: str, blocks: str) -> str:
    """Return where a row's block of rounded inputs is, of so many blocks."""
    part, rest = (c.whole(operation, row, form.rows) for operation in ("udiv", "urem"))
    before = c.whole("add", c.whole("mul", part, blocks), block)
    index = c.whole("add", c.whole("mul", before, form.rows), rest)
    return c.at(numbers, c.whole("mul", index, form.stride), "i8")


def _put(c: Code, form: Form, values: list[str], out: str, row: str, block: str, blocks: str, to: str) -> None:
    """Write a block of a row: rounded to 8 bits, or as fp32, as it is (``float``) or rounded to bf16 (``bfloat``)."""
    if to == "i8":
        _round(c, form, values, _block(c, form, out, row, block, blocks))
        return
    place = c.at(out, c.whole("mul", c.whole("add", c.whole("mul", row, blocks), block), BLOCK), "float")
    for j, value in enumerate(values):
        if to == "bfloat":
            short = f"<{form.lanes} x bfloat>"
            value = c.let(f"fpext {short} {c.let(f'fptrunc {form.wide} {value} to {short}')} to {form.wide}")
        c.do(f"store {form.wide} {value}, ptr {c.at(place, j * form.lanes, 'float')}, align 4")


def _single(c: Code, bits: str) -> str:
    """Return a double's bits as a float."""
    return c.let(f"fptrunc double {c.let(f'bitcast i64 {bits} to double')} to float")


def add(form: Form) -> str:
    """Return the kernel ``add(x, y, _, rows, inputs)``: ``x += y``."""
    c = Code("add")
    x, y, rows, inputs = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(3), c.argument(4)
    low, high = c.share(c.whole("udiv", c.whole("mul", rows, inputs), form.lanes))
    with c.loop(low, high) as part:
        to, other = (c.at(p, c.whole("mul", part, form.lanes), "float") for p in (x, y))
        total = _binary(c, form, "fadd", c.load(form.wide, to, 4), c.load(form.wide, other, 4))
        c.do(f"store {form.wide} {total}, ptr {to}, align 4")
    return c.text()


def shorten(form: Form) -> str:
    """Return the kernel ``shorten(x, _, _, rows, inputs)``: fp32 rounded to bf16 in place."""
    c = Code("shorten")
    x, rows, inputs = c.argument(0, "ptr"), c.argument(3), c.argument(4)
    short = f"<{form.lanes} x bfloat>"
    low, high = c.share(c.whole("udiv", c.whole("mul", rows, inputs), form.lanes))
    with c.loop(low, high) as part:
        to = c.at(x, c.whole("mul", part, form.lanes), "float")
        value = c.let(f"fptrunc {form.wide} {c.load(form.wide, to, 4)} to {short}")
        c.do(f"store {form.wide} {c.let(f'fpext {short} {value} to {form.wide}')}, ptr {to}, align 4")
    return c.text()


def embed(form: Form) -> str:
    """Return the kernel ``embed(ids, table, x, rows, inputs)``: rows of a table of shape (..., inputs), fp32."""
    c = Code("embed")
    ids, table, x = (c.argument(i, "ptr") for i in range(3))
    rows, inputs = c.argument(3), c.argument(4)
    low, high = c.share(rows)
    with c.loop(low, high) as row, c.loop(0, inputs, form.lanes) as i:
        of = c.whole("mul", c.load("i64", c.at(ids, row)), inputs)
        value = c.load(form.wide, c.at(table, c.whole("add", of, i), "float"), 4)
        to = c.at(x, c.whole("add", c.whole("mul", row, inputs), i), "float")
        c.do(f"store {form.wide} {value}, ptr {to}, align 4")
    return c.text()


def norm(form: Form) -> str:
    """Return the kernel ``norm(x, numbers, eps, rows, inputs)``: an RMS norm without weights, rounded.

    ``x`` is fp32 of shape (rows, inputs), ``eps`` a double's bits, ``numbers`` as of :meth:`Form.inputs`.
    """
    c = Code("norm")
    x, numbers, rows, inputs = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(3), c.argument(4)
    blocks = c.whole("udiv", inputs, BLOCK)
    eps = _single(c, c.argument(2))
    length = c.let(f"sitofp i64 {inputs} to float")
    low, high = c.share(rows)
    with c.loop(low, high) as row:
        start, squares = c.whole("mul", row, inputs), c.slot(form.wide, "zeroinitializer")
        with c.loop(0, inputs, form.lanes) as i:
            value = c.load(form.wide, c.at(x, c.whole("add", start, i), "float"), 4)
            c.add_product(form.lanes, squares, value, value)
        mean = c.let(f"fdiv float {_total(c, form, c.load(form.wide, squares))}, {length}")
        root = c.let(f"call float @llvm.sqrt.f32(float {c.let(f'fadd float {mean}, {eps}')})")
        factor = c.everywhere(form.lanes, "float", c.let(f"fdiv float 1.0, {root}"))
        with c.loop(0, blocks) as block:
            place = c.at(x, c.whole("add", start, c.whole("mul", block, BLOCK)), "float")
            values = [c.load(form.wide, c.at(place, j, "float"), 4) for j in range(0, BLOCK, form.lanes)]
            normed = [_binary(c, form, "fmul", value, factor) for value in values]
            _round(c, form, normed, _block(c, form, numbers, row, block, blocks))
    return c.text()


def linear(form: Form) -> str:
    """Return the kernel ``linear(numbers, weights, out, rows, inputs, outputs, scales, add)``.

    ``out`` of shape (rows, outputs), fp32, becomes the product of the rounded inputs and weights, or where ``add`` is 1
    has it added to it. ``numbers`` are as of :meth:`Form.inputs`; :func:`lay_out` gives weights and scales.
    """
    lanes, wide, whole, together = form.lanes, form.wide, form.whole, 4 // form.bytes
    size = lanes * together  # bytes of weights that one instruction takes
    c = Code("linear")
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
            start = _block(c, form, x, done, "0", blocks)
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
                    factor = _binary(c, form, "fmul", scale, number(row, BLOCK * form.bytes, "float"))
                    c.add_product(lanes, totals[row], c.let(f"sitofp {whole} {total} to {wide}"), factor)
            for row in range(count):
                at = c.whole("add", c.whole("mul", c.whole("add", done, row), outputs), feature)
                to = c.at(out, at, "float")
                old = c.let(f"select i1 {add}, {wide} {c.load(wide, to, 4)}, {wide} zeroinitializer")
                c.do(f"store {wide} {_binary(c, form, 'fadd', old, c.load(wide, totals[row]))}, ptr {to}, align 4")

        c.chunks(rows, form.rows, some)
    return c.text()


def _dot(c: Code, form: Form, total: str, weight: str, x: str) -> str:
    """Add the products of each lane's unsigned weights and signed inputs to a register of 32-bit integers."""
    whole = form.whole
    if form.lanes == 16:
        weight = c.let(f"bitcast <64 x i8> {weight} to {whole}")
        return c.let(f"call {whole} @llvm.x86.avx512.vpdpbusd.512({whole} {total}, {whole} {weight}, {whole} {x})")
    longer, pairs = c.let(f"zext <16 x i8> {weight} to <16 x i16>"), c.let(f"bitcast {whole} {x} to <16 x i16>")
    product = c.let(f"call {whole} @llvm.x86.avx2.pmadd.wd(<16 x i16> {longer}, <16 x i16> {pairs})")
    return c.let(f"add {whole} {total}, {product}")


def turn(form: Form) -> str:
    """Return the kernel ``turn(y, turns, keys, rows, values, start, capacity)``: rotary embedding, and the cache.

    ``y`` of shape (rows, heads + 2 groups, size) holds queries, keys and values; queries are rotated in place, keys are
    rotated into ``keys`` and values copied into ``values``, both of shape (groups, capacity, size), from position
    ``start`` on. ``turns`` has the cosines and the sines of a position, shape (positions, 2, size / 2).
    """
    size, half, together = form.size, form.size // 2, form.heads + 2 * form.groups
    c = Code("turn")
    y, turns, keys = (c.argument(i, "ptr") for i in range(3))
    rows, values, start, capacity = c.argument(3), c.argument(4, "ptr"), c.argument(5), c.argument(6)

    def load(pointer: str, offset: int) -> str:
        return c.load(form.wide, c.at(pointer, offset, "float"), 4)

    def store(value: str, pointer: str, offset: int) -> None:
        c.do(f"store {form.wide} {value}, ptr {c.at(pointer, offset, 'float')}, align 4")

    def rotate(source: str, to: str, angles: str) -> None:
        for j in range(0, half, form.lanes):
            cosine, sine = load(angles, j), load(angles, half + j)
            a, b = load(source, j), load(source, half + j)
            for first, second, sign, offset in ((a, b, "fsub", j), (b, a, "fadd", half + j)):
                products = _binary(c, form, "fmul", first, cosine), _binary(c, form, "fmul", second, sine)
                store(_binary(c, form, sign, *products), to, offset)

    low, high = c.share(c.whole("mul", rows, together))
    with c.loop(low, high) as unit:
        row, head = c.whole("udiv", unit, together), c.whole("urem", unit, together)
        position = c.whole("add", start, row)
        angles = c.at(turns, c.whole("mul", position, size), "float")
        source = c.at(y, c.whole("mul", unit, size), "float")
        with c.when(c.let(f"icmp ult i64 {head}, {form.heads}")):
            rotate(source, source, angles)
        with c.when(c.let(f"icmp uge i64 {head}, {form.heads}")):
            group = c.whole("urem", c.whole("sub", head, form.heads), form.groups)
            place = c.whole("mul", c.whole("add", c.whole("mul", group, capacity), position), size)
            with c.when(c.let(f"icmp ult i64 {head}, {form.heads + form.groups}")):
                rotate(source, c.at(keys, place, "float"), angles)
            with c.when(c.let(f"icmp uge i64 {head}, {form.heads + form.groups}")):
                to = c.at(values, place, "float")
                for j in range(0, size, form.lanes):
                    store(load(source, j), to, j)
    return c.text()


def attend(form: Form, to: str = "i8") -> str:
    """Return the kernel ``attend(y, keys, values, rows, start, capacity, out, scratch, scale)``: causal attention.

    ``y``, ``keys`` and ``values`` are as :func:`turn` leaves them, ``scale`` is a double's bits; the answers have shape
    (rows, heads * size) and the type ``to``, see :func:`_put`. ``scratch`` has ``heads / groups * capacity`` floats for
    each thread, capacity rounded up to 16.
    """
    size, lanes, wide, ratio = form.size, form.lanes, form.wide, form.heads // form.groups
    parts = range(0, size, lanes)
    c = Code(f"attend_{to}")
    y, keys, values = (c.argument(i, "ptr") for i in range(3))
    rows, start, capacity = c.argument(3), c.argument(4), c.argument(5)
    out, scratch = c.argument(6, "ptr"), c.argument(7, "ptr")
    scale = c.everywhere(lanes, "float", _single(c, c.argument(8)))
    stride = c.whole("mul", c.whole("udiv", c.whole("add", capacity, 15), 16), 16)
    mine = c.at(scratch, c.whole("mul", c.whole("mul", c.thread(), stride), ratio), "float")
    shares = [c.at(mine, c.whole("mul", stride, h), "float") for h in range(ratio)]
    low, high = c.share(c.whole("mul", rows, form.groups))
    with c.loop(low, high) as unit:
        row, group = c.whole("udiv", unit, form.groups), c.whole("urem", unit, form.groups)
        length = c.whole("add", c.whole("add", start, row), 1)
        even = c.whole("mul", c.whole("udiv", c.whole("add", length, lanes - 1), lanes), lanes)
        head = c.whole("mul", group, ratio)
        first_query = c.whole("add", c.whole("mul", row, form.heads + 2 * form.groups), head)
        query = c.at(y, c.whole("mul", first_query, size), "float")
        there = c.whole("mul", c.whole("mul", group, capacity), size)
        key, value = c.at(keys, there, "float"), c.at(values, there, "float")
        least, tops = _splat(_NEVER), []
        for h in range(ratio):
            q = [_binary(c, form, "fmul", c.load(wide, c.at(query, h * size + j, "float"), 4), scale) for j in parts]
            top = c.slot(wide, least)

            def scores(first: str, last: str | None, h: int = h, q: list[str] = q, top: str = top) -> None:
                """Those of as many positions as a register has; with ``last``, some of them are behind it."""
                totals = []
                for lane in range(lanes):
                    at = c.whole("add", first, lane)
                    if last is not None:
                        at = c.let(f"call i64 @llvm.umin.i64(i64 {at}, i64 {last})")
                    place = c.at(key, c.whole("mul", at, size), "float")
                    k = [c.load(wide, c.at(place, j, "float"), 4) for j in parts]
                    total = _binary(c, form, "fmul", q[0], k[0])
                    for a, b in zip(q[1:], k[1:], strict=True):
                        total = _call(c, form, "fma", a, b, total)
                    totals.append(total)
                found = _totals(c, form, totals)
                if last is not None:
                    left = c.let(f"trunc i64 {c.whole('sub', last, first)} to i32")
                    numbers = ", ".join(f"i32 {lane}" for lane in range(lanes))
                    behind = c.let(f"icmp ugt {form.whole} <{numbers}>, {c.everywhere(lanes, 'i32', left)}")
                    found = c.let(f"select <{lanes} x i1> {behind}, {wide} {least}, {wide} {found}")
                c.do(f"store {wide} {found}, ptr {c.at(shares[h], first, 'float')}, align 4")
                c.do(f"store {wide} {_call(c, form, 'maxnum', c.load(wide, top), found)}, ptr {top}")

            full = c.whole("mul", c.whole("udiv", length, lanes), lanes)
            with c.loop(0, full, lanes) as t:
                scores(t, None)
            with c.loop(full, length, lanes) as t:
                scores(t, c.whole("sub", length, 1))
            most = c.load(wide, top)
            tops.append(c.let(f"call float @llvm.vector.reduce.fmax.v{lanes}f32({wide} {most})"))
        factors = []
        for h in range(ratio):
            top, weight = c.everywhere(lanes, "float", tops[h]), c.slot(wide, "zeroinitializer")
            with c.loop(0, even, lanes) as t:
                place = c.at(shares[h], t, "float")
                less = _binary(c, form, "fsub", c.load(wide, place, 4), top)
                # Products of smaller shares would be numbers that processors take hundreds of cycles for.
                some = c.let(f"fcmp ogt {wide} {less}, {_splat(_SMALLEST)}")
                share = c.let(f"select <{lanes} x i1> {some}, {wide} {_power(c, form, less)}, {wide} zeroinitializer")
                c.do(f"store {wide} {share}, ptr {place}, align 4")
                c.do(f"store {wide} {_binary(c, form, 'fadd', c.load(wide, weight), share)}, ptr {weight}")
            inverse = c.let(f"fdiv float 1.0, {_total(c, form, c.load(wide, weight))}")
            factors.append(c.everywhere(lanes, "float", inverse))
        answers = [[c.slot(wide, "zeroinitializer") for _ in parts] for _ in range(ratio)]
        with c.loop(0, length) as t:
            place = c.at(value, c.whole("mul", t, size), "float")
            v = [c.load(wide, c.at(place, j, "float"), 4) for j in parts]
            for h in range(ratio):
                share = c.everywhere(lanes, "float", c.load("float", c.at(shares[h], t, "float")))
                for j, part in enumerate(v):
                    c.add_product(lanes, answers[h][j], part, share)
        block = c.whole("mul", head, size // BLOCK)
        for h in range(ratio):
            found = [_binary(c, form, "fmul", c.load(wide, slot), factors[h]) for slot in answers[h]]
            for j in range(0, size, BLOCK):
                at = c.whole("add", block, (h * size + j) // BLOCK)
                blocks = str(form.heads * size // BLOCK)
                _put(c, form, found[j // lanes : (j + BLOCK) // lanes], out, row, at, blocks, to)
    return c.text()


def gate(form: Form, to: str = "i8") -> str:
    """Return the kernel ``gate(y, out, inputs, rows)``: ``silu(first half) * second half``.

    ``y`` has shape (rows, 2 inputs), and the answer the type ``to``, see :func:`_put`.
    """
    c = Code(f"gate_{to}")
    y, out, inputs, rows = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(2), c.argument(3)
    blocks = c.whole("udiv", inputs, BLOCK)
    low, high = c.share(c.whole("mul", rows, blocks))
    with c.loop(low, high) as unit:
        row, block = c.whole("udiv", unit, blocks), c.whole("urem", unit, blocks)
        first = c.whole("add", c.whole("mul", c.whole("mul", row, inputs), 2), c.whole("mul", block, BLOCK))
        place = c.at(y, first, "float")
        found = []
        for j in range(0, BLOCK, form.lanes):
            x, up = (c.load(form.wide, c.at(p, j, "float"), 4) for p in (place, c.at(place, inputs, "float")))
            bottom = _binary(c, form, "fadd", _power(c, form, c.let(f"fneg {form.wide} {x}")), _splat(1.0))
            found.append(_binary(c, form, "fmul", _binary(c, form, "fdiv", x, bottom), up))
        _put(c, form, found, out, row, block, blocks, to)
    return c.text()


def look(form: Form) -> str:
    """Return the kernel ``look(logits, out, scratch, count)`` for one thread: what a draft's signals are made of.

    ``out`` has room for five floats: the largest logit, the second, the row of the first, and with ``e`` the power of
    each logit minus the largest, the sum of ``e`` and that of ``e`` times this difference. ``scratch`` has 3 registers.
    """
    n, wide, whole, bits = form.lanes, form.wide, form.whole, f"<{form.lanes} x i1>"
    c = Code("look")
    logits, out, scratch, count = (c.argument(i, kind) for i, kind in enumerate(("ptr", "ptr", "ptr", "i64")))
    never = f"splat (float {single(float('-inf'))})"
    best, second, at = c.slot(wide, never), c.slot(wide, never), c.slot(whole, "zeroinitializer")
    with c.loop(0, count, n) as i:
        value, old = c.load(wide, c.at(logits, i, "float"), 4), c.load(wide, best)
        more = c.let(f"fcmp ogt {wide} {value}, {old}")
        loser = c.let(f"select {bits} {more}, {wide} {old}, {wide} {value}")
        c.do(f"store {wide} {c.let(f'select {bits} {more}, {wide} {value}, {wide} {old}')}, ptr {best}")
        c.do(f"store {wide} {_call(c, form, 'maxnum', c.load(wide, second), loser)}, ptr {second}")
        here = c.everywhere(n, "i32", c.let(f"trunc i64 {i} to i32"))
        c.do(f"store {whole} {c.let(f'select {bits} {more}, {whole} {here}, {whole} {c.load(whole, at)}')}, ptr {at}")
    for place, (kind, slot) in enumerate(((wide, best), (wide, second), (whole, at))):
        c.do(f"store {kind} {c.load(kind, slot)}, ptr {c.at(scratch, place * n, 'float')}, align 4")
    first, next_one = (c.slot("float", single(float("-inf"))) for _ in range(2))
    row = c.slot("i32", str(1 << 30))
    with c.loop(0, n) as lane:
        a, b = (c.load("float", c.at(c.at(scratch, place * n, "float"), lane, "float")) for place in range(2))
        number = c.load("i32", c.at(c.at(scratch, 2 * n, "float"), lane, "i32"))
        number = c.let(f"add i32 {number}, {c.let(f'trunc i64 {lane} to i32')}")
        old, before = c.load("float", first), c.load("i32", row)
        for value in (b, c.let(f"call float @llvm.minnum.f32(float {a}, float {old})")):
            top = c.let(f"call float @llvm.maxnum.f32(float {c.load('float', next_one)}, float {value})")
            c.do(f"store float {top}, ptr {next_one}")
        more, same = (c.let(f"fcmp {how} float {a}, {old}") for how in ("ogt", "oeq"))
        earlier = c.let(f"and i1 {same}, {c.let(f'icmp slt i32 {number}, {before}')}")
        take = c.let(f"or i1 {more}, {earlier}")
        c.do(f"store i32 {c.let(f'select i1 {take}, i32 {number}, i32 {before}')}, ptr {row}")
        c.do(f"store float {c.let(f'select i1 {more}, float {a}, float {old}')}, ptr {first}")
    top, sums = c.everywhere(n, "float", c.load("float", first)), [c.slot(wide, "zeroinitializer") for _ in range(2)]
    with c.loop(0, count, n) as i:
        less = _binary(c, form, "fsub", c.load(wide, c.at(logits, i, "float"), 4), top)
        power = _power(c, form, less)
        c.do(f"store {wide} {_binary(c, form, 'fadd', c.load(wide, sums[0]), power)}, ptr {sums[0]}")
        c.add_product(n, sums[1], power, less)
    found = [c.load("float", first), c.load("float", next_one), c.let(f"sitofp i32 {c.load('i32', row)} to float")]
    for place, value in enumerate([*found, *(_total(c, form, c.load(wide, slot)) for slot in sums)]):
        c.do(f"store float {value}, ptr {c.at(out, place, 'float')}")
    return c.text()


def _declarations(form: Form) -> str:
    n, wide, whole = form.lanes, form.wide, form.whole
    ones = "".join(f"declare {wide} @llvm.{name}.v{n}f32({wide})\n" for name in ("fabs", "rint"))
    twos = "".join(f"declare {wide} @llvm.{name}.v{n}f32({wide}, {wide})\n" for name in ("maxnum", "minnum"))
    return (
        ones
        + twos
        + (
            f"declare float @llvm.vector.reduce.fmax.v{n}f32({wide})\n"
            f"declare i32 @llvm.vector.reduce.add.v{n}i32({whole})\n"
            "declare float @llvm.sqrt.f32(float)\n"
            "declare float @llvm.maxnum.f32(float, float)\n"
            "declare float @llvm.minnum.f32(float, float)\n"
        )
        + (
            f"declare {whole} @llvm.x86.avx512.vpdpbusd.512({whole}, {whole}, {whole})\n"
            if n == 16
            else f"declare {whole} @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)\n"
        )
    )


@cache
def compiled(form: Form, types: tuple[str, ...] = ("i8",), cpu: str | None = None) -> dict[str, Kernel]:
    """Return the kernels by name; those for each of some types are called after it, as ``gate_i8``.

    Errors are those of :class:`~speckv_online.jit.Library`.
    """
    plain: list[Callable[[Form], str]] = [embed, norm, linear, turn, add, shorten, look]
    texts = {kernel.__name__: kernel(form) for kernel in plain}
    texts |= {f"{kernel.__name__}_{to}": kernel(form, to) for kernel in (attend, gate) for to in types}
    library = Library(_declarations(form) + "".join(texts.values()), cpu)
    return {name: library.function(name, parallel=name != "look") for name in texts}
