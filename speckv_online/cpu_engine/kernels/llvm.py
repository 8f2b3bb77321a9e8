"""A little assembler for LLVM: loops and vectors as text, compiled for this processor, run on torch's threads.

Python has no way to say how a matrix is read from memory, and a C compiler is not on every machine. llvmlite brings
LLVM as a wheel. A kernel here is a function of one pointer, to 64-bit integers that are its arguments; torch's own
OpenMP threads run it, so that no second pool of threads competes with them for the cores.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speckv_online.cpu_engine.kernels.team import TEAM
from speckv_online.io.user_cache import SmallFiles, key_of

#: What a kernel may call: OpenMP as torch has it.
_OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
#: How far ahead of their use weights are fetched, and what is fetched at once, in bytes.
_AHEAD, _LINE = 4096, 64
#: Compiled kernels.
KEPT = SmallFiles("kernels", 32_000_000)


def _declarations() -> str:
    """What of LLVM's own the kernels call."""
    vectors = "".join(
        f"declare <{n} x float> @llvm.fma.v{n}f32(<{n} x float>, <{n} x float>, <{n} x float>)\n"
        f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, <{n} x float>)\n"
        for n in (8, 16)
    )
    return vectors + (
        "declare void @GOMP_barrier()\n"
        "declare i32 @omp_get_thread_num()\n"
        "declare i32 @omp_get_num_threads()\n"
        "declare i64 @llvm.umin.i64(i64, i64)\n"
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"
    )


class Code:
    """Text of one function ``void name(ptr args)``, written line by line; values are named as they come.

    Counters and sums live in stack slots, which LLVM turns into registers.
    """

    def __init__(self, name: str) -> None:
        self._head = f"define void @{name}(ptr %args) {{\nentry:\n"
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._made = 0

    def name(self, prefix: str = "%t") -> str:
        """Return a name that nothing else has."""
        self._made += 1
        return f"{prefix}{self._made}"

    def do(self, line: str) -> None:
        """Write an instruction that has no value."""
        self._lines.append(f"  {line}\n")

    def let(self, instruction: str) -> str:
        """Write an instruction; return the name of its value."""
        name = self.name()
        self.do(f"{name} = {instruction}")
        return name

    def slot(self, kind: str, value: str) -> str:
        """Return a variable of a type, set to a value here."""
        name = self.name("%v")
        self._slots.append(f"  {name} = alloca {kind}\n")
        self.do(f"store {kind} {value}, ptr {name}")
        return name

    def load(self, kind: str, pointer: str, align: int | None = None) -> str:
        """Return what is at an address; vectors need an alignment unless their address is a multiple of their size."""
        return self.let(f"load {kind}, ptr {pointer}" + (f", align {align}" if align else ""))

    def argument(self, index: int, kind: str = "i64") -> str:
        """Return an argument of the function."""
        return self.load(kind, self.at("%args", index))

    def single(self, bits: str) -> str:
        """Return a double's bits as a float."""
        return self.let(f"fptrunc double {self.let(f'bitcast i64 {bits} to double')} to float")

    def at(self, pointer: str, index: str | int, kind: str = "i64") -> str:
        """Return the address of an element."""
        return self.let(f"getelementptr {kind}, ptr {pointer}, i64 {index}")

    def whole(self, operation: str, a: str | int, b: str | int) -> str:
        """Return the result of an operation on two 64-bit integers."""
        return self.let(f"{operation} i64 {a}, {b}")

    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: str | int = 1) -> Iterator[str]:
        """Repeat what is written inside for ``start <= i < stop``; yields ``i``. ``step`` may be a slot to be read."""
        index, check, body, end = self.slot("i64", str(start)), self.name("c"), self.name("b"), self.name("e")
        self.do(f"br label %{check}\n{check}:")
        i = self.load("i64", index)
        self.do(f"br i1 {self.let(f'icmp ult i64 {i}, {stop}')}, label %{body}, label %{end}\n{body}:")
        yield i
        taken = self.load("i64", str(step)) if str(step).startswith("%v") else step
        self.do(f"store i64 {self.whole('add', i, taken)}, ptr {index}")
        self.do(f"br label %{check}\n{end}:")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Do what is written inside if an ``i1`` is true."""
        body, end = self.name("b"), self.name("e")
        self.do(f"br i1 {condition}, label %{body}, label %{end}\n{body}:")
        yield
        self.do(f"br label %{end}\n{end}:")

    def chunks(self, rows: str, most: int, some: Callable[[str, int], None], limit: str | None = None) -> None:
        """Write ``some(done, count)`` for all rows, ``most`` at once, or a ``limit`` below, and then the rest."""
        taken = self.slot("i64", limit := limit or str(most))
        with self.loop(0, rows, taken) as done:
            now = self.let(f"call i64 @llvm.umin.i64(i64 {self.whole('sub', rows, done)}, i64 {limit})")
            self.do(f"store i64 {now}, ptr {taken}")
            for count in range(1, most + 1):
                with self.when(self.let(f"icmp eq i64 {now}, {count}")):
                    some(done, count)

    def fetch(self, pointer: str, size: int, ahead: str | None = None) -> None:
        """Fetch what lies some cache lines behind a place that bytes are read from in order.

        It comes into the first cache, or with ``ahead``, a number of bytes that lie between, into the second one.
        """
        pointer, first, near = (pointer, _AHEAD, 3) if ahead is None else (self.at(pointer, ahead, "i8"), 0, 2)
        for offset in range(first, first + size, _LINE):
            self.do(f"call void @llvm.prefetch.p0(ptr {self.at(pointer, offset, 'i8')}, i32 0, i32 {near}, i32 1)")

    def across(self, lanes: int, values: list[str]) -> str:
        """Return the sums of the lanes of up to ``lanes`` registers, in a register.

        Each is added up in halves, as ``llvm.vector.reduce.fadd`` does it, with the same bits.
        """
        wide, half = f"<{lanes} x float>", lanes // 2
        values = values + ["poison"] * (lanes - len(values))
        while half:
            merged = []
            for a, b in zip(values[:half], values[half:], strict=True):
                parts = []
                for odd in (0, 1):  # of a lower halves and of b upper ones, and the others, turned round
                    lane_of = [i + odd * (half if i // half % 2 == 0 else -half) for i in range(lanes)]
                    picked = ", ".join(f"i32 {j + lanes * (i // half % 2)}" for i, j in enumerate(lane_of))
                    parts.append(self.let(f"shufflevector {wide} {a}, {wide} {b}, <{lanes} x i32> <{picked}>"))
                merged.append(self.let(f"fadd {wide} {parts[0]}, {parts[1]}"))
            values, half = merged, half // 2
        return self.let(f"fadd {wide} {values[0]}, zeroinitializer")

    def everywhere(self, lanes: int, kind: str, value: str) -> str:
        """Return a vector that has a value in all lanes."""
        one = self.let(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i64 0")
        return self.let(
            f"shufflevector <{lanes} x {kind}> {one}, <{lanes} x {kind}> poison, <{lanes} x i32> zeroinitializer"
        )

    def upper(self, value: str) -> str:
        """Return the upper halves of 16 words: fp32 with bf16's values in bf16."""
        return self.let(f"trunc <16 x i32> {self.let(f'lshr <16 x i32> {value}, splat (i32 16)')} to <16 x i16>")

    def add_product(self, lanes: int, total: str, a: str, b: str) -> None:
        """Add the product of two vectors of floats to a slot, rounded once."""
        wide = f"<{lanes} x float>"
        old = self.load(wide, total)
        new = self.let(f"call {wide} @llvm.fma.v{lanes}f32({wide} {a}, {wide} {b}, {wide} {old})")
        self.do(f"store {wide} {new}, ptr {total}")

    def thread(self, what: str = "thread_num") -> str:
        """Return this thread's number, or another number of OpenMP's."""
        return self.let(f"zext i32 {self.let(f'call i32 @omp_get_{what}()')} to i64")

    def share(self, count: str) -> tuple[str, str]:
        """Return the first and behind the last of ``count`` things that this thread is to do."""
        thread, threads = self.thread(), self.thread("num_threads")
        low = self.whole("udiv", self.whole("mul", thread, count), threads)
        return low, self.whole("udiv", self.whole("mul", self.whole("add", thread, 1), count), threads)

    def text(self) -> str:
        """Return the function."""
        return "".join((self._head, *self._slots, *self._lines, "  ret void\n}\n"))


class Library:
    """Functions compiled for a processor.

    Parameters
    ----------
    text : str
        LLVM assembly: declarations and functions.
    cpu : str, optional
        A processor's name as LLVM has it; this one by default.

    Raises
    ------
    ImportError, OSError, RuntimeError, AttributeError
        Where there is no llvmlite, LLVM does not take the text, or torch has no OpenMP.
    """

    def __init__(self, text: str, cpu: str | None = None) -> None:
        import llvmlite.binding as llvm

        # Looking a name up in a library looks it up in what that is linked to as well: torch's own OpenMP.
        openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        for name in _OPENMP:
            llvm.add_symbol(name, ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value)
        features = "" if cpu else llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"
        target, cpu = llvm.Target.from_default_triple(), cpu or llvm.get_host_cpu_name()
        machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
        text = _declarations() + text
        # Compiling takes seconds: what comes of it is kept.
        key = key_of(text, cpu, features, target.triple, str(llvm.llvm_version_info))
        code = KEPT.get(key)
        if code is None:
            module = llvm.parse_assembly(text)
            builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
            builder.getModulePassManager().run(module, builder)
            code = machine.emit_object(module)
            KEPT.put(key, code)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)  # owns the code
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.start = openmp.GOMP_parallel
        self.start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.start.restype = None

    def function(self, name: str, parallel: bool = True) -> Kernel:
        """Return a function, to run on a team of threads, or on the caller's alone."""
        address = int(self._engine.get_function_address(name))
        if not address:
            raise AttributeError(f"no function {name}")
        return Kernel(self, address, parallel)


class Kernel:
    """A compiled function: called with its arguments, integers all, it returns them as it leaves them."""

    def __init__(self, library: Library, address: int, parallel: bool) -> None:
        self.address, self._parallel = address, parallel
        self._library = library  # owns the code

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self

    def __call__(self, *arguments: int) -> Any:
        found = (ctypes.c_int64 * len(arguments))(*arguments)
        self._library.start(self.address, found, TEAM.size() if self._parallel else 1, 0)
        return found


def _run() -> str:
    """Return the function ``run(steps, count)``: each step's function with its arguments, one after the other."""
    c = Code("run")
    steps, count = c.argument(0, "ptr"), c.argument(1)
    with c.loop(0, count) as i:
        step = c.at(steps, c.whole("mul", i, 1 + Program.MOST))
        c.do(f"call void {c.load('ptr', step)}(ptr {c.at(step, 1)})")
        c.do("call void @GOMP_barrier()")
    return c.text()


class Program:
    """Kernels to be called one after the other, all by one team of threads: between them is a barrier, not Python.

    Parameters
    ----------
    steps : sequence of tuple
        Each a kernel and its arguments.
    """

    #: Most arguments of a kernel.
    MOST = 9

    def __init__(self, steps: Sequence[tuple[Any, ...]]) -> None:
        table = np.zeros((len(steps), 1 + self.MOST), dtype=np.int64)
        for row, (kernel, *arguments) in zip(table, steps, strict=True):
            row[0], row[1 : 1 + len(arguments)] = kernel.address, arguments
        #: Each step's arguments; change them as you like.
        self.arguments = table[:, 1:]
        self._kernels, self._table, self._run = [kernel for kernel, *_ in steps], table, _runner()
        self._start, self._stride = table.ctypes.data, table.strides[0]

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Do the steps of a slice, on a team of threads."""
        last = len(self._table) if last is None else last
        self._run(self._start + first * self._stride, last - first)


@cache
def _runner() -> Kernel:
    return Library(_run()).function("run")


def double(number: float) -> int:
    """Return the bits of a double: how a kernel is given one."""
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found


def single(number: float) -> str:
    """Return a number rounded to fp32 as LLVM writes it: in full, as the bits of a double."""
    return f"0x{double(ctypes.c_float(number).value) & (1 << 64) - 1:016X}"


def features() -> frozenset[str]:
    """Return what this processor can do, in LLVM's names; nothing where llvmlite is missing."""
    try:
        import llvmlite.binding as llvm

        return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    except (ImportError, OSError, RuntimeError):
        return frozenset()
