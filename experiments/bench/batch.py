"""Tokens per second of batches, of the same prompts one after the other, and of transformers' own batches.

``one cache`` is :meth:`SpeculativeDecoder.decode_batch` (where it is one program, each sequence has a cache of its own;
elsewhere one serves all), ``caches`` decodes the same prompts one after the other, ``transformers`` is plain
``generate`` of the same target, its layers packed as for us, with padding on the left (no draft). They take turns,
batch by batch, in an order that rotates. The prompts' reading is part of the time of all. Greedy, without an end of
sequence, so that every row gives the same number of tokens.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
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

#: Ways of keeping the rows of a batch apart.
WAYS = ("one_cache", "caches")
PLAIN = ("", "transformers")


@dataclass(frozen=True)
class BatchConfig:
    """Settings of ``python -m experiments.bench.batch``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer")
    level: str = option("fp16", "compression level of the target")
    policies: tuple[str, ...] = option(("fixed:2", "online"), "policies to decode with")
    sizes: tuple[str, ...] = option(("1", "4", "16"), "sizes of the batch")
    prompts: int = option(16, "how many of the bundled held-out prompts")
    max_new_tokens: int = option(32, "tokens to decode per prompt")
    threads: int = option(0, "CPU threads (0: as torch chooses)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if not self.sizes or not all(n.isdecimal() and 1 <= int(n) <= MAX_BATCH for n in self.sizes):
            raise UserError(f"--sizes must be from 1 to {MAX_BATCH}, got {','.join(self.sizes)}")
        if min(self.prompts, self.max_new_tokens) < 1 or not 0 <= self.threads <= 1024 or not self.policies:
            raise UserError("--prompts and --max-new-tokens must be at least 1, --threads from 0 to 1024, "
                            "and --policies must name at least one")  # fmt: skip


def transformers_batch(pair: LoadedPair, prompts: list[list[int]], new: int) -> float:
    """Return the seconds of plain ``generate`` over a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=pair.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=pair.device)
    target: Any = pair.target  # modules are typed as holding tensors and modules only
    started = perf_counter()
    target.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    ).tolist()
    return perf_counter() - started


def measure(config: BatchConfig) -> list[dict[str, Any]]:
    """Return a row for every size and policy: tokens per second of each way."""
    pair = load_pair(
        config.pair,
        level=config.level,
        device=config.device,
        target=config.target,
        draft=config.draft,
        engine=config.engine,
    )
    prompts = [chat_prompt(pair.tokenizer, p.text) for p in choose(bundled(), config.prompts)]
    new, rows = config.max_new_tokens, list[dict[str, Any]]()
    transformers_batch(pair, prompts[:1], 2)  # warm-up is no data
    SpeculativeDecoder(pair.drafter, policy="fixed:2", target=pair.target).decode_batch(prompts[:2], 4, eos_ids=())
    for turn, size in enumerate(map(int, config.sizes)):
        decoders = {
            spec: [
                SpeculativeDecoder(pair.drafter, policy=make_policy(spec), target=pair.target, level=config.level)
                for _ in WAYS
            ]
            for spec in config.policies
        }
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        order = [(spec, way) for spec in config.policies for way in WAYS] + [PLAIN]
        for number, start in enumerate(range(0, len(prompts), size)):
            part = prompts[start : start + size]
            first = (number + turn) % len(order)
            for spec, way in order[first:] + order[:first]:
                if (spec, way) == PLAIN:
                    seconds[PLAIN] += transformers_batch(pair, part, new)
                    continue
                started = perf_counter()
                together, apart = decoders[spec]
                if way == WAYS[0]:
                    together.decode_batch(part, new, eos_ids=())
                else:
                    for prompt in part:
                        apart.generate(prompt, new, eos_ids=())
                seconds[spec, way] += perf_counter() - started
        tokens = len(prompts) * new
        for spec in config.policies:
            rates = {way: tokens / seconds[spec, way] for way in WAYS}
            rows.append(
                {"size": size, "policy": spec, "transformers": tokens / seconds[PLAIN], "tokens": tokens} | rates
            )
        print(f"batches of {size} done", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Format the measurements as a table."""
    lines = [
        "tokens per second, measured, prompts included",
        f"{'size':>4} {'policy':<16} {'one cache':>10} {'caches':>10} {'ratio':>6} {'transformers':>13}",
    ]
    for r in rows:
        lines.append(
            f"{r['size']:>4} {r['policy']:<16} {r['one_cache']:>10.2f} {r['caches']:>10.2f} "
            f"{r['one_cache'] / r['caches']:>6.2f} {r['transformers']:>13.2f}"
        )
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
