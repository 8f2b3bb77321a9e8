"""The tables of a report, as text cells."""

from __future__ import annotations

import math

from speckv_online.reporting.data import Report
from speckv_online.reporting.rows import Row
from speckv_online.reporting.verdict import BASELINE, ENOUGH

#: Column titles of the table.
HEAD = (
    "level", "policy", "tokens/s", "tokens/step", "acceptance", "mean γ", "speed-up [95 %]", "µs/decision"
)  # fmt: skip
#: Column titles of the table of :func:`modelled_cells`.
MODELLED_HEAD = ("level", "policy", "measured", "modelled", "ratio")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells as text, in the order of :data:`HEAD`."""
    return (
        row.level,
        row.policy,
        f"{row.tokens_per_second.value:.2f}",
        f"{row.tokens_per_step:.2f}",
        "–" if math.isnan(row.acceptance) else f"{row.acceptance:.2f}",
        f"{row.mean_gamma:.2f}",
        speedup(row),
        f"{row.decision_microseconds:.0f}",
    )


def speedup(row: Row) -> str:
    """Return a row's ratio to autoregressive decoding with its interval."""
    s = row.speedup
    if s is None:
        return "–"
    if row.policy == BASELINE:
        return "1"
    return s.text()


def p_value(row: Row) -> str:
    """Return a row's p-value as text, empty where there is none, or where the prompts are too few to speak of one."""
    if row.speedup is None or row.policy == BASELINE or row.prompts < ENOUGH or not math.isfinite(row.speedup.p_value):
        return ""
    return "p < 0.001" if row.speedup.p_value < 0.001 else f"p = {row.speedup.p_value:.3f}"


def modelled_cells(report: Report) -> list[tuple[str, ...]]:
    """Return the rows of measured against modelled goodput."""
    return [
        (m.level, m.policy, f"{m.measured:.2f}", f"{m.modelled:.2f}", f"{m.modelled / m.measured:.2f}")
        for m in report.modelled
    ]


def side_by_side(reports: list[Report]) -> list[tuple[str, ...]]:
    """Return a table with one column per run: tokens/s with its interval, and the ratio to autoregressive decoding.

    The first row holds the titles. A cell is empty where a run has no such policy or level.
    """
    found = [{(row.level, row.policy): row for row in report.rows} for report in reports]
    keys = dict.fromkeys(key for rows in found for key in rows)
    levels = list(dict.fromkeys(level for level, _ in keys))
    table = [("level", "policy", *(report.name for report in reports))]
    for level, policy in sorted(keys, key=lambda key: levels.index(key[0])):
        table.append((level, policy, *(_cell(rows.get((level, policy))) for rows in found)))
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = row.tokens_per_second.text()
    return text if row.speedup is None or row.policy == BASELINE else f"{text}; × {row.speedup.value:.2f}"
