"""Cells of ``python -m experiments.streams``: what there is to play, and playing it.

A cell is one policy in one place: a changing stream, or a number of workers and of steps between merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.cached_cells import Cell
from experiments.common.trace_sources import named_costs
from speckv_online.errors import UserError
from speckv_online.simulate.hindsight import by_level
from speckv_online.traces.trace import Trace, load_traces

if TYPE_CHECKING:
    from experiments.streams.config import StreamsConfig

EVERYTHING = "draft, level and task"
Kinds = dict[str, list[Trace]]


def cells(config: StreamsConfig) -> list[Cell]:
    """Return all cells of the parts that are asked for, in the order of the tables."""
    found: list[Cell] = []
    tables = [name for name, _ in named_costs(config.costs)]
    pairs = _pairs(config.traces, config.split)
    if "drift" in config.parts:
        if not streams(pairs):
            raise UserError(
                "the traces are of one pair, level and task, so nothing changes: leave drift out of --parts"
            )
        if config.settled:
            _check_settled(pairs, _pairs(config.settled, "all"))
        found += [("drift", name, stream, spec) for name in tables for stream in streams(pairs)
                  for spec in config.policies]  # fmt: skip
    if "merge" in config.parts:
        pair, own = next(iter(pairs.items()))
        if config.level not in by_level(own):
            raise UserError(f"the traces of {pair} have no level {config.level!r}: give another --level")
        found += [("merge", spec, count, every) for spec in config.policies for count in config.workers
                  for every in config.every]  # fmt: skip
    return found


def play(config: StreamsConfig, cell: Cell) -> Any:
    """Play one cell; the result is ready for JSON."""
    part, *where = cell
    costs, pairs = dict(named_costs(config.costs)), _pairs(config.traces, config.split)
    if part == "drift":
        from experiments.streams.drift import drift

        name, stream, spec = where
        # A stream of everything has kinds enough to come to each of them once.
        rounds = 1 if stream == EVERYTHING else config.rounds
        kinds, seeds = streams(pairs)[stream], range(config.streams)
        others = streams(_pairs(config.settled, "all")).get(stream, {})
        setting: dict[str, Any] = {"period": config.period, "rounds": rounds, "seeds": seeds, "others": others}
        return drift(spec, kinds, costs[name], **setting).as_json()
    from experiments.streams.merge import simulate

    spec, count, every = where
    pair, name = next(iter(pairs)), next(iter(costs))
    group = by_level(pairs[pair])[config.level]
    setting = {"workers": int(count), "every": int(every), "steps": config.steps}
    # Goodput is over all workers: few of them need more seeds for a steady mean.
    seeds = range(-(-config.walkers // int(count)))
    return float(np.mean([simulate(spec, group, costs[name], **setting, seed=seed) for seed in seeds]))


def weight(cell: Cell) -> float:
    """Return how long a cell takes, roughly: many workers that merge often are the longest."""
    return int(cell[2]) * (1 + 10 / int(cell[3])) if cell[0] == "merge" else 0.0


def streams(pairs: Mapping[str, Sequence[Trace]]) -> dict[str, Kinds]:
    """Return every changing stream: by its name the traces, by kind, that it changes between."""
    found: dict[str, Kinds] = {}
    mixed: Kinds = {}
    for pair, traces in pairs.items():
        for trace in traces:
            mixed.setdefault(f"{pair} {trace.level} {trace.task}", []).append(trace)
    order = np.random.default_rng(0).permutation(sorted(mixed)).tolist()
    if len(order) > 1:
        found[EVERYTHING] = {kind: mixed[kind] for kind in order}
    levels = {pair: by_level(traces) for pair, traces in pairs.items()}
    for pair, groups in levels.items():
        if len(groups) > 1:
            found[f"levels of {pair}"] = groups
        for level, group in groups.items():
            tasks = sorted({t.task for t in group})
            if len(tasks) > 1:
                found[f"tasks, {pair} {level}"] = {task: [t for t in group if t.task == task] for task in tasks}
    for level in next(iter(levels.values())):
        if len(pairs) > 1 and all(level in groups for groups in levels.values()):
            found[f"drafts, {level}"] = {pair: groups[level] for pair, groups in levels.items()}
    return found


def _check_settled(pairs: Mapping[str, Sequence[Trace]], others: Mapping[str, Sequence[Trace]]) -> None:
    """Raise :class:`UserError` unless the others are of all the same kinds and of other prompts."""
    both = streams(pairs), streams(others)
    missing = [f"{stream}: {kind}" for stream, kinds in both[0].items() for kind in kinds
               if kind not in both[1].get(stream, {})]  # fmt: skip
    if missing:
        raise UserError(f"--settled has no traces for {missing[0]}: name the pairs of --traces, at the same levels")
    met = ({t.prompt_id for traces in found.values() for t in traces} for found in (pairs, others))
    if again := set.intersection(*met):
        raise UserError(f"--settled has prompts of the streams, {min(again)} for one: give traces of others")


@cache
def _pairs(traces: tuple[str, ...], split: str) -> dict[str, list[Trace]]:
    """Load the traces once per process."""
    splits = () if split == "all" else (split,)
    return {name: load_traces(path, splits=splits) for name, path in (text.split("=", 1) for text in traces)}
