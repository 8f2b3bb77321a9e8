"""The kernel that reads a draft's signals off its logits."""

from __future__ import annotations

from speckv_online.cpu_engine.kernels.int8_blocks import Form
from speckv_online.cpu_engine.kernels.llvm import single
from speckv_online.cpu_engine.kernels.vector import VectorCode


def signals(form: Form) -> str:
    """Return the kernel ``signals(logits, out, scratch, count)`` for one thread: what a draft's signals are made of.

    ``out`` has room for five floats: the largest logit, the second, the row of the first, and with ``e`` the power of
    each logit minus the largest, the sum of ``e`` and that of ``e`` times this difference. ``scratch`` has 3 registers.
    """
    c = VectorCode("signals", form.lanes)
    n, wide, whole, bits = form.lanes, c.wide, c.ints, f"<{form.lanes} x i1>"
    logits, out, scratch, count = (c.argument(i, kind) for i, kind in enumerate(("ptr", "ptr", "ptr", "i64")))
    never = f"splat (float {single(float('-inf'))})"
    best, second, at = c.slot(wide, never), c.slot(wide, never), c.slot(whole, "zeroinitializer")
    with c.loop(0, count, n) as i:
        value, old = c.load(wide, c.at(logits, i, "float"), 4), c.load(wide, best)
        more = c.let(f"fcmp ogt {wide} {value}, {old}")
        loser = c.let(f"select {bits} {more}, {wide} {old}, {wide} {value}")
        c.do(f"store {wide} {c.let(f'select {bits} {more}, {wide} {value}, {wide} {old}')}, ptr {best}")
        c.do(f"store {wide} {c.call('maxnum', c.load(wide, second), loser)}, ptr {second}")
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
        less = c.f("fsub", c.load(wide, c.at(logits, i, "float"), 4), top)
        power = c.power(less)
        c.do(f"store {wide} {c.f('fadd', c.load(wide, sums[0]), power)}, ptr {sums[0]}")
        c.add_product(n, sums[1], power, less)
    found = [c.load("float", first), c.load("float", next_one), c.let(f"sitofp i32 {c.load('i32', row)} to float")]
    for place, value in enumerate([*found, *(c.total(c.load(wide, slot)) for slot in sums)]):
        c.do(f"store float {value}, ptr {c.at(out, place, 'float')}")
    return c.text()
