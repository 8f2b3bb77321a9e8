"""Cells of ``python -m experiments.adaptation``: what the copies settle on, what they are told, and what they meet.

A cell is one condition at one pair, cost table and level: (condition, pair, costs, level, what). Its prompts are others
than those that the copies settle on. What changes was left out of settling, and of the weights that policies start
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from experiments.adaptation.config import SAMPLE, AdaptationConfig
from experiments.adaptation.sample import KNOWN, MET, unpack
from experiments.common.cached_cells import Cell
from experiments.common.trace_sources import named_costs
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import RTX3090_RELEASE, CostTable, LevelCost
from speckv_online.traces.trace import Trace, load_traces

#: How many times what was calibrated everything takes.
SCALES = {"half": 0.5, "double": 2.0}


@dataclass(frozen=True)
class Setting:
    """What a cell is about.

    Attributes
    ----------
    source, stream : list of Trace
        What the copies settle on, and what they meet.
    told, true : CostTable
        The calibration, which the copies settle under, and where the seconds come from.
    weights : str
        What the weights to start from are fitted without; empty for the shipped ones.
    """

    source: list[Trace]
    stream: list[Trace]
    told: CostTable
    true: CostTable
    weights: str = ""


def cells(config: AdaptationConfig) -> list[Cell]:
    """Return all cells, in the order of the tables."""
    return [cell for key in config.conditions for cell in _cells(config, key)]


def _cells(config: AdaptationConfig, key: str) -> Iterator[Cell]:
    met, _ = pairs(config)
    names = [name for name, _ in named_costs(config.costs)]
    for pair, traces in met.items():
        levels = list(dict.fromkeys(t.level for t in traces))
        tasks = sorted({t.task for t in traces})
        for costs in names:
            others = [*SCALES, *(name for name in dict.fromkeys((*names, RTX3090_RELEASE.name)) if name != costs)]
            whats = {"task": tasks, "long": tasks, "costs": others}.get(key, [""])
            needs = {"level": len(levels), "task": len(tasks), "draft": len(met)}.get(key, 2)
            if needs > 1:
                yield from ((key, pair, costs, level, what) for level in levels for what in whats)


def setting(config: AdaptationConfig, cell: Cell) -> Setting:
    """Return what a cell is about."""
    key, pair, costs, level, what = cell
    (met, known), tables = pairs(config), dict(named_costs(config.costs)) | {RTX3090_RELEASE.name: RTX3090_RELEASE}
    source, stream = known[pair], [t for t in met[pair] if t.level == level]
    told = true = tables[costs]
    weights = ""
    if key == "level":
        source, weights = [t for t in source if t.level != level], f"{pair} without {level}"
    elif key == "task":  # nothing of it was met, so that prompts of the training split are new as well
        stream = [t for t in (*stream, *source) if t.task == what and t.level == level]
        source, weights = [t for t in source if t.task != what], f"{pair} without {what}"
    elif key == "draft":
        source = [t for name, traces in known.items() if name != pair for t in traces]
        weights = f"without {pair}"
    elif key == "long":
        stream = [t for t in stream if t.task == what]
    elif key == "costs":
        true, told = (scaled(true, SCALES[what]), told) if what in SCALES else (true, tables[what])
    if not source or not stream:
        raise UserError(f"{', '.join(c for c in cell if c)}: no traces are left to settle on, or to adapt to")
    for table in (told, true):
        for name in {level, *(t.level for t in source)}:
            table.level(name)
    return Setting(source, stream, told, true, weights)


def scaled(table: CostTable, by: float) -> CostTable:
    """Return a cost table in which everything takes ``by`` times as long."""
    names = [name for name in LevelCost.__dataclass_fields__ if name.endswith("_seconds") and name != "verify_seconds"]

    def times(c: LevelCost) -> LevelCost:
        verify = tuple(by * v for v in c.verify_seconds)
        return replace(c, verify_seconds=verify, **{name: by * getattr(c, name) for name in names})

    return replace(table, levels={name: times(cost) for name, cost in table.levels.items()})


def pairs(config: AdaptationConfig) -> tuple[dict[str, list[Trace]], dict[str, list[Trace]]]:
    """Return, by pair, the traces to adapt to and those to settle on."""
    if config.traces:
        return _load(config.traces), _load(config.settled)
    return _shipped()


@cache
def _load(sources: tuple[str, ...]) -> dict[str, list[Trace]]:
    return {name: load_traces(path) for name, path in (text.split("=", 1) for text in sources)}


@cache
def _shipped() -> tuple[dict[str, list[Trace]], dict[str, list[Trace]]]:
    found = unpack(SAMPLE)
    met, known = ({pair: own for (pair, role), own in found.items() if role == wanted} for wanted in (MET, KNOWN))
    return met, known
