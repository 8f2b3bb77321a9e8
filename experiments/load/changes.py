"""How soon a policy is itself again after a change of load or of texts, in the serving simulator.

Takes the tables and traces of ``experiments.load.calibrate``. One policy lives through all changes. After each of them
it is compared with a settled copy: the same policy, at the same requests, when it has served this load for long. Both
are compared over the same tokens. The number is that of the engine step from which on, over the next
:data:`WINDOW` steps, it makes at least 95 % of the settled copy's tokens per second. All seconds are modelled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.config import launch, option
from experiments.load.config import DTYPES, METHODS
from speckv_online.errors import UserError

#: Steps that a rate is taken over, and steps between two looks.
WINDOW, EVERY = 100, 20
#: Share of the settled rate.
BACK = 0.95
#: What a policy lives through: requests at a time, and which of two tasks the texts are of (0: all tasks).
PHASES = ((1, 0), (16, 0), (1, 0), (4, 1), (4, 2), (4, 1), (1, 2), (1, 1), (1, 2))


@dataclass(frozen=True)
class ChangesConfig:
    """Settings of ``python -m experiments.load.changes``."""

    calibrated: str = option("runs/load-costs", "directory of experiments.load.calibrate")
    method: str = option("draft_model", "ngram or draft_model")
    dtype: str = option("bfloat16", "the target's dtype")
    policy: str = option("online", "spec string of the policy")
    tasks: tuple[str, ...] = option(("code", "chat"), "two tasks that the texts change between, comma separated")
    seeds: int = option(3, "repetitions, each with requests of its own")
    steps: int = option(600, "steps between two changes, about")
    most_drafts: int = option(8, "most drafts that a policy may choose")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.dtype not in DTYPES:
            raise UserError(f"--method takes {', '.join(METHODS)}, and --dtype {', '.join(DTYPES)}")
        if len(self.tasks) != 2:
            raise UserError("--tasks takes two names")
        if self.seeds < 1 or self.steps < 2 * WINDOW or not 1 <= self.most_drafts <= 16:
            raise UserError(f"--seeds starts at 1, --steps at {2 * WINDOW}, --most-drafts takes 1 to 16")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(changes, ChangesConfig, argv)


def changes(config: ChangesConfig) -> int:
    """Play all changes, and print how soon the policy was back."""
    from experiments.load.predicted import calibration
    from speckv_online.reporting.report import text_table

    name = f"{config.method}-{config.dtype}"
    costs, traces = calibration(config.calibrated, config.method, config.dtype)
    rows = [row for seed in range(config.seeds) for row in live(config, costs, traces, seed)]
    if config.json:
        print(json.dumps(rows))
        return 0
    shown = []
    for change in dict.fromkeys(row["change"] for row in rows):
        own = [row for row in rows if row["change"] == change]
        steps = ", ".join("never" if row["steps"] is None else str(row["steps"]) for row in own)
        shown.append((change, steps, f"{np.mean([row['kept'] for row in own]):.3f}"))
    print(f"modelled: {name}, {config.policy}")
    print(*text_table([("change", "back after steps", "of a settled copy, all steps"), *shown]), sep="\n")
    return 0


def live(config: ChangesConfig, costs: Any, traces: Any, seed: int) -> list[dict[str, Any]]:
    """Have a policy live through all phases; return what came of each change."""
    from speckv_online.serving.engine import Engine
    from speckv_online.simulate.serving import Fleet, Load

    most = max(rows for rows, _ in PHASES)
    engine = Engine("modelled", config.dtype, config.method, config.method == "ngram", config.most_drafts, most)
    fleet, found, before = Fleet(config.policy, engine, costs), list[dict[str, Any]](), ""
    for at, (rows, which) in enumerate(PHASES):
        task = ("", *config.tasks)[which]
        texts = [trace for trace in traces if task in ("", trace.task)]
        if not texts:
            raise UserError(f"the traces have no text of the task '{task}'")
        # A step makes one token or more for each request, and up to three where drafts pay much.
        count = max(round(2.0 * config.steps * rows / np.mean([len(trace) for trace in texts])), 2 * rows)
        load, own = Load(count, concurrency=rows), 1000 * seed + at
        changed = fleet.serve(texts, load, own)
        copy = Fleet(config.policy, engine, costs)
        copy.take_over(fleet)
        copy.serve(texts, load, own + 500)
        settled = copy.serve(texts, load, own)
        here = f"{rows} at a time{f', {task}' if task else ''}"
        if before:
            row = {"change": f"{before} → {here}", "seed": seed, "steps": back(changed.progress, settled.progress)}
            found.append(row | {"kept": changed.throughput / settled.throughput})
        before = here
    return found


def back(changed: Sequence[tuple[float, int]], settled: Sequence[tuple[float, int]]) -> int | None:
    """Return the step from which on the rate is that of the settled copy, nearly; None if there is none.

    Both are given by seconds and tokens after each step.
    """
    one, other = np.array(changed), np.array(settled)
    one, other = one - one[0], other - other[0]
    for step in range(0, len(one) - WINDOW, EVERY):
        (begin, first), (end, last) = one[step], one[step + WINDOW]
        if last > other[-1, 1]:
            break
        usual = float(np.diff(np.interp((first, last), other[:, 1], other[:, 0]))[0])
        if end - begin <= usual / BACK:
            return step
    return None


if __name__ == "__main__":
    sys.exit(main())
