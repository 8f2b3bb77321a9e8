"""Which parts of a policy's state are sums over steps, and which tell of one run only."""

from __future__ import annotations

import numpy as np

from policies.base import State

#: The safety guard's budgets and schedules, and the running sums of an alarm.
OF_A_RUN = ("safety.", "safety_sleep.", "surprise.", "surprise_former.")
#: The safety guard's: a debt is the run's that made it.
LEDGERS = OF_A_RUN[:2]
#: Of a cost model's ``misc``: the machine's pace, how many steps saw it, and where they begin.
_NO_PACE, _PACE = (1.0, 1.0, 0.0), 3


def ledgers(state: State) -> State:
    """Return the safety guard's part."""
    return {key: value for key, value in state.items() if key.startswith(LEDGERS)}


def sums_of(state: State) -> State:
    """Return what a process takes over from others: it keeps its own budgets, alarms and pace."""
    found = {key: value for key, value in state.items() if not key.startswith(OF_A_RUN)}
    for key, value in found.items():
        if key.startswith("cost.") and key.endswith(".misc") and np.shape(value) == (_PACE + len(_NO_PACE),):
            found[key] = np.concatenate([value[:_PACE], _NO_PACE])
    return found
