"""Figures of an evaluation, each drawn from the table of the same name, so that a figure never says another number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speckv_online.io.files import write_atomically
from speckv_online.io.tables import Table

#: A figure and its axes.
Panels = tuple[Any, list[Any]]


def draw(tables: Sequence[Table], folder: str | Path) -> list[Path]:
    """Draw every table that has a figure into ``folder`` as PNG; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for table in tables:
        if table.name not in FIGURES or not table.rows:
            continue
        figure = FIGURES[table.name](plt, table)
        figure.tight_layout()
        path = Path(folder) / f"{table.name}.png"
        paths.append(write_atomically(path, lambda f, g=figure: g.savefig(f, format="png", dpi=120), binary=True))  # type: ignore[misc]
        plt.close(figure)
    return paths


def _panels(plt: Any, names: Sequence[str], title: str, width: float = 3.6, height: float = 3.4) -> Panels:
    figure, axes = plt.subplots(1, len(names), figsize=(max(5.0, width * len(names)), height), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure, list(axes[0])


def _names(table: Table, column: str) -> list[Any]:
    return list(dict.fromkeys(table.column(column)))


def _records(table: Table, **where: Any) -> list[dict[str, Any]]:
    rows = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def _speed_by_gamma(plt: Any, table: Table) -> Any:
    """Throughput against gamma by task, a panel per level."""
    levels = _names(table, "level")
    figure, axes = _panels(plt, levels, table.title)
    for level, axis in zip(levels, axes, strict=True):
        for task in _names(table, "task"):
            rows = _records(table, level=level, task=task)
            style = {"color": "black", "linewidth": 2} if task == "all" else {"marker": "o", "markersize": 3}
            axis.plot([r["gamma"] for r in rows], [r["tokens/s"] for r in rows], label=task, **style)
        axis.set_xlabel("gamma")
    axes[0].set_ylabel("tokens/s")
    axes[-1].legend(fontsize=7)
    return figure


def _acceptance(plt: Any, table: Table) -> Any:
    """Acceptance and tokens/s against gamma by level; the best gamma by tokens/s is ringed."""
    figure, (left, right) = _panels(plt, ["accepted / drafted", "tokens/s (ring: best gamma)"], table.title, 4.2)
    for level in _names(table, "level"):
        rows = _records(table, level=level)
        left.plot([r["gamma"] for r in rows], [r["acceptance"] for r in rows], marker="o", label=level)
        (line,) = right.plot([r["gamma"] for r in rows], [r["tokens/s"] for r in rows], marker="o", markersize=3)
        for r in (r for r in rows if r["best"]):
            right.plot(r["gamma"], r["tokens/s"], "o", markersize=12, fillstyle="none", color=line.get_color())
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("gamma")
    return figure


def _signals(plt: Any, table: Table) -> Any:
    """Signals against acceptance, in bins of equally many steps."""
    names = _names(table, "signal")
    figure, axes = _panels(plt, names, table.title, 2.8, 3.0)
    for name, axis in zip(names, axes, strict=True):
        rows = _records(table, signal=name)
        axis.plot([r["bin mean"] for r in rows], [r["acceptance"] for r in rows], marker="o")
        axis.set_title(f"{name} (r = {rows[0]['correlation']:.2f})", fontsize=9)
        axis.set_ylim(0, 1)
    return figure


def _intervals(plt: Any, table: Table) -> Any:
    """Means with intervals, as published."""
    figure, (axis,) = _panels(plt, [""], table.title, 6.0, 2.6)
    mean, low, high = (np.array(table.column(c)) for c in ("mean", "low", "high"))
    axis.barh(table.column("policy"), mean, xerr=[mean - low, high - mean], capsize=3, color="#5DA5DA")
    axis.set_xlabel("expected tokens/step")
    return figure


def _expected(plt: Any, table: Table) -> Any:
    """Expected tokens per step by level and policy, as published."""
    figure, (axis,) = _panels(plt, [""], table.title, 7.0)
    policies = list(table.columns[1:])
    for i, policy in enumerate(policies):
        axis.bar(np.arange(len(table.rows)) + i / (len(policies) + 1), table.column(policy), 0.15, label=policy)
    axis.set_xticks(np.arange(len(table.rows)) + 0.3, table.column("level"))
    axis.set_ylabel("expected tokens/step")
    axis.legend(fontsize=7)
    return figure


def _improvement(plt: Any, table: Table) -> Any:
    """Improvement over gamma 4 in percent, by level and task."""
    figure, (axis,) = _panels(plt, ["MLP-16"], table.title, 4.2, 3.0)
    levels, tasks = _names(table, "level"), _names(table, "task")
    cells = {(r["level"], r["task"]): r["improvement %"] for r in _records(table)}
    grid = np.array([[cells[level, task] for level in levels] for task in tasks])
    bound = max(1.0, float(np.abs(grid).max()))
    axis.imshow(grid, cmap="RdYlGn", vmin=-bound, vmax=bound, aspect="auto")
    for i, j in np.ndindex(grid.shape):
        axis.text(j, i, f"{grid[i, j]:+.1f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(levels)), levels, fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.grid(False)
    return figure


def _shares(plt: Any, table: Table) -> Any:
    """Distribution of the gammas by level."""
    levels = _names(table, "level")
    figure, axes = _panels(plt, levels, table.title)
    for level, axis in zip(levels, axes, strict=True):
        rows = _records(table, level=level)
        axis.bar(range(len(rows)), [100 * r["share"] for r in rows], 0.8)
        axis.set_xticks(range(len(rows)), [r["gamma"] for r in rows])
        axis.set_xlabel("gamma")
    axes[0].set_ylabel("% of steps")
    return figure


def _estimators(plt: Any, table: Table) -> Any:
    """Overhead against accuracy."""
    figure, (axis,) = _panels(plt, [""], table.title, 5.5)
    for r in _records(table):
        axis.plot(r["ms per decision"], r["correlation"], "o")
        axis.annotate(r["model"], (r["ms per decision"], r["correlation"]), xytext=(5, 4), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xlabel("ms per decision (measured here)")
    axis.set_ylabel("correlation on held-out rows")
    return figure


FIGURES: dict[str, Callable[[Any, Table], Any]] = {
    "speed_by_gamma": _speed_by_gamma,
    "acceptance_by_level": _acceptance,
    "signals": _signals,
    "expected_tokens": _expected,
    "intervals": _intervals,
    "improvement": _improvement,
    "gamma_share": _shares,
    "estimators": _estimators,
}
