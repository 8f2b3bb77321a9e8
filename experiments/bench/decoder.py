"""The decoder beside transformers' assisted generation, with the same models at the same gamma, in one run.

Contenders decode every prompt in turn, call by call, in an order that rotates from prompt to prompt. A rate is tokens
over the seconds of whole calls, prompt included; a ratio is paired by prompt, with a 95 % interval over prompts. The
draft has all rows of the head in the first comparison, as transformers needs it; "small head" is our decoder with the
draft as it ships. transformers runs stock layers, ours packed and lightened ones. Outputs that differ from
transformers' are counted. Below are the shares of a step, and the seconds of a forward by width, stock and ours.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from speckv_online.errors import UserError
from speckv_online.io.prompts import choose
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine
from speckv_online.stats import goodput, paired_ratio

WIDTHS = (1, 2, 3, 5, 9, 17)
CONTEXT = 100
THEIRS, SAME, SMALL = "transformers", "same draft", "small head"


@dataclass(frozen=True)
class BenchConfig:
    """Settings of ``python -m experiments.bench.decoder``."""

    pair: str = option("smollm2", "named model pair")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels, comma separated")
    gammas: tuple[str, ...] = option(("2", "4", "8"), "gammas, comma separated; gamma 0 always runs too")
    prompts: int = option(6, "how many of the bundled held-out prompts")
    max_new_tokens: int = option(40, "tokens to decode per prompt")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    json: bool = option(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if not self.gammas or not all(g.isdecimal() and 1 <= int(g) <= 16 for g in self.gammas):
            raise UserError(f"--gammas must be whole numbers from 1 to 16, got {','.join(self.gammas)}")
        if self.prompts < 1 or self.max_new_tokens < 1 or not 0 <= self.threads <= 1024 or not self.levels:
            raise UserError("--prompts and --max-new-tokens must be at least 1, --threads from 0 to 1024, "
                            "and --levels must name at least one")  # fmt: skip


def forward_seconds(model: Any) -> dict[int, float]:
    """Return the median seconds of a forward of some tokens after a context of 100, by number of tokens."""

    def read(ids: Any, cache: Any) -> None:
        out = model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)
        float(out.logits[0, -1, 0])  # waits for a GPU

    return read_seconds(read, int(model.config.num_hidden_layers))


def read_seconds(read: Callable[[Any, Any], None], layers: int, repeats: int = 25) -> dict[int, float]:
    """Return :func:`forward_seconds` of what reads tokens into a cache."""
    import torch

    from speckv_online.modeling.kv_cache import KVCache

    cache = KVCache(layers, CONTEXT + max(WIDTHS))
    times: dict[int, list[float]] = {w: [] for w in WIDTHS}
    ids = torch.arange(100, 100 + CONTEXT + max(WIDTHS))
    with torch.inference_mode():
        read(ids[:CONTEXT], cache)
        for _ in range(repeats + 1):
            for width in WIDTHS:  # interleaved, so that a busy machine is busy for all
                started = perf_counter()
                read(ids[CONTEXT : CONTEXT + width], cache)
                times[width].append(perf_counter() - started)
                cache.truncate(CONTEXT)
    return {width: float(np.median(ts[1:])) for width, ts in times.items()}


def bench_level(config: BenchConfig, level: str) -> dict[str, Any]:
    """Run one level; seconds are wall clock."""
    import torch

    from experiments.results.transformers_baseline import Schedule, Stock
    from speckv_online.cpu_engine.start import start_engine
    from speckv_online.decoding.decoder import SpeculativeDecoder
    from speckv_online.drafters.model import ModelDrafter
    from speckv_online.io.manifest import cores
    from speckv_online.models.distilled_draft import load_shipped_draft
    from speckv_online.models.pairs import chat_prompt, load_pair, prepare
    from speckv_online.models.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(config.threads or cores())
    stock = Stock(config.pair, level, config.device)
    ours = load_pair(config.pair, level=level, device=config.device, engine=config.engine)
    whole = load_shipped_draft(prepare(config.pair), ours.device, full_head=True)[0]
    widths = {"target": {"stock": forward_seconds(stock.target), "ours": forward_seconds(ours.target)}}
    widths["draft"] = {"stock": forward_seconds(whole)}
    start_engine(whole, config.engine)
    widths["draft"]["ours"] = forward_seconds(whole)
    shipped: Any = ours.drafter
    widths["shipped draft"] = {"ours": forward_seconds(shipped.model)}
    if shipped.quick is not None:
        widths["shipped draft"]["quick"] = read_seconds(shipped.quick.read, shipped.quick.layers)
    drafter = ModelDrafter(whole, ours.target.config.vocab_size)
    prompts = [chat_prompt(ours.tokenizer, p.text) for p in choose(bundled("test"), config.prompts, seed=0)]
    calls: dict[tuple[int, str], list[tuple[list[int], float]]] = defaultdict(list)
    shares: dict[int, list[Any]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        for turn, gamma in enumerate((0, *map(int, config.gammas))):
            runs: list[tuple[str, Callable[[int], tuple[list[int], float]]]] = [
                (THEIRS, partial(stock.generate, prompt, schedule=Schedule("", gamma)))
            ]
            for name, d, steps in ((SAME, drafter, shares[gamma]), (SMALL, shipped, [])):
                decoder = SpeculativeDecoder(d, policy=f"fixed:{gamma}", target=ours.target, level=level)
                runs.append((name, partial(ours_call, decoder, prompt, steps)))
            if number == 0:  # warm-up is no data
                for _, call in runs:
                    call(min(8, config.max_new_tokens))
                shares[gamma].clear()
            first = (number + turn) % len(runs)
            for name, call in runs[first:] + runs[:first]:
                calls[gamma, name].append(call(config.max_new_tokens))
        print(f"{level}: prompt {number + 1}/{len(prompts)}", file=sys.stderr, flush=True)
    cells = [cell(gamma, name, calls[gamma, name], calls[gamma, THEIRS]) for gamma, name in calls]
    return {"level": level, "cells": cells, "widths": widths, "shares": {g: share(s) for g, s in shares.items()}}


def cell(gamma: int, name: str, calls: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Return a contender's rate at one gamma, its ratio to transformers, and how many outputs are not the same."""
    tokens, seconds = [len(ids) for ids, _ in calls], [s for _, s in calls]
    base_tokens, base_seconds = [len(ids) for ids, _ in theirs], [s for _, s in theirs]
    ratio = paired_ratio(tokens, seconds, base_tokens, base_seconds)
    found = {"gamma": gamma, "who": name, "tokens_per_second": goodput(tokens, seconds), "ratio": ratio.value}
    # JSON has no NaN, which is what the interval over a single prompt is.
    interval = [ratio.low, ratio.high] if len(calls) > 1 else None
    differing = sum(mine[0] != other[0] for mine, other in zip(calls, theirs, strict=True))
    return found | {"interval": interval, "differing": differing, "prompts": len(calls)}


def ours_call(decoder: Any, prompt: list[int], steps: list[Any], max_new_tokens: int) -> tuple[list[int], float]:
    """Decode with ours; keep the steps."""
    result = decoder.generate(prompt, max_new_tokens)
    steps += result.steps
    return result.tokens, result.seconds


def share(steps: Sequence[Any]) -> dict[str, float]:
    """Return what part of all steps' seconds went where; ``python`` is what no clock of a part covers."""
    total = sum(s.seconds for s in steps)
    parts = {name: sum(getattr(s, f"{name}_seconds") for s in steps) / total for name in ("draft", "verify", "decide")}
    return parts | {"python": 1 - sum(parts.values())}


def show(results: list[dict[str, Any]]) -> None:
    """Print the tables (measured)."""
    print(
        "tokens/s of whole calls, measured side by side; ratio to transformers with the same gamma [95 % over prompts]"
    )
    print(f"{'level':6} {'gamma':>5}  {'who':<12} {'tokens/s':>8}  {'ratio':<18} differing outputs")
    ratios: dict[str, list[float]] = {SAME: [], SMALL: []}
    for r in results:
        for c in sorted(r["cells"], key=lambda c: (c["gamma"], (THEIRS, SAME, SMALL).index(c["who"]))):
            interval = f" [{c['interval'][0]:.2f}, {c['interval'][1]:.2f}]" if c["interval"] else ""
            ratio, differing = f"{c['ratio']:.2f}{interval}", f"{c['differing']}/{c['prompts']}"
            if c["who"] == THEIRS:
                ratio = differing = ""
            print(
                f"{r['level']:6} {c['gamma']:5}  {c['who']:<12} {c['tokens_per_second']:8.2f}  {ratio:<18} {differing}"
            )
            if c["gamma"] and c["who"] in ratios:
                ratios[c["who"]].append(c["ratio"])
    for name, values in ratios.items():
        print(f"{name}: {np.exp(np.mean(np.log(values))):.3f} of transformers in the geometric mean over gamma > 0, "
              f"worst cell {min(values):.3f}")  # fmt: skip
    print("\nshare of a step's seconds")
    for r in results:
        for gamma, parts in sorted(r["shares"].items()):
            print(f"{r['level']:6} {gamma:5}  " + "  ".join(f"{name} {100 * x:5.2f} %" for name, x in parts.items()))
    print("\nmilliseconds of a forward by its number of tokens")
    for r in results:
        for model, kinds in r["widths"].items():
            for kind, times in kinds.items():
                cells = "  ".join(f"{w}: {1e3 * t:.1f}" for w, t in times.items())
                print(f"{r['level']:6} {model:13} {kind:6}  {cells}  (5/1 {times[5] / times[1]:.2f}, "
                      f"9/1 {times[9] / times[1]:.2f})")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, BenchConfig, argv)


def bench(config: BenchConfig) -> int:
    """Run all levels and print them."""
    results = [bench_level(config, level) for level in config.levels]
    if config.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
