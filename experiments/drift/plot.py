"""The plot of ``python -m experiments.drift``: goodput, acceptance with alarms, and gamma over the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from experiments.drift.tracks import Track


def plot(found: Sequence[Track], file: Any) -> None:
    """Draw goodput, acceptance with alarms, and each policy's gamma shares over the prompts of the stream, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choosing = [t for t in found if t.policy.split(":")[0] not in ("autoregressive", "fixed")]
    heights = [2.2, 1.8, *([1.2] * len(choosing))]
    figure = Figure(figsize=(9, sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for j, track in enumerate(found):
        x = np.arange(1, len(track.tokens_per_second) + 1)
        panels[0].plot(x, track.tokens_per_second, color=f"C{j}", label=track.policy, marker=".", linewidth=1.2)
        rates = [np.nan if a is None else a for a in track.acceptance]
        panels[1].plot(x, rates, color=f"C{j}", marker=".", linewidth=1.2)
        for name, marker in (("ADWIN", "v"), ("Page-Hinkley", "^")):
            at = [a.prompt + 1 for a in track.alarms if a.detector == name]
            height = 1.06 + 0.07 * j
            panels[1].plot(at, [height] * len(at), marker, color=f"C{j}", markersize=6)
    panels[0].set_ylabel("tokens/s (measured)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    panels[1].set_ylabel("first draft accepted\n▼ ADWIN, ▲ Page-H.", fontsize="small")
    ramp = ("0.8", "#cfe1f2", "#93c4de", "#4b97c9", "#1f63a8", "#08306b")
    for panel, track in zip(panels[2:], choosing, strict=True):
        x = np.arange(1, len(track.tokens_per_second) + 1)
        below = np.zeros(len(x))
        for (label, share), colour in zip(track.shares.items(), ramp, strict=True):
            panel.bar(x, share, 1.0, bottom=below, color=colour, label=f"γ {label}")
            below += share
        panel.set_ylabel(track.policy)
        panel.set_ylim(0, 1)
    if choosing:
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    panels[-1].set_xlabel("prompts decoded by each policy")
    _mark(panels, found)
    figure.savefig(file, format="png", dpi=130)


def _mark(panels: Any, found: Sequence[Track]) -> None:
    """Draw a line where the stream changes, and name the phases above the first panel."""
    longest = max(found, key=lambda track: len(track.tokens_per_second))
    start = 0.5
    for row in longest.phases:
        for panel in panels:
            panel.axvline(start, color="0.3", linewidth=0.8, linestyle=":")
        panels[0].text(
            start + row["prompts"] / 2, 1.02, row["phase"].replace("@", "\n"), fontsize=7, ha="center", va="bottom",
            transform=panels[0].get_xaxis_transform(),
        )  # fmt: skip
        start += row["prompts"]
    panels[0].set_xlim(0.5, start)
