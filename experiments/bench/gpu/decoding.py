"""Whole calls of the default pair: no draft, fixed lengths, learned policies, and transformers' assisted generation.

Contenders decode every prompt in turn, in an order that rotates. A rate is tokens over the seconds of whole calls, the
prompt included. Graphs are recorded, and every contender has decoded once, before the clock runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.gpu.models import FAMILIES, free, open_pair, record
from experiments.bench.gpu.settings import Stage
from experiments.common.bundled_prompts import bundled
from experiments.results.transformers_baseline import SCHEDULES, Schedule, Stock
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.io.prompts import choose
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_target
from speckv_online.profiling.calibration import WARM_UP
from speckv_online.stats import goodput, paired_ratio

LEVELS = ("fp16", "int8", "nf4")
PLAIN = "autoregressive"
OURS = (PLAIN, "fixed:1", "fixed:2", "fixed:4", "fixed:8", "mlp16", "online")
THEIRS = tuple(s for s in SCHEDULES.values() if s.schedule == "constant")

Call = Callable[[list[int], int], tuple[list[int], float, list[Any]]]


class TinyStock(Stock):
    """transformers' own ``generate`` with two folders' models."""

    def __init__(self, target: Path, draft: Path, level: str, device: str) -> None:
        self.reached = {}
        self.target, self.draft = load_target(target, level, device), load_target(draft, "fp32", device)


def run(stage: Stage) -> None:
    """Decode at each level."""
    with tempfile.TemporaryDirectory() as name:
        for level in LEVELS:
            rows = stage.attempt(level, partial(one_level, stage, level, Path(name)))
            for row in rows or ():
                stage.add("rows", {"level": level, **row})
            free()


def one_level(stage: Stage, level: str, folder: Path) -> list[dict[str, Any]]:
    """Return a row per contender; prompts are decoded until the level's part of the time is over."""
    ends = stage.left() * (1 - 1 / (len(LEVELS) - LEVELS.index(level)))  # what must be left afterwards
    kind = FAMILIES[0] if stage.tiny else ""
    pair = open_pair(stage, level, kind, folder)
    stock: Stock = (
        TinyStock(folder / f"{kind}-target", folder / f"{kind}-draft", level, str(stage.device))
        if kind
        else Stock("smollm2", level, str(stage.device))
    )
    new = 12 if stage.tiny else 64
    prompts = [chat_prompt(pair.tokenizer, p.text) for p in choose(bundled(), 2 if stage.tiny else 24)]
    graphs = 0 if stage.tiny else record(pair, max(map(len, prompts)) + new + 32)
    calls = contenders(pair, stock, level)
    for call in calls.values():
        call(chat_prompt(pair.tokenizer, WARM_UP), new)
    names, done = list(calls), {name: list[Any]() for name in calls}
    for number, prompt in enumerate(prompts):
        if number >= 2 and stage.left() <= ends:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            done[name].append(calls[name](prompt, new))
    return [describe(name, done, graphs) for name in names]


def contenders(pair: LoadedPair, stock: Stock, level: str) -> dict[str, Call]:
    """Return what decodes, by name."""
    calls: dict[str, Call] = {}
    for spec in OURS:
        decoder = SpeculativeDecoder(pair.drafter, policy=make_policy(spec, seed=0), target=pair.target, level=level)
        calls[spec] = partial(ours, decoder)
    for schedule in THEIRS:
        calls[schedule.name] = partial(theirs, stock, schedule)
    return calls


def ours(decoder: SpeculativeDecoder, prompt: list[int], new: int) -> tuple[list[int], float, list[Any]]:
    """Decode with ours."""
    out = decoder.generate(prompt, new)
    return out.tokens, out.seconds, out.steps


def theirs(stock: Stock, schedule: Schedule, prompt: list[int], new: int) -> tuple[list[int], float, list[Any]]:
    """Decode with transformers."""
    return *stock.generate(prompt, new, schedule), []


def describe(name: str, done: dict[str, list[Any]], graphs: int) -> dict[str, Any]:
    """Return a contender's rate and its ratios to no draft, with how many outputs are not those of no draft."""
    tokens, seconds = [len(ids) for ids, _, _ in done[name]], [s for _, s, _ in done[name]]
    base = done[PLAIN]
    ratio = paired_ratio(tokens, seconds, [len(ids) for ids, _, _ in base], [s for _, s, _ in base])
    steps = [step for _, _, own in done[name] for step in own]
    return {
        "who": name, "prompts": len(tokens), "tokens": sum(tokens), "tokens_per_second": goodput(tokens, seconds),
        "to_no_draft": ratio.value, "interval": [ratio.low, ratio.high], "graphs": graphs,
        "differing": sum(a[0] != b[0] for a, b in zip(done[name], base, strict=True)),
        "drafted": sum(s.drafted for s in steps), "accepted": sum(s.accepted for s in steps), "steps": len(steps),
        "policy_share": sum(s.decide_seconds for s in steps) / sum(s.seconds for s in steps) if steps else None,
    }  # fmt: skip
