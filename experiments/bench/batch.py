"""Tokens per second of batches, policy by policy, and what they gain over plain batches of the same prompts.

For every level and size, each policy decodes the same batches (:meth:`SpeculativeDecoder.decode_batch`), in turns and
in an order that rotates. The prompts' reading is part of the time of all. Each policy begins anew at every size, so
that what it takes to learn counts too. Greedy, without an end of sequence: all rows give the same number of tokens, and
the same tokens whatever the policy, which is checked (but at int8, see docs/decoding.md). The ratio to the first policy
has an interval over batches.

``--alone`` also decodes the same prompts one after the other (``caches``), and by plain ``generate`` of the same
target, its layers packed as for us, with padding on the left and no draft (``transformers``). ``--clock cpu`` takes the
process's CPU time, for machines that others use too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.decoding.batch import MAX_BATCH
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.io.prompts import choose
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_pair
from speckv_online.models.quiet import quiet_libraries
from speckv_online.stats import paired_ratio

CLOCKS = {"wall": perf_counter, "cpu": process_time}
#: What ``--quick`` sets. Fewest batches of a size: prompts are taken again, in other company, until there are so many.
QUICK = {"prompts": 16, "max_new_tokens": 32}
LEAST = 3


@dataclass(frozen=True)
class BatchConfig:
    """Settings of ``python -m experiments.bench.batch``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer")
    levels: tuple[str, ...] = option(("fp16", "nf4"), "compression levels of the target")
    policies: tuple[str, ...] = option(
        ("autoregressive", "fixed:1", "fixed:2", "fixed:4", "online"),
        "policies to decode with; ratios are to the first",
    )
    sizes: tuple[str, ...] = option(("2", "4", "8", "16"), "sizes of the batch")
    prompts: int = option(32, "how many of the bundled held-out prompts")
    max_new_tokens: int = option(48, "tokens to decode per prompt")
    alone: bool = option(False, "also decode one prompt after the other, and by transformers' own batches")
    clock: str = option("wall", "wall or cpu: the clock that is read")
    quick: bool = option(False, "16 prompts, 32 tokens each")
    threads: int = option(0, "CPU threads (0: as torch chooses)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        for name, value in QUICK.items() if self.quick else ():
            object.__setattr__(self, name, value)
        if self.clock not in CLOCKS:
            raise UserError(f"--clock must be wall or cpu, got {self.clock}")
        if not self.levels:
            raise UserError("--levels must name at least one level")
        if not self.sizes or not all(n.isdecimal() and 1 <= int(n) <= MAX_BATCH for n in self.sizes):
            raise UserError(f"--sizes must be from 1 to {MAX_BATCH}, got {','.join(self.sizes)}")
        if min(self.prompts, self.max_new_tokens) < 1 or not 0 <= self.threads <= 1024 or not self.policies:
            raise UserError("--prompts and --max-new-tokens must be at least 1, --threads from 0 to 1024, "
                            "and --policies must name at least one")  # fmt: skip


def transformers_batch(pair: LoadedPair, prompts: list[list[int]], new: int) -> None:
    """Decode a batch by plain ``generate``, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=pair.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=pair.device)
    target: Any = pair.target  # modules are typed as holding tensors and modules only
    target.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    ).tolist()


def measure(config: BatchConfig) -> list[dict[str, Any]]:
    """Return a row for every level, size and policy."""
    rows = list[dict[str, Any]]()
    for level in config.levels:
        pair = load_pair(
            config.pair,
            level=level,
            device=config.device,
            target=config.target,
            draft=config.draft,
            engine=config.engine,
        )
        prompts = [chat_prompt(pair.tokenizer, p.text) for p in choose(bundled(), config.prompts)]
        # Warm-up is no data.
        SpeculativeDecoder(pair.drafter, policy="fixed:2", target=pair.target).decode_batch(prompts[:2], 4, eos_ids=())
        if config.alone:
            transformers_batch(pair, prompts[:1], 2)
        for turn, size in enumerate(map(int, config.sizes)):
            rows += measure_size(config, pair, level, prompts, size, turn)
            print(f"{level}: batches of {size} done", file=sys.stderr, flush=True)
        del pair
    return rows


def measure_size(
    config: BatchConfig, pair: LoadedPair, level: str, prompts: list[list[int]], size: int, turn: int
) -> list[dict[str, Any]]:
    """Return a row for every policy at one level and size."""
    new, clock = config.max_new_tokens, CLOCKS[config.clock]
    ways = ("one_cache", "caches") if config.alone else ("one_cache",)
    decoders = {
        (spec, way): SpeculativeDecoder(pair.drafter, policy=make_policy(spec), target=pair.target, level=level)
        for spec in config.policies
        for way in ways
    }
    order = [*decoders, ("", "transformers")] if config.alone else list(decoders)
    seconds = {key: list[float]() for key in order}
    parts = list[list[list[int]]]()
    while len(parts) < LEAST:
        shift = len(parts) * size // 2
        again = prompts[shift % len(prompts) :] + prompts[: shift % len(prompts)]
        parts += [again[start : start + size] for start in range(0, len(prompts), size)]
    differing = dict.fromkeys(config.policies, 0)
    for number, part in enumerate(parts):
        first, said = (number + turn) % len(order), dict[str, list[list[int]]]()
        for spec, way in order[first:] + order[:first]:
            started = clock()
            if not spec:
                transformers_batch(pair, part, new)
            elif way == "one_cache":
                said[spec] = [out.tokens for out in decoders[spec, way].decode_batch(part, new, eos_ids=())]
            else:
                for prompt in part:
                    decoders[spec, way].generate(prompt, new, eos_ids=())
            seconds[spec, way].append(clock() - started)
        for spec, found in said.items():
            differing[spec] += sum(a != b for a, b in zip(found, said[config.policies[0]], strict=True))
    tokens = [float(len(part) * new) for part in parts]
    rows = list[dict[str, Any]]()
    for spec in config.policies:
        own, base = seconds[spec, "one_cache"], seconds[config.policies[0], "one_cache"]
        ratio = paired_ratio(tokens, own, tokens, base)
        row: dict[str, Any] = {"level": level, "size": size, "policy": spec, "tokens": int(sum(tokens))}
        row |= {way: sum(tokens) / sum(seconds[spec, way]) for way in ways}
        if config.alone:
            row["transformers"] = sum(tokens) / sum(seconds["", "transformers"])
        row |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        rows.append(row | {"differing": differing[spec], "kind": "measured", "clock": config.clock})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Format the measurements as a table."""
    alone = "caches" in rows[0]
    head = f"{'level':<6} {'size':>4} {'policy':<18} {'tokens/s':>9} {'ratio':>6} {'interval':>14} {'differing':>9}"
    more = f" {'one by one':>10} {'transformers':>13}" if alone else ""
    lines = [f"tokens per second, measured ({rows[0]['clock']} clock), prompts included", head + more]
    for r in rows:
        interval = f"[{r['low']:.2f}, {r['high']:.2f}]"
        line = f"{r['level']:<6} {r['size']:>4} {r['policy']:<18} {r['one_cache']:>9.2f} {r['ratio']:>6.3f} "
        line += f"{interval:>14} {r['differing']:>9}"
        lines.append(line + (f" {r['caches']:>10.2f} {r['transformers']:>13.2f}" if alone else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, BatchConfig, argv)


def bench(config: BatchConfig) -> int:
    """Run the benchmark and print it."""
    quiet_libraries()
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = measure(config)
    print(json.dumps(rows, indent=1) if config.json else show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
