"""How quick decoding is beside other busy processes: on one thread, on all, and on the number that is chosen.

The three decode a text one after the other, in turns, quiet and beside processes that only count. Each gets a text to
settle in first, which does not count: the number of threads is looked at every fraction of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.cpu_engine.kernels.team import TEAM
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.prompts import choose
from speckv_online.models.pairs import chat_prompt, load_pair
from speckv_online.models.quiet import quiet_libraries

ONE, ALL, CHOSEN = "one thread", "all threads", "chosen"


@dataclass(frozen=True)
class CompanyConfig:
    """Settings of ``python -m experiments.bench.company``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels, comma separated")
    policy: str = option("autoregressive", "policy that decodes")
    busy: tuple[str, ...] = option(("0", "1", "3"), "numbers of busy processes, comma separated")
    seconds: float = option(12.0, "how long each number is measured, at least")
    max_new_tokens: int = option(64, "tokens to decode per text")
    threads: int = option(0, "most CPU threads (0: all cores)")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if not self.levels or not self.busy or not all(count.isdecimal() and int(count) <= 1024 for count in self.busy):
            raise UserError("--levels and --busy must name at least one, and --busy whole numbers from 0 to 1024")
        if self.max_new_tokens < 1 or not 0 <= self.threads <= 1024 or not 0.0 <= self.seconds < 1e6:
            raise UserError("--max-new-tokens must be at least 1, --threads from 0 to 1024, --seconds not below 0")
        make_policy(self.policy)


@contextmanager
def company(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], stderr=subprocess.DEVNULL) for _ in range(count)
    ]
    try:
        sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bench_level(config: CompanyConfig, level: str) -> list[dict[str, Any]]:
    """Measure one level; seconds are wall clock."""
    pair = load_pair(config.pair, level=level, device="cpu")
    decoder = SpeculativeDecoder(pair.drafter, policy=make_policy(config.policy), target=pair.target, level=level)
    if not decoder.engine.on:
        raise UserError(f"the CPU engine does not run {level}: {decoder.engine.reason}")
    prompt = chat_prompt(pair.tokenizer, choose(bundled("test"), 1, seed=0)[0].text)
    sizes, rows = {ONE: 1, ALL: torch.get_num_threads(), CHOSEN: None}, list[dict[str, Any]]()
    expected: list[int] | None = None
    for busy in map(int, config.busy):
        rates = {name: list[float]() for name in sizes}
        with company(busy):
            started = perf_counter()
            while not rates[CHOSEN] or perf_counter() - started < config.seconds:
                for name, size in sizes.items():
                    TEAM.fixed = size
                    decoder.generate(prompt, 24, eos_ids=())  # settles in
                    began = perf_counter()
                    out = decoder.generate(prompt, config.max_new_tokens, eos_ids=())
                    rates[name].append(len(out.tokens) / (perf_counter() - began))
                    expected = expected or out.tokens
                    if out.tokens != expected:
                        raise UserError(f"{level}: {name} decodes other tokens")
        TEAM.fixed = None
        found = {name: float(np.median(seen)) for name, seen in rates.items()}
        rows.append({"level": level, "busy": busy, "texts": len(rates[CHOSEN]), "tokens_per_second": found})
        print(f"{level}: beside {busy} busy processes, {len(rates[CHOSEN])} texts each", file=sys.stderr, flush=True)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Format the measurements as a table."""
    lines = ["tokens/s, medians of whole calls, measured in turns; all decode the same tokens", ""]
    lines.append(f"{'level':6} {'busy':>4}  {ONE:>11}  {ALL:>11}  {CHOSEN:>8}  of the better")
    for row in rows:
        rate = row["tokens_per_second"]
        share = rate[CHOSEN] / max(rate[ONE], rate[ALL])
        lines.append(
            f"{row['level']:6} {row['busy']:4}  {rate[ONE]:11.1f}  {rate[ALL]:11.1f}  {rate[CHOSEN]:8.1f}  {share:.2f}"
        )
    return "\n".join(lines)


def bench(config: CompanyConfig) -> int:
    """Run the benchmark and print it."""
    quiet_libraries()
    torch.set_num_threads(config.threads or cores())
    rows = [row for level in config.levels for row in bench_level(config, level)]
    print(json.dumps({"kind": "measured", "rows": rows}, indent=1) if config.json else show(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, CompanyConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
