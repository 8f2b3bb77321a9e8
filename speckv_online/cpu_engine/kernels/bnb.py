"""Kernels with the arithmetic of bitsandbytes' layers on a CPU, for the few rows of a verification.

Results have the same bits as bitsandbytes', in less time; see :mod:`speckv_online.cpu_engine.kernels.linear` for how,
and :mod:`speckv_online.cpu_engine.bnb_layers` for where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from time import perf_counter

import numpy as np
import torch

from speckv_online.cpu_engine.kernels.linear import FAR, FEW
from speckv_online.cpu_engine.kernels.llvm import Code, Kernel, Library, features, single

#: Most rows that meet a weight at once.
_ROWS = 12
#: Output features that are read together by :func:`int8`, and inputs of each at once.
FEATURES, INPUTS = 32, 4
#: What LLM.int8 multiplies by in bitsandbytes: 1 / 127 squared (its literal is one zero short).
BOTH = 6.200124e-05
#: 1 / 127, as bitsandbytes has it.
ONE = 7.874015718698502e-3


def four_bit(pairs: bool) -> str:
    """Return the kernel ``four_bit(x, weights, out, rows, inputs, outputs, scales, block, codes)``.

    The results have the same bits as those of bitsandbytes' own kernel for AVX-512 BF16: there, pairs of products of
    bf16 are summed in fp32 over a block of weights, then multiplied by the block's scale, and in the end rounded to
    bf16. As a product of two bf16 is exact in fp32, two multiply-adds sum a pair just so, the second product first.
    They take half the time of the processor's instruction for ``pairs`` on one processor and twice that on another, so
    both ways are here. Bitsandbytes' kernel also takes at most four rows at once, and this one more.

    ``x`` is fp32 with bf16's values, ``out`` fp32, ``weights`` as bitsandbytes packs them for its kernel (32 output
    features together, of two inputs each; the last 16 in the upper halves of the bytes), ``scales`` bf16 of shape
    (inputs / block, outputs), ``codes`` 16 values in fp32.
    """
    wide, whole, shorts, halves, parts = "<16 x float>", "<16 x i32>", "<32 x i16>", "<32 x bfloat>", range(2)
    c = Code("four_bit")
    x, weights, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    scales, size, codes = c.argument(6, "ptr"), c.argument(7), c.argument(8, "ptr")
    table = c.load(wide, codes, 4)
    half, width = c.whole("udiv", inputs, 2), c.whole("udiv", size, 2)
    twice = c.let(
        f"shufflevector <16 x i16> {c.upper(c.let(f'bitcast {wide} {table} to {whole}'))}, <16 x i16> poison, "
        f"<32 x i32> <{', '.join(f'i32 {i % 16}' for i in range(32))}>"
    )
    # Where inputs lie in bf16, for pairs.
    short = c.let(f"alloca i16, i64 {c.whole('mul', inputs, _ROWS)}, align 64") if pairs else ""

    def look_up(nibbles: str) -> list[str]:
        """The weights of 16 output features for the first and the second of two inputs, or for both at once."""
        longer = c.let(f"zext <32 x i8> {nibbles} to {shorts}")
        if pairs:
            found = c.let(f"call {shorts} @llvm.x86.avx512.permvar.hi.512({shorts} {twice}, {shorts} {longer})")
            return [c.let(f"bitcast {shorts} {found} to {halves}")]
        first = c.let(f"bitcast {shorts} {longer} to {whole}")
        second = c.let(f"lshr {whole} {first}, splat (i32 16)")
        return [
            c.let(f"call {wide} @llvm.x86.avx512.permvar.sf.512({wide} {table}, {whole} {index})")
            for index in (first, second)
        ]

    def shorten(done: str, count: int) -> None:
        with c.loop(0, c.whole("mul", inputs, count), 16) as i:
            at = c.whole("add", c.whole("mul", done, inputs), i)
            upper = c.upper(c.load(whole, c.at(x, at, "float"), 4))
            c.do(f"store <16 x i16> {upper}, ptr {c.at(short, i, 'i16')}, align 32")

    low, high = c.share(c.whole("udiv", outputs, 32))
    with c.loop(low, high) as part:
        feature = c.whole("mul", part, 32)
        there = c.at(weights, c.whole("mul", feature, half), "i8")

        def some(done: str, count: int) -> None:
            if pairs:
                shorten(done, count)
            totals = [[c.slot(wide, "zeroinitializer") for _ in parts] for _ in range(count)]
            with c.loop(0, half, width) as start:
                sums = [[c.slot(wide, "zeroinitializer") for _ in parts] for _ in range(count)]
                with c.loop(start, c.whole("add", start, width)) as pair:
                    place = c.at(there, c.whole("mul", pair, 32), "i8")
                    c.fetch(place, 32)
                    both = c.load("<32 x i8>", place, 1)
                    lower = c.let(f"and <32 x i8> {both}, splat (i8 15)")
                    upper = c.let(f"lshr <32 x i8> {both}, splat (i8 4)")
                    w = [look_up(lower), look_up(upper)]
                    for row in range(count):
                        if pairs:
                            at = c.whole("add", c.whole("mul", inputs, row), c.whole("mul", pair, 2))
                            value = c.everywhere(16, "i32", c.load("i32", c.at(short, at, "i16"), 4))
                            value = c.let(f"bitcast {whole} {value} to {halves}")
                            for p in parts:
                                old = c.load(wide, sums[row][p])
                                given = f"{wide} {old}, {halves} {w[p][0]}, {halves} {value}"
                                new = c.let(f"call {wide} @llvm.x86.avx512bf16.dpbf16ps.512({given})")
                                c.do(f"store {wide} {new}, ptr {sums[row][p]}")
                            continue
                        at = c.whole("add", c.whole("mul", c.whole("add", done, row), inputs), c.whole("mul", pair, 2))
                        for second in (1, 0):
                            value = c.everywhere(
                                16, "float", c.load("float", c.at(c.at(x, at, "float"), second, "float"))
                            )
                            for p in parts:
                                c.add_product(16, sums[row][p], w[p][second], value)
                of = c.whole("add", c.whole("mul", c.whole("udiv", start, width), outputs), feature)
                for p in parts:
                    of_block = c.load("<16 x bfloat>", c.at(c.at(scales, of, "i16"), 16 * p, "i16"), 2)
                    scale = c.let(f"fpext <16 x bfloat> {of_block} to {wide}")
                    for row in range(count):
                        c.add_product(16, totals[row][p], c.load(wide, sums[row][p]), scale)
            for row in range(count):
                to = c.at(out, c.whole("add", c.whole("mul", c.whole("add", done, row), outputs), feature), "float")
                for p in parts:
                    total = c.load(wide, totals[row][p])
                    rounded = c.let(f"fptrunc {wide} {total} to <16 x bfloat>")
                    again = c.let(f"fpext <16 x bfloat> {rounded} to {wide}")
                    c.do(f"store {wide} {again}, ptr {c.at(to, 16 * p, 'float')}, align 4")

        c.chunks(rows, _ROWS, some)
    return c.text()


def int8() -> str:
    """Return the kernel ``int8(numbers, weights, out, rows, inputs, outputs, tops, sizes, sums)``.

    ``out = ((numbers - 128) @ weights.T) * (tops * sizes) * BOTH`` in fp32, in this order, with the product in whole
    numbers: LLM.int8 without outliers.

    ``numbers`` are unsigned bytes, ``weights`` signed ones as :func:`lay_out_int8` has them, ``tops`` fp32 of shape
    (rows,), ``sizes`` fp32 of shape (outputs,), ``sums`` 128 times the sum of a row of weights, int32.
    """
    wide, whole, parts = "<16 x float>", "<16 x i32>", range(FEATURES // 16)
    c = Code("int8")
    x, weights, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    tops, sizes, sums = (c.argument(i, "ptr") for i in range(6, 9))
    low, high = c.share(c.whole("udiv", outputs, FEATURES))
    with c.loop(low, high) as part:
        feature = c.whole("mul", part, FEATURES)
        there = c.at(weights, c.whole("mul", feature, inputs), "i8")

        def some(done: str, count: int) -> None:
            totals = [[c.slot(whole, "zeroinitializer") for _ in parts] for _ in range(count)]
            with c.loop(0, inputs, INPUTS) as i:
                place = c.at(there, c.whole("mul", i, FEATURES), "i8")
                c.fetch(place, FEATURES * INPUTS, None if count <= FEW else FAR)
                w = [c.load(whole, c.at(place, 16 * INPUTS * p, "i8"), 1) for p in parts]
                for row in range(count):
                    at = c.whole("add", c.whole("mul", c.whole("add", done, row), inputs), i)
                    value = c.everywhere(16, "i32", c.load("i32", c.at(x, at, "i8"), 1))
                    for p in parts:
                        given = f"{whole} {c.load(whole, totals[row][p])}, {whole} {value}, {whole} {w[p]}"
                        new = c.let(f"call {whole} @llvm.x86.avx512.vpdpbusd.512({given})")
                        c.do(f"store {whole} {new}, ptr {totals[row][p]}")
            for p in parts:
                here = c.whole("add", feature, 16 * p)
                size = c.load(wide, c.at(sizes, here, "float"), 4)
                much = c.load(whole, c.at(sums, here, "i32"), 4)
                for row in range(count):
                    found = c.let(f"sub {whole} {c.load(whole, totals[row][p])}, {much}")
                    product = c.let(f"sitofp {whole} {found} to {wide}")
                    behind = c.whole("add", done, row)
                    top = c.everywhere(16, "float", c.load("float", c.at(tops, behind, "float")))
                    scaled = c.let(f"fmul {wide} {product}, {c.let(f'fmul {wide} {top}, {size}')}")
                    answer = c.let(f"fmul {wide} {scaled}, splat (float {single(BOTH)})")
                    to = c.at(out, c.whole("add", c.whole("mul", behind, outputs), here), "float")
                    c.do(f"store {wide} {answer}, ptr {to}, align 4")

        c.chunks(rows, _ROWS, some)
    return c.text()


def lay_out_int8(weights: torch.Tensor) -> torch.Tensor:
    """Return bytes of shape (outputs, inputs) as :func:`int8` reads them: four inputs of each of 32 outputs together.

    The result's shape is (outputs / 32, inputs / 4, 32, 4).
    """
    outputs, inputs = weights.shape
    return weights.view(outputs // FEATURES, FEATURES, inputs // INPUTS, INPUTS).transpose(1, 2).contiguous()


def quantize() -> str:
    """Return the kernel ``quantize(x, numbers, tops, rows, inputs, threshold, columns)``: LLM.int8's first half.

    Each row by itself: ``x`` of shape (rows, inputs), fp32, is rounded to fp16; elements of at least ``threshold`` (a
    double's bits) in size are outliers. ``tops`` has the largest other element of each row; ``numbers`` each element
    times 127 / top, rounded to even, 128 added, or just 128 for an outlier; ``columns``, 32-bit integers of shape
    (rows, inputs + 1), the number of a row's outliers and then where they are.
    """
    wide, bits = "<16 x float>", "<16 x i1>"
    c = Code("quantize")
    x, numbers, tops = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, columns = c.argument(3), c.argument(4), c.argument(6, "ptr")
    threshold = c.everywhere(16, "float", c.single(c.argument(5)))

    def values(row: str, i: str) -> tuple[str, str]:
        """Of 16 elements what is multiplied in whole numbers, and which are outliers."""
        place = c.at(x, c.whole("add", c.whole("mul", row, inputs), i), "float")
        half = c.let(f"fptrunc {wide} {c.load(wide, place, 4)} to <16 x half>")
        value = c.let(f"fpext <16 x half> {half} to {wide}")
        size = c.let(f"call {wide} @llvm.fabs.v16f32({wide} {value})")
        outlier = c.let(f"fcmp oge {wide} {size}, {threshold}")
        return c.let(f"select {bits} {outlier}, {wide} zeroinitializer, {wide} {value}"), outlier

    low, high = c.share(rows)
    with c.loop(low, high) as row:
        most, count = c.slot(wide, "zeroinitializer"), c.slot("i32", "0")
        with c.loop(0, inputs, 16) as i:
            size = c.let(f"call {wide} @llvm.fabs.v16f32({wide} {values(row, i)[0]})")
            old = c.load(wide, most)
            larger = c.let(f"call {wide} @llvm.maximum.v16f32({wide} {size}, {wide} {old})")  # NaN, once there is one
            c.do(f"store {wide} {larger}, ptr {most}")
        top = c.let(f"call float @llvm.vector.reduce.fmaximum.v16f32({wide} {c.load(wide, most)})")
        c.do(f"store float {top}, ptr {c.at(tops, row, 'float')}")
        # Two roundings, as torch divides a number by a tensor.
        inverse = c.let(f"fdiv float 1.0, {top}")
        factor = c.everywhere(16, "float", c.let(f"fmul float {inverse}, 127.0"))
        found = c.at(columns, c.whole("mul", row, c.whole("add", inputs, 1)), "i32")
        with c.loop(0, inputs, 16) as i:
            value, outlier = values(row, i)
            even = c.let(f"call {wide} @llvm.rint.v16f32({wide} {c.let(f'fmul {wide} {value}, {factor}')})")
            number = c.let(f"call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32({wide} {even})")
            byte = c.let(f"trunc <16 x i32> {number} to <16 x i8>")
            to = c.at(numbers, c.whole("add", c.whole("mul", row, inputs), i), "i8")
            c.do(f"store <16 x i8> {c.let(f'add <16 x i8> {byte}, splat (i8 -128)')}, ptr {to}, align 1")
            mask = c.let(f"zext i16 {c.let(f'bitcast {bits} {outlier} to i16')} to i64")
            with c.when(c.let(f"icmp ne i64 {mask}, 0")), c.loop(0, 16) as lane:
                bit = c.whole("and", c.whole("lshr", mask, lane), 1)
                with c.when(c.let(f"icmp ne i64 {bit}, 0")):
                    now = c.let(f"add i32 {c.load('i32', count)}, 1")
                    c.do(f"store i32 {now}, ptr {count}")
                    place = c.at(found, c.let(f"zext i32 {now} to i64"), "i32")
                    column = c.let(f"trunc i64 {c.whole('add', i, lane)} to i32")
                    c.do(f"store i32 {column}, ptr {place}")
        c.do(f"store i32 {c.load('i32', count)}, ptr {found}")
    return c.text()


def outliers() -> str:
    """Return the kernel ``outliers(x, columns, out, rows, inputs, outputs, weights, sizes)``: LLM.int8's second half.

    Adds the products of the elements that :func:`quantize` found, in floating point; ``x`` is as there, the rest as of
    :func:`int8`.
    """
    c = Code("outliers")
    x, columns, out = (c.argument(i, "ptr") for i in range(3))
    rows, inputs, outputs = (c.argument(i) for i in range(3, 6))
    weights, sizes = c.argument(6, "ptr"), c.argument(7, "ptr")
    wide, whole = "<16 x float>", "<16 x i32>"
    low, high = c.share(c.whole("udiv", outputs, FEATURES))
    with c.loop(0, rows) as row:
        found = c.at(columns, c.whole("mul", row, c.whole("add", inputs, 1)), "i32")
        count = c.let(f"zext i32 {c.load('i32', found)} to i64")
        with c.loop(0, count) as j:
            column = c.let(f"zext i32 {c.load('i32', c.at(c.at(found, j, 'i32'), 1, 'i32'))} to i64")
            here = c.at(x, c.whole("add", c.whole("mul", row, inputs), column), "float")
            value = c.everywhere(16, "float", c.load("float", here))
            # Which of a word's four bytes: shifted to the top, and down again with its sign.
            up = c.whole("sub", 24, c.whole("mul", c.whole("urem", column, INPUTS), 8))
            shift = c.everywhere(16, "i32", c.let(f"trunc i64 {up} to i32"))
            with c.loop(low, high) as part:
                before = c.whole("add", c.whole("mul", part, c.whole("udiv", inputs, INPUTS)),
                                 c.whole("udiv", column, INPUTS))  # fmt: skip
                for p in range(FEATURES // 16):
                    first = c.whole("mul", c.whole("add", c.whole("mul", before, FEATURES), 16 * p), INPUTS)
                    upper = c.let(f"shl {whole} {c.load(whole, c.at(weights, first, 'i8'), 1)}, {shift}")
                    number = c.let(f"sitofp {whole} {c.let(f'ashr {whole} {upper}, splat (i32 24)')} to {wide}")
                    feature = c.whole("add", c.whole("mul", part, FEATURES), 16 * p)
                    size = c.load(wide, c.at(sizes, feature, "float"), 4)
                    weight = c.let(f"fmul {wide} {c.let(f'fmul {wide} {number}, {size}')}, splat (float {single(ONE)})")
                    to = c.at(out, c.whole("add", c.whole("mul", row, outputs), feature), "float")
                    old = c.load(wide, to, 4)
                    new = c.let(f"call {wide} @llvm.fma.v16f32({wide} {value}, {wide} {weight}, {wide} {old})")
                    c.do(f"store {wide} {new}, ptr {to}, align 4")
    return c.text()


def quickest(ways: Sequence[Kernel]) -> Kernel:
    """Return the one of several kernels of :func:`four_bit` that takes the least time at best for a few rows.

    They take turns: where other programs hold the processor up, they all meet it.
    """
    rows, inputs, outputs, block = 4, 512, 512, 64
    x, weights = np.zeros((rows, inputs), np.float32), np.zeros(inputs * outputs // 2, np.uint8)
    scales, codes = np.zeros(inputs // block * outputs, np.uint16), np.zeros(16, np.float32)
    out = np.empty((rows, outputs), np.float32)
    there = x.ctypes.data, weights.ctypes.data, out.ctypes.data
    least = [float("inf")] * len(ways)
    for _ in range(100):
        for i, kernel in enumerate(ways):
            started = perf_counter()
            kernel(*there, rows, inputs, outputs, scales.ctypes.data, block, codes.ctypes.data)
            least[i] = min(least[i], perf_counter() - started)
    return ways[least.index(min(least))]


def four_bit_ways() -> list[Kernel]:
    """Return both kernels of :func:`four_bit`, for processors with AVX-512 BF16; errors as of :func:`compiled`."""
    declared = (
        "declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)\n"
        "declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)\n"
        "declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)\n"
    )
    return [Library(declared + four_bit(pairs)).function("four_bit") for pairs in (False, True)]


@cache
def compiled() -> dict[str, Kernel]:
    """Return the kernels that this processor can run, by name; errors as of
    :class:`~speckv_online.cpu_engine.kernels.llvm.Library`."""
    found: dict[str, Kernel] = {}
    there = features()
    if {"avx512f", "avx512bw", "avx512bf16"} <= there:
        found["four_bit"] = quickest(four_bit_ways())
    if {"avx512f", "avx512bw", "avx512vnni"} <= there:
        declared = (
            "declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)\n"
            "declare float @llvm.vector.reduce.fmaximum.v16f32(<16 x float>)\n"
            "declare <16 x float> @llvm.maximum.v16f32(<16 x float>, <16 x float>)\n"
            "declare <16 x float> @llvm.fabs.v16f32(<16 x float>)\n"
            "declare <16 x float> @llvm.rint.v16f32(<16 x float>)\n"
            "declare <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float>)\n"
        )
        library = Library(declared + int8() + quantize() + outliers())
        found |= {name: library.function(name) for name in ("quantize", "int8", "outliers")}
    return found
