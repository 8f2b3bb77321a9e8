"""What ``python -m experiments.adaptation`` found, in words, as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adaptation.config import CONDITIONS
from experiments.adaptation.contest import BINS, COLD, FROZEN, PUBLISHED
from experiments.common.cached_cells import Cell
from speckv_online.io.files import write_atomically
from speckv_online.stats import Estimate, mean_gain

HEAD = ("", "cells", "× its frozen copy [95 %]", "least cell", "× `mlp16` [95 %]", "× a cold start [95 %]", "repeats")


@dataclass(frozen=True)
class Condition:
    """What one condition came to: how many times as fast learning was as the others.

    Attributes
    ----------
    curves : dict of str to list of Estimate
        By the other policy, from the start to the end of each part of the stream; all cells together.
    cells : dict of str to dict of str to Estimate
        By cell and other policy, over the whole stream.
    end : int
        Steps, or tokens of a long stream.
    repeated : float
        Share of the tokens that belong to a prompt which the stream had met before.
    """

    curves: dict[str, list[Estimate]]
    cells: dict[str, dict[str, Estimate]]
    end: int
    repeated: float


def summarise(found: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Condition]:
    """Return what each condition came to, in their order."""
    conditions = {}
    for key in CONDITIONS:
        own = {", ".join(c for c in cell[1:] if c): one for cell, one in found.items() if cell[0] == key}
        if own:
            cells = {name: {other: g[-1] for other, g in _gains([one]).items()} for name, one in own.items()}
            ends, repeated = zip(*((one["end"], one["repeated"]) for one in own.values()), strict=True)
            conditions[key] = Condition(_gains([*own.values()]), cells, max(ends), float(np.mean(repeated)))
    return conditions


def _gains(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Estimate]]:
    keys = sorted({tuple(key) for one in cells for key in one["prompts"]})
    sums = {name: np.zeros((len(cells), len(keys), BINS)) for name in cells[0]["seconds"]}
    for c, one in enumerate(cells):
        rows = [keys.index(tuple(key)) for key in one["prompts"]]
        for name, seconds in one["seconds"].items():
            sums[name][c, rows] = np.cumsum(seconds, axis=1)
    own = sums.pop("")
    return {name: mean_gain(own, other, [task for task, _ in keys]) for name, other in sums.items()}


def sentence(found: Mapping[str, Condition]) -> str:
    """Answer in few words whether learning pays, condition by condition."""
    groups: dict[str, list[str]] = {}
    for key, condition in found.items():
        g = condition.curves[FROZEN][-1]
        group = "yes" if g.above else "no" if g.below else "no clear difference"
        groups.setdefault(group, []).append(f"{CONDITIONS[key]} {g.value:.2f}")
    first, *others = (f"{group}: {', '.join(own)}" for group, own in groups.items())
    more = "".join(f" {other[:1].upper()}{other[1:]}." for other in others)
    return f"Does learning pay? Times its frozen copy, {first}.{more}"


def document(found: Mapping[str, Condition], kind: str) -> dict[str, Any]:
    """Return the result as JSON has it: by condition, ratio and interval over the frozen copy, and all else."""
    answer = {}
    for key, one in found.items():
        cells = {name: {other: _numbers(g) for other, g in own.items()} for name, own in one.cells.items()}
        over = {other: _numbers(curve[-1]) for other, curve in one.curves.items()}
        curve = [_numbers(g) for g in one.curves[FROZEN]]
        more = {"over": over, "cells": cells, "curve": curve, "end": one.end, "repeated": one.repeated}
        answer[key] = over[FROZEN] | {"kind": kind} | more
    return answer


def _numbers(g: Estimate) -> dict[str, float]:
    return {"ratio": g.value, "low": g.low, "high": g.high}


def table(found: Mapping[str, Condition]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    rows: list[tuple[str, ...]] = [HEAD]
    for key, one in found.items():
        least = min(one.cells, key=lambda name: one.cells[name][FROZEN].value)
        ends = [one.curves[name][-1].text(3) for name in (FROZEN, PUBLISHED, COLD)]
        named = f"{one.cells[least][FROZEN].value:.3f} ({least})"
        rows.append((CONDITIONS[key], str(len(one.cells)), ends[0], named, *ends[1:], f"{one.repeated:.0%}"))
    return rows


def plot(found: Mapping[str, Condition], kind: str, path: Path) -> None:
    """Draw the cumulative gain over the stream with its interval, a panel per condition."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(found) + 2) // 3
    figure = Figure(figsize=(10, 0.5 + 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 3, squeeze=False).ravel()
    for panel, (key, one) in zip(panels, found.items(), strict=False):
        x = (np.arange(BINS) + 1) * one.end / BINS
        for j, (name, curve) in enumerate(one.curves.items()):
            panel.plot(x, [g.value for g in curve], color=f"C{j}", linewidth=1.4, label=f"online over {name}")
            panel.fill_between(
                x, [g.low for g in curve], [g.high for g in curve], color=f"C{j}", alpha=0.2, linewidth=0
            )
        panel.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        panel.set_title(CONDITIONS[key], fontsize=10)
        panel.set_xlabel("tokens" if key == "long" else "steps")
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    panels[0].set_ylabel(f"cumulative gain ({kind})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130), binary=True)
