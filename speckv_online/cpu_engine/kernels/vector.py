"""Vectors of floats in the assembler of :mod:`speckv_online.cpu_engine.kernels.llvm`: sums across a register, powers of
e."""

from __future__ import annotations

from speckv_online.cpu_engine.kernels.llvm import Code, single

#: e ** x: 1 / ln 2, ln 2 in two parts, and the polynomial of Cephes' expf.
_LOG2_E, _LN2 = 1.44269504088896341, (0.693359375, -2.12194440e-4)
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LEAST, _MOST = -87.0, 88.0


def splat(number: float) -> str:
    """Return a number in all lanes."""
    return f"splat (float {single(number)})"


class VectorCode(Code):
    """Text of a function on registers of ``lanes`` floats; names of values go in and out."""

    def __init__(self, name: str, lanes: int) -> None:
        super().__init__(name)
        self.lanes, self.wide, self.ints = lanes, f"<{lanes} x float>", f"<{lanes} x i32>"

    def f(self, operation: str, a: str, b: str) -> str:
        """Return the result of an operation on two registers."""
        return self.let(f"{operation} {self.wide} {a}, {b}")

    def call(self, name: str, *values: str) -> str:
        """Return what one of LLVM's functions gives for registers."""
        listed = ", ".join(f"{self.wide} {value}" for value in values)
        return self.let(f"call {self.wide} @llvm.{name}.v{self.lanes}f32({listed})")

    def rounding(self, values: list[str], most: str) -> tuple[str, str]:
        """Return the largest magnitude in some registers, and in all lanes what makes ``most`` of it (0 of zeros)."""
        tops = self.call("fabs", values[0])
        for value in values[1:]:
            tops = self.call("maxnum", tops, self.call("fabs", value))
        top = self.let(f"call float @llvm.vector.reduce.fmax.v{self.lanes}f32({self.wide} {tops})")
        some = self.let(f"fcmp ogt float {top}, 0.0")
        inverse = self.let(f"select i1 {some}, float {self.let(f'fdiv float {most}, {top}')}, float 0.0")
        return top, self.everywhere(self.lanes, "float", inverse)

    def place(self, base: str, row: str, block: str, blocks: str, rows: int, stride: int) -> str:
        """Return where a row's block is, of so many blocks: ``rows`` rows lie together, blocks are ``stride`` bytes."""
        part, rest = (self.whole(operation, row, rows) for operation in ("udiv", "urem"))
        before = self.whole("add", self.whole("mul", part, blocks), block)
        index = self.whole("add", self.whole("mul", before, rows), rest)
        return self.at(base, self.whole("mul", index, stride), "i8")

    def bf16(self, value: str) -> str:
        """Return a register rounded to bf16, in fp32."""
        short = f"<{self.lanes} x bfloat>"
        return self.let(f"fpext {short} {self.let(f'fptrunc {self.wide} {value} to {short}')} to {self.wide}")

    def total(self, value: str) -> str:
        """Return the sum of a register's lanes."""
        name = f"@llvm.vector.reduce.fadd.v{self.lanes}f32"
        return self.let(f"call reassoc float {name}(float 0.0, {self.wide} {value})")

    def totals(self, values: list[str]) -> str:
        """Return a register with the sums of as many registers as it has lanes: of neighbours, pairs, and so on."""
        while len(values) > 1:
            pairs = []
            for a, b in zip(values[::2], values[1::2], strict=True):
                halves = []
                for odd in (0, 1):
                    picked = ", ".join(f"i32 {i}" for i in range(odd, 2 * self.lanes, 2))
                    both = f"{self.wide} {a}, {self.wide} {b}"
                    halves.append(self.let(f"shufflevector {both}, {self.ints} <{picked}>"))
                pairs.append(self.f("fadd", *halves))
            values = pairs
        return values[0]

    def power(self, x: str) -> str:
        """Return e ** x."""
        x = self.call("minnum", self.call("maxnum", x, splat(_LEAST)), splat(_MOST))
        n = self.call("rint", self.f("fmul", x, splat(_LOG2_E)))
        for part in _LN2:
            x = self.call("fma", n, splat(-part), x)
        y = splat(_POLYNOMIAL[0])
        for coefficient in _POLYNOMIAL[1:]:
            y = self.call("fma", y, x, splat(coefficient))
        y = self.call("fma", y, self.f("fmul", x, x), self.f("fadd", x, splat(1.0)))
        whole, wide = self.ints, self.wide
        exponent = self.let(f"add {whole} {self.let(f'fptosi {wide} {n} to {whole}')}, splat (i32 127)")
        bits = self.let(f"shl {whole} {exponent}, splat (i32 23)")
        return self.f("fmul", y, self.let(f"bitcast {whole} {bits} to {wide}"))


def declarations(lanes: int) -> str:
    """Return what of LLVM's own a :class:`VectorCode` calls, and kernels on such registers."""
    wide, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    counts = {"fabs": 1, "rint": 1, "maxnum": 2, "minnum": 2}
    return "".join(
        f"declare {kind} @llvm.{name}.{suffix}({', '.join([kind] * count)})\n"
        for name, count in counts.items()
        for kind, suffix in ((wide, f"v{lanes}f32"), ("float", "f32"))
    ) + (
        "declare float @llvm.sqrt.f32(float)\n"
        f"declare float @llvm.vector.reduce.fmax.v{lanes}f32({wide})\n"
        f"declare i32 @llvm.vector.reduce.add.v{lanes}i32({whole})\n"
    )
