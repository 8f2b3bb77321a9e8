"""What a step costs on this device: verifications by width and drafted tokens, written as cost files.

A time is that of the whole way: the host has the tokens, launches, and has the answer's token again. It is the median
of turns in which all widths take part, so that a slow moment is slow for all.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from experiments.bench.gpu.models import FAMILIES, free, open_pair, random_llama
from experiments.bench.gpu.settings import Stage
from policies.costs.prior import WIDTHS
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.gpu_engine.graphed_llama import GraphedLlama, attach, graphs_of
from speckv_online.io.manifest import hardware, software
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.simulate.cost_table import CostTable, LevelCost

#: Tokens of the two contexts, and how many are drafted in a row.
SHORT, LONG, RUN = 96, 864, 8
#: Targets with random weights, and what drafts for each: a shape, and how many of its layers (0: all).
PAIRS = {"1b": ("1b", 4), "3b": ("1b", 0), "8b": ("1b", 0)}
LEVELS = ("bf16", "nf4")


def run(stage: Stage) -> None:
    """Measure the default pair, then the random ones; write a cost file each as soon as its levels are there."""
    with tempfile.TemporaryDirectory() as name:
        one_pair(stage, "default", ("fp16", "int8", "nf4"), partial(default, stage, Path(name)))
    if stage.device.type == "cpu" and not stage.tiny:
        stage.skip("Llama shapes of 1B, 3B and 8B", "they are for a GPU: use --tiny")
        return
    for shape in PAIRS:
        one_pair(stage, shape, LEVELS, partial(shaped, stage, shape))


def one_pair(stage: Stage, name: str, levels: tuple[str, ...], open_level: Any) -> None:
    """Measure one pair at its levels and write its cost file."""
    costs: dict[str, LevelCost] = {}
    for level in levels:

        def part(level: str = level) -> tuple[LevelCost, dict[str, Any]]:
            return measure(stage, *open_level(level))

        found = stage.attempt(f"{name} at {level}", part)
        free()
        if found is None:
            continue
        costs[level], row = found
        stage.add("rows", {"pair": name, "level": level, **row})
        where = stage.device.type if stage.tiny or stage.device.type == "cpu" else "measured"
        where = f"tiny-{where}" if stage.tiny else where
        source = f"experiments.bench.gpu, stage costs, medians; context {SHORT}, slope from {SHORT} to {LONG}"
        details = {"pair": name, "hardware": hardware(), "software": software(), "tiny": stage.tiny}
        CostTable(f"{name}-{where}", costs, source, details).save(stage.folder / f"cost-{name}.json")


def default(stage: Stage, folder: Path, level: str) -> tuple[Any, ModelDrafter, str]:
    """Return the target, the drafter and what drafts, of the default pair."""
    pair = open_pair(stage, level, FAMILIES[0] if stage.tiny else "", folder)
    assert isinstance(pair.drafter, ModelDrafter)
    return pair.target, pair.drafter, Path(pair.revision["draft"]).name


def shaped(stage: Stage, shape: str, level: str) -> tuple[Any, ModelDrafter, str]:
    """Return a random target, its drafter and what drafts."""
    target = random_llama(stage, shape, level)
    attach(target)
    own, layers = PAIRS[shape]
    draft = random_llama(stage, own, "bf16", layers)
    return target, ChunkedDrafter(draft, target.config.vocab_size), f"{own}, {layers or 'all'} layers, bf16"


@torch.inference_mode()
def measure(stage: Stage, target: Any, drafter: ModelDrafter, draft: str) -> tuple[LevelCost, dict[str, Any]]:
    """Return the cost of one level, and the row with how the model's own forward does beside."""
    repeats = 3 if stage.tiny else 25
    graphs = graphs_of(target)
    assert graphs is not None
    cache = graphs.cache(LONG + WIDTHS)
    reader = KVCache(len(target.model.layers), LONG + WIDTHS) if cache is None else cache
    table = verify_seconds(graphs, reader, SHORT, tuple(range(1, WIDTHS + 1)), repeats)
    some = (1, 5, WIDTHS)
    far = verify_seconds(graphs, reader, LONG, some, repeats)
    own = verify_seconds(graphs, KVCache(len(target.model.layers), LONG + WIDTHS), SHORT, some, repeats)
    widths = np.maximum.accumulate([table[w] for w in range(1, WIDTHS + 1)])  # never cheaper for being wider
    slope = max(0.0, float(np.median([far[w] - table[w] for w in some])) / (LONG - SHORT))
    once, each = draft_seconds(drafter, repeats)
    cost = LevelCost(
        each, tuple(map(float, widths)), context_seconds=slope, context_length=float(SHORT), first_draft_seconds=once
    )
    row = {
        "draft": draft, "draft_graphs": graphed(drafter),
        "graphs": not graphs.failure, "why_not": graphs.failure, "verify": table, "verify_far": far,
        "verify_own_forward": own, "five_over_one": table[5] / table[1], "draft_seconds": each,
        "first_draft_seconds": once,
    }  # fmt: skip
    return cost, row


def graphed(drafter: ModelDrafter) -> bool:
    """Return True if the draft model was read through graphs."""
    return isinstance(drafter, ChunkedDrafter) and not drafter.graphs.failure


def verify_seconds(
    graphs: GraphedLlama, cache: KVCache, context: int, widths: tuple[int, ...], repeats: int
) -> dict[int, float]:
    """Return the median seconds by width of a verification behind a context; the first two turns are no data."""
    ids = [i % 200 + 1 for i in range(context + max(widths))]
    cache.truncate(0)
    graphs.read(ids[:context], cache, 1)
    times: dict[int, list[float]] = {w: [] for w in widths}
    for _ in range(repeats + 2):
        for width in widths:
            started = perf_counter()
            graphs.read(ids[context : context + width], cache, width).argmax(-1).tolist()
            times[width].append(perf_counter() - started)
            cache.truncate(context)
    return {width: float(np.median(taken[2:])) for width, taken in times.items()}


def draft_seconds(drafter: ModelDrafter, repeats: int) -> tuple[float, float]:
    """Return what the first drafted token of a step takes on top, and what each takes."""
    context = [i % 200 + 1 for i in range(SHORT)]
    drafter.begin(context, LONG + WIDTHS)
    drafter.draft_async(1).tolist()  # reads the context
    times: dict[int, list[float]] = {1: [], RUN: []}
    for turn in range(repeats + 2):
        for count, taken in times.items():
            drafter.end(0)
            drafter.extend([turn % 200 + 1])
            started = perf_counter()
            drafter.draft_async(count).tolist()
            taken.append(perf_counter() - started)
    one, many = (float(np.median(taken[2:])) for taken in times.values())
    each = max(0.0, (many - one) / (RUN - 1))
    return max(0.0, one - each), each
