"""Calls in which the machine stood still, for :mod:`experiments.results.tables`.

A virtual machine may be stopped for seconds. Whom that hits is chance, and one such call out of twenty would decide a
ratio. So calls are left out in which it can be seen, by a rule that is the same for all contenders: a step of more than
ten times the contender's median at that level; or, of a contender whose steps are not known, a call of more than two
and a half times what one with as many tokens takes by a constant and a slope in tokens. These are fitted to its own
calls by medians, which a stall hardly moves. What is left out is listed, and the main ratios are given with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from speckv_online.io.run_directory import UnitResult

STEP, CALL = 10.0, 2.5


def without_stalls(units: Sequence[UnitResult]) -> tuple[list[UnitResult], list[tuple[UnitResult, float]]]:
    """Return the calls of one level that are kept, and those left out with how many times what is usual it was."""
    kept, left_out = [], []
    steps: dict[str, float] = {}
    calls: dict[str, tuple[float, float]] = {}
    for name in {u.unit.policy for u in units}:
        own = [u for u in units if u.unit.policy == name]
        steps[name] = float(np.median([s.seconds for u in own for s in u.steps] or [0.0]))
        calls[name] = line([_call(u) for u in own])
    for unit in units:
        name = unit.unit.policy
        if unit.steps:
            slowest = max(s.seconds for s in unit.steps) / steps[name]
        else:
            (tokens, seconds), (a, b) = _call(unit), calls[name]
            slowest = seconds / (a + b * tokens)
        if slowest > (STEP if unit.steps else CALL):
            left_out.append((unit, slowest))
        else:
            kept.append(unit)
    return kept, left_out


def line(calls: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit seconds = a + b tokens to (tokens, seconds) of calls, and return (a, b), none below zero.

    b is the median slope of all pairs (Theil, 1950; Sen, 1968) and a the median of what it leaves.
    """
    slopes = [(s - r) / (n - m) for (m, r), (n, s) in combinations(calls, 2) if m != n]
    b = max(float(np.median(slopes)), 0.0) if slopes else 0.0
    return max(float(np.median([s - b * n for n, s in calls])), 0.0), b


def _call(unit: UnitResult) -> tuple[int, float]:
    return max(len(unit.facts["output"]), 1), float(unit.facts["call_seconds"])


def told(level: str, left_out: Sequence[tuple[UnitResult, float]], count: int) -> str:
    """Say which calls were left out, as one item of a Markdown list; nothing where there are none."""
    if not left_out:
        return ""
    named = ", ".join(f"`{u.unit.policy}` on {u.unit.prompt} ({times:.0f} times)" for u, times in left_out)
    return f"- {level}: {len(left_out)} of {count} calls, in which the machine stood still: {named}."
