"""Tables of what was decoded: speed and acceptance by gamma, and signals against acceptance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speckv_online.evaluation.estimators import error_and_correlation
from speckv_online.evaluation.release_runs import Run, goodput
from speckv_online.evaluation.release_steps import StepRow, column
from speckv_online.io.tables import Table

#: Signals of the tokens drafted in a step, by the names of the tables.
SIGNALS = {
    "mean entropy": "mean_draft_entropy",
    "mean confidence": "mean_draft_confidence",
    "max entropy": "max_draft_entropy",
    "min confidence": "min_draft_confidence",
}
#: MLP16's inputs, in its order.
INPUTS = (*SIGNALS, "compression", "gamma")
BINS = 8


def speed_table(runs: Sequence[Run]) -> Table:
    """Σtokens/Σseconds of every level, task and gamma."""
    table = Table(
        "speed_by_gamma", "Measured tokens/s by gamma and task", ("level", "task", "gamma", "tokens/s"), digits=2
    )
    cells: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.compression, run.task, run.gamma), []).append(run)
        cells.setdefault((run.compression, "all", run.gamma), []).append(run)
    for (level, task, gamma), group in cells.items():
        table.add(level, task, gamma, goodput(group))
    return table


def acceptance_table(rows: Sequence[StepRow], runs: Sequence[Run]) -> Table:
    """Accepted ÷ drafted tokens, tokens per step and tokens/s by level and gamma, and the best gamma by tokens/s."""
    table = Table(
        "acceptance_by_level",
        "Realised acceptance, tokens/step and measured tokens/s by level and gamma",
        ("level", "gamma", "acceptance", "tokens/step", "tokens/s", "best"),
    )
    level, gamma = column(rows, "compression"), column(rows, "gamma")
    drafted, accepted, made = (column(rows, n) for n in ("drafted", "accepted", "tokens_produced"))
    for name in dict.fromkeys(level.tolist()):
        gammas = sorted(set(gamma[(level == name) & (drafted > 0)].tolist()))
        speed = {g: goodput(r for r in runs if (r.compression, r.gamma) == (name, g)) for g in gammas}
        best = max(speed, key=lambda g: speed[g])
        for g in gammas:
            here = (level == name) & (gamma == g)
            rate = float(accepted[here].sum() / drafted[here].sum())
            table.add(name, g, rate, float(made[here].mean()), speed[g], "best" if g == best else "")
    return table


def signal_table(rows: Sequence[StepRow]) -> Table:
    """Mean acceptance rate in bins of equally many steps, for each of the draft's signals of the step itself."""
    table = Table(
        "signals",
        "Signals of the drafted tokens (entropy in bits) against the step's acceptance rate",
        ("signal", "bin mean", "acceptance", "steps", "correlation"),
    )
    kept = [r for r in rows if r.drafted > 0]
    rate = np.array([r.accepted / r.drafted for r in kept])
    for name, source in SIGNALS.items():
        value = column(kept, source)
        order = np.argsort(value, kind="stable")
        r = error_and_correlation(value, rate)[1]
        for part in np.array_split(order, min(BINS, len(order))):
            table.add(name, float(value[part].mean()), float(rate[part].mean()), len(part), r)
    return table
