"""Kernels of a Llama's forward other than its matrices, for the few rows of a step.

They are steps of a :class:`~speckv_online.cpu_engine.kernels.llvm.Program`; argument 3 of each but
:func:`signals` is the number of rows. What a row's results are depends on that row alone, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from speckv_online.cpu_engine.kernels import gguf_blocks as kernels_gguf
from speckv_online.cpu_engine.kernels import int8_blocks as kernels_q8
from speckv_online.cpu_engine.kernels import vector as vector_code
from speckv_online.cpu_engine.kernels.draft_signals import signals
from speckv_online.cpu_engine.kernels.int8_blocks import BLOCK, Form, block_of, linear, norm, round_block
from speckv_online.cpu_engine.kernels.llvm import Kernel, Library
from speckv_online.cpu_engine.kernels.vector import VectorCode, splat

#: The score of a position that there is not.
_NEVER = -1e30
#: A position whose score is so far below the largest has no share.
_SMALLEST = -60.0


def _put(c: VectorCode, form: Form, values: list[str], out: str, row: str, block: str, blocks: str, to: str) -> None:
    """Write a block of a row: rounded, or in fp32, as it is (``float``) or with bf16's values."""
    if to == "i8":
        round_block(c, form, values, block_of(c, form, out, row, block, blocks))
        return
    if to in ("b8", "b16"):
        kernels_gguf.round_block(c, to, values, kernels_gguf.block_of(c, out, row, block, blocks))
        return
    place = c.at(out, c.whole("mul", c.whole("add", c.whole("mul", row, blocks), block), BLOCK), "float")
    for j, value in enumerate(values):
        value = c.bf16(value) if to == "bfloat" else value
        c.do(f"store {c.wide} {value}, ptr {c.at(place, j * form.lanes, 'float')}, align 4")


def add(form: Form) -> str:
    """Return the kernel ``add(x, y, _, rows, inputs)``: ``x += y``."""
    c = VectorCode("add", form.lanes)
    x, y, rows, inputs = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(3), c.argument(4)
    low, high = c.share(c.whole("udiv", c.whole("mul", rows, inputs), form.lanes))
    with c.loop(low, high) as part:
        to, other = (c.at(p, c.whole("mul", part, form.lanes), "float") for p in (x, y))
        total = c.f("fadd", c.load(c.wide, to, 4), c.load(c.wide, other, 4))
        c.do(f"store {c.wide} {total}, ptr {to}, align 4")
    return c.text()


def shorten(form: Form) -> str:
    """Return the kernel ``shorten(x, _, _, rows, inputs)``: fp32 rounded to bf16 in place."""
    c = VectorCode("shorten", form.lanes)
    x, rows, inputs = c.argument(0, "ptr"), c.argument(3), c.argument(4)
    low, high = c.share(c.whole("udiv", c.whole("mul", rows, inputs), form.lanes))
    with c.loop(low, high) as part:
        to = c.at(x, c.whole("mul", part, form.lanes), "float")
        c.do(f"store {c.wide} {c.bf16(c.load(c.wide, to, 4))}, ptr {to}, align 4")
    return c.text()


def embed(form: Form) -> str:
    """Return the kernel ``embed(ids, table, x, rows, inputs)``: rows of a table of shape (..., inputs), fp32."""
    c = VectorCode("embed", form.lanes)
    ids, table, x = (c.argument(i, "ptr") for i in range(3))
    rows, inputs = c.argument(3), c.argument(4)
    low, high = c.share(rows)
    with c.loop(low, high) as row, c.loop(0, inputs, form.lanes) as i:
        of = c.whole("mul", c.load("i64", c.at(ids, row)), inputs)
        value = c.load(c.wide, c.at(table, c.whole("add", of, i), "float"), 4)
        to = c.at(x, c.whole("add", c.whole("mul", row, inputs), i), "float")
        c.do(f"store {c.wide} {value}, ptr {to}, align 4")
    return c.text()


def _place(c: VectorCode, places: str, row: str) -> tuple[str, str]:
    """Return a row's position, and the capacity of its cache."""
    place = c.at(places, c.whole("mul", row, 2))
    return c.load("i64", place), c.load("i64", c.at(place, 1))


def turn(form: Form) -> str:
    """Return the kernel ``turn(y, turns, keys, rows, values, places)``: rotary embedding, and the cache.

    ``y`` of shape (rows, heads + 2 groups, size) holds queries, keys and values; queries are rotated in place, keys are
    rotated into a cache and values copied into one. ``keys`` and ``values`` are for each row the addresses of its own,
    of shape (groups, capacity, size), and ``places`` its position and their capacity, in 64-bit integers. ``turns`` has
    the cosines and the sines of a position, shape (positions, 2, size / 2).
    """
    size, half, together = form.size, form.size // 2, form.heads + 2 * form.groups
    c = VectorCode("turn", form.lanes)
    y, turns, keys = (c.argument(i, "ptr") for i in range(3))
    rows, values, places = c.argument(3), c.argument(4, "ptr"), c.argument(5, "ptr")

    def load(pointer: str, offset: int) -> str:
        return c.load(c.wide, c.at(pointer, offset, "float"), 4)

    def store(value: str, pointer: str, offset: int) -> None:
        c.do(f"store {c.wide} {value}, ptr {c.at(pointer, offset, 'float')}, align 4")

    def rotate(source: str, to: str, angles: str) -> None:
        for j in range(0, half, form.lanes):
            cosine, sine = load(angles, j), load(angles, half + j)
            a, b = load(source, j), load(source, half + j)
            for first, second, sign, offset in ((a, b, "fsub", j), (b, a, "fadd", half + j)):
                products = c.f("fmul", first, cosine), c.f("fmul", second, sine)
                store(c.f(sign, *products), to, offset)

    low, high = c.share(c.whole("mul", rows, together))
    with c.loop(low, high) as unit:
        row, head = c.whole("udiv", unit, together), c.whole("urem", unit, together)
        position, capacity = _place(c, places, row)
        angles = c.at(turns, c.whole("mul", position, size), "float")
        source = c.at(y, c.whole("mul", unit, size), "float")
        with c.when(c.let(f"icmp ult i64 {head}, {form.heads}")):
            rotate(source, source, angles)
        with c.when(c.let(f"icmp uge i64 {head}, {form.heads}")):
            group = c.whole("urem", c.whole("sub", head, form.heads), form.groups)
            place = c.whole("mul", c.whole("add", c.whole("mul", group, capacity), position), size)
            with c.when(c.let(f"icmp ult i64 {head}, {form.heads + form.groups}")):
                rotate(source, c.at(c.load("ptr", c.at(keys, row)), place, "float"), angles)
            with c.when(c.let(f"icmp uge i64 {head}, {form.heads + form.groups}")):
                to = c.at(c.load("ptr", c.at(values, row)), place, "float")
                for j in range(0, size, form.lanes):
                    store(load(source, j), to, j)
    return c.text()


def attend(form: Form, to: str) -> str:
    """Return the kernel ``attend(y, keys, values, rows, places, longest, out, scratch, scale)``: causal attention.

    ``y``, ``keys`` and ``values`` are as :func:`turn` leaves them, ``scale`` is a double's bits; the answers have shape
    (rows, heads * size) and the type ``to``, see :func:`_put`. ``scratch`` has ``heads / groups * longest`` floats for
    each thread, ``longest`` a multiple of 16 that no row's length exceeds.
    """
    c = VectorCode(f"attend_{to}", form.lanes)
    size, lanes, wide, ratio = form.size, form.lanes, c.wide, form.heads // form.groups
    parts = range(0, size, lanes)
    y, keys, values = (c.argument(i, "ptr") for i in range(3))
    rows, places, stride = c.argument(3), c.argument(4, "ptr"), c.argument(5)
    out, scratch = c.argument(6, "ptr"), c.argument(7, "ptr")
    scale = c.everywhere(lanes, "float", c.single(c.argument(8)))
    mine = c.at(scratch, c.whole("mul", c.whole("mul", c.thread(), stride), ratio), "float")
    shares = [c.at(mine, c.whole("mul", stride, h), "float") for h in range(ratio)]
    low, high = c.share(c.whole("mul", rows, form.groups))
    with c.loop(low, high) as unit:
        row, group = c.whole("udiv", unit, form.groups), c.whole("urem", unit, form.groups)
        position, capacity = _place(c, places, row)
        length = c.whole("add", position, 1)
        even = c.whole("mul", c.whole("udiv", c.whole("add", length, lanes - 1), lanes), lanes)
        head = c.whole("mul", group, ratio)
        first_query = c.whole("add", c.whole("mul", row, form.heads + 2 * form.groups), head)
        query = c.at(y, c.whole("mul", first_query, size), "float")
        there = c.whole("mul", c.whole("mul", group, capacity), size)
        key, value = (c.at(c.load("ptr", c.at(p, row)), there, "float") for p in (keys, values))
        least, tops = splat(_NEVER), []
        for h in range(ratio):
            q = [c.f("fmul", c.load(wide, c.at(query, h * size + j, "float"), 4), scale) for j in parts]
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
                    total = c.f("fmul", q[0], k[0])
                    for a, b in zip(q[1:], k[1:], strict=True):
                        total = c.call("fma", a, b, total)
                    totals.append(total)
                found = c.totals(totals)
                if last is not None:
                    left = c.let(f"trunc i64 {c.whole('sub', last, first)} to i32")
                    numbers = ", ".join(f"i32 {lane}" for lane in range(lanes))
                    behind = c.let(f"icmp ugt {c.ints} <{numbers}>, {c.everywhere(lanes, 'i32', left)}")
                    found = c.let(f"select <{lanes} x i1> {behind}, {wide} {least}, {wide} {found}")
                c.do(f"store {wide} {found}, ptr {c.at(shares[h], first, 'float')}, align 4")
                c.do(f"store {wide} {c.call('maxnum', c.load(wide, top), found)}, ptr {top}")

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
                less = c.f("fsub", c.load(wide, place, 4), top)
                # Products of smaller shares would be numbers that processors take hundreds of cycles for.
                some = c.let(f"fcmp ogt {wide} {less}, {splat(_SMALLEST)}")
                share = c.let(f"select <{lanes} x i1> {some}, {wide} {c.power(less)}, {wide} zeroinitializer")
                c.do(f"store {wide} {share}, ptr {place}, align 4")
                c.do(f"store {wide} {c.f('fadd', c.load(wide, weight), share)}, ptr {weight}")
            inverse = c.let(f"fdiv float 1.0, {c.total(c.load(wide, weight))}")
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
            found = [c.f("fmul", c.load(wide, slot), factors[h]) for slot in answers[h]]
            for j in range(0, size, BLOCK):
                at = c.whole("add", block, (h * size + j) // BLOCK)
                blocks = str(form.heads * size // BLOCK)
                _put(c, form, found[j // lanes : (j + BLOCK) // lanes], out, row, at, blocks, to)
    return c.text()


def gate(form: Form, to: str) -> str:
    """Return the kernel ``gate(y, out, inputs, rows)``: ``silu(first half) * second half``.

    ``y`` has shape (rows, 2 inputs), and the answer the type ``to``, see :func:`_put`.
    """
    c = VectorCode(f"gate_{to}", form.lanes)
    y, out, inputs, rows = c.argument(0, "ptr"), c.argument(1, "ptr"), c.argument(2), c.argument(3)
    blocks = c.whole("udiv", inputs, BLOCK)
    low, high = c.share(c.whole("mul", rows, blocks))
    with c.loop(low, high) as unit:
        row, block = c.whole("udiv", unit, blocks), c.whole("urem", unit, blocks)
        first = c.whole("add", c.whole("mul", c.whole("mul", row, inputs), 2), c.whole("mul", block, BLOCK))
        place = c.at(y, first, "float")
        found = []
        for j in range(0, BLOCK, form.lanes):
            x, up = (c.load(c.wide, c.at(p, j, "float"), 4) for p in (place, c.at(place, inputs, "float")))
            bottom = c.f("fadd", c.power(c.let(f"fneg {c.wide} {x}")), splat(1.0))
            found.append(c.f("fmul", c.f("fdiv", x, bottom), up))
        _put(c, form, found, out, row, block, blocks, to)
    return c.text()


_KERNELS: dict[str, Callable[..., str]] = {
    kernel.__name__: kernel for kernel in (embed, norm, linear, turn, attend, gate, add, shorten, signals)
}


@cache
def compiled(form: Form, names: tuple[str, ...], cpu: str | None = None) -> dict[str, Kernel]:
    """Return some kernels by name; a type is part of it, as in ``gate_i8``.

    Errors are those of :class:`~speckv_online.cpu_engine.kernels.llvm.Library`.
    """
    parts = [name.partition("_") for name in names]
    texts = [_KERNELS[kernel](form, *([to] if to else [])) for kernel, _, to in parts]
    declared = vector_code.declarations(form.lanes) + kernels_q8.declarations(form.lanes)
    library = Library(declared + "".join(texts), cpu)
    return {name: library.function(name, parallel=name != "signals") for name in names}
