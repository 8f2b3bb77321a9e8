"""Plots of ``python -m experiments.streams``; all figures in them are modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from experiments.streams.drift import Drift


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """A figure with panels side by side; no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_drift(found: Mapping[tuple[str, str], Drift], policies: Sequence[str], path: Path) -> None:
    """Goodput relative to the settled copy by steps after a change, a panel per policy, a line per stream."""
    from experiments.streams.drift import BIN, SHARE, WITHIN

    figure, panels = _figure(5, 3.6, len(policies))
    sorts = list(dict.fromkeys(_sort(where) for where, _ in found))
    for panel, spec in zip(panels, policies, strict=True):
        for (where, name), drift in found.items():
            if name == spec:
                x = (np.arange(len(drift.relative)) + 0.5) * BIN
                panel.plot(x, drift.relative, color=f"C{sorts.index(_sort(where))}", linewidth=1)
        panel.axhline(SHARE, color="grey", linestyle=":")
        panel.axvline(WITHIN, color="grey", linestyle=":")
        panel.set(title=spec, xlabel="steps after a change", ylabel="goodput / settled goodput (modelled)")
    bounds = [float(bound) for drift in found.values() for bound in (drift.relative.min(), drift.relative.max())]
    for panel in panels:
        panel.set_ylim(min(0.9, *bounds) - 0.01, max(1.05, *bounds) + 0.01)
    for i, sort in enumerate(sorts):
        panels[-1].plot([], [], color=f"C{i}", label=f"changes of {sort}")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def _sort(where: str) -> str:
    """What a stream changes: its pair and level are in its name too."""
    return next((word for word in ("levels", "tasks", "drafts") if where.startswith(word)), "everything")


def plot_merge(found: Mapping[str, np.ndarray], workers: Sequence[int], every: Sequence[int], path: Path) -> None:
    """Goodput by steps between merges, a line per number of workers, a panel per policy."""
    figure, panels = _figure(5, 3.6, len(found))
    for panel, (spec, rates) in zip(panels, found.items(), strict=True):
        for count, line in zip(workers, rates, strict=True):
            panel.plot(every, line, marker="o", label=f"{count} worker{'s' * (count > 1)}")
        panel.set(title=f"{spec}, cold start", xlabel="steps between merges", ylabel="tokens/s (modelled)")
        panel.set_xscale("log")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
