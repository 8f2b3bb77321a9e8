"""What the products of a Llama take by the number of rows: random weights of a shape's matrices, one kernel at a time.

Matrices are read from memory where all copies of one are larger than the caches. Widths take turns, and the best of
some turns counts: a disturbance only ever makes a turn slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from experiments.config import launch, option
from speckv_online.cpu_engine.gguf_layers import GgufLinear, GgufProduct, why_not
from speckv_online.cpu_engine.kernels import gguf_blocks
from speckv_online.cpu_engine.kernels.llvm import Program
from speckv_online.cpu_engine.kernels.team import TEAM
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.modeling.gguf_types import TYPES

#: Inputs, outputs and number of matrices.
SHAPES = {
    "smollm2": ((576, 960, 30), (576, 576, 30), (576, 3072, 30), (1536, 576, 30), (576, 49152, 1)),
    "1.1b": ((2048, 2560, 4), (2048, 2048, 4), (2048, 11264, 4), (5632, 2048, 4), (2048, 32000, 1)),
}
_KINDS = {kind.level: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class ProductsConfig:
    """Settings of ``python -m experiments.bench.products``."""

    shape: str = option("smollm2", f"whose matrices: {', '.join(SHAPES)}")
    levels: tuple[str, ...] = option(("fp16", "q8_0", "q4_1"), f"types of weights: {', '.join(sorted(_KINDS))}")
    rows: tuple[str, ...] = option((*map(str, range(1, 13)), "64"), "numbers of rows")
    turns: int = option(8, "turns of each width, of which the best counts")
    threads: int = option(0, "CPU threads (0: all cores)")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or not set(self.levels) <= set(_KINDS) or not self.levels:
            raise UserError(f"--shape must be one of {', '.join(SHAPES)}, --levels of {', '.join(sorted(_KINDS))}")
        right = self.rows and all(n.isdecimal() and 1 <= int(n) <= 1024 for n in self.rows)
        if not right or self.turns < 1 or self.threads < 0:
            raise UserError("--rows must be from 1 to 1024, --turns at least 1, --threads not below 0")


def times(level: str, inputs: int, outputs: int, copies: int, rows: Sequence[int], turns: int) -> dict[int, float]:
    """Return the seconds of a matrix's copies, one after the other, by the number of rows."""
    kind, generator = _KINDS[level], torch.Generator().manual_seed(0)
    if reason := why_not(kind):
        raise UserError(reason)
    data = torch.randint(0, 60, (outputs, inputs // kind.size * kind.bytes), generator=generator, dtype=torch.uint8)
    most = max(rows)
    x, out = torch.randn(most, inputs, generator=generator), torch.empty(most, outputs)
    products, there, steps = [], x, list[tuple[Any, ...]]()
    for _ in range(copies):
        products.append(GgufProduct([GgufLinear(data, kind)]))
    if kind.bits:
        there = gguf_blocks.inputs_for(most, inputs)
        rounded = gguf_blocks.compiled(products[0].layers[0].lanes, "rounded_b8")
        rounded(x.data_ptr(), there.data_ptr(), 0, most, inputs)
    for product in products:
        steps += product.steps(there.data_ptr(), out.data_ptr(), None)
    program, best = Program(steps), dict.fromkeys(rows, float("inf"))
    for _ in range(1 + turns):
        for count in rows:
            program.arguments[:, 3] = count
            started = perf_counter()
            program.run()
            best[count] = min(best[count], perf_counter() - started)
    return best


def bench(config: ProductsConfig) -> int:
    """Print the table."""
    TEAM.fixed = config.threads or cores()
    torch.set_num_threads(TEAM.fixed)
    widths, rows = [int(n) for n in config.rows], list[dict[str, Any]]()
    for level in config.levels:
        for inputs, outputs, copies in SHAPES[config.shape]:
            found = times(level, inputs, outputs, copies, widths, config.turns)
            rows.append({"level": level, "inputs": inputs, "outputs": outputs, "copies": copies, "seconds": found})
    if config.json:
        print(json.dumps({"kind": "measured", "threads": TEAM.fixed, "rows": rows}, indent=1))
        return 0
    print(f"milliseconds by the number of rows, {TEAM.fixed} threads, measured")
    print(f"{'':26}" + "".join(f"{count:>8}" for count in widths))
    for level in config.levels:
        mine = [row for row in rows if row["level"] == level]
        for row in mine:
            name = f"{level} {row['copies']} of {row['inputs']} x {row['outputs']}"
            print(f"{name:26}" + "".join(f"{1e3 * s:8.2f}" for s in row["seconds"].values()))
        sums = [sum(row["seconds"][count] for row in mine) for count in widths]
        print(f"{level + ' together':26}" + "".join(f"{1e3 * s:8.2f}" for s in sums))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, ProductsConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
