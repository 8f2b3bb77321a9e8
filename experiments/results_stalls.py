"""Calls in which the machine stood still, for :mod:`experiments.results_tables`.

A virtual machine may be stopped for seconds. Whom that hits is chance, and one such call out of twenty would decide a
ratio. So calls are left out in which it can be seen, by a rule that is the same for all contenders: a step of more than
ten times the contender's median at that level; or, of a contender whose steps are not known, more than two and a half
times its median of seconds a token. What is left out is listed, and the main ratios are given with it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speckv_online.rundir import UnitResult

STEP, CALL = 10.0, 2.5


def without_stalls(units: Sequence[UnitResult]) -> tuple[list[UnitResult], list[tuple[UnitResult, float]]]:
    """Return the calls of one level that are kept, and those left out with how many times the median it was."""
    kept, left_out = [], []
    typical: dict[str, float] = {}
    for name in {u.unit.policy for u in units}:
        own = [u for u in units if u.unit.policy == name]
        typical[name] = float(np.median([x for u in own for x in _times(u)]))
    for unit in units:
        slowest = max(_times(unit)) / typical[unit.unit.policy]
        if slowest > (STEP if unit.steps else CALL):
            left_out.append((unit, slowest))
        else:
            kept.append(unit)
    return kept, left_out


def _times(unit: UnitResult) -> list[float]:
    """Seconds of each step, or of a token on average where steps are not known."""
    if unit.steps:
        return [s.seconds for s in unit.steps]
    return [float(unit.facts["call_seconds"]) / max(len(unit.facts["output"]), 1)]


def told(level: str, left_out: Sequence[tuple[UnitResult, float]], count: int) -> str:
    """Say which calls were left out, as one item of a Markdown list; nothing where there are none."""
    if not left_out:
        return ""
    named = ", ".join(f"`{u.unit.policy}` on {u.unit.prompt} ({times:.0f} times)" for u, times in left_out)
    return f"- {level}: {len(left_out)} of {count} calls, in which the machine stood still: {named}."
