"""Tables of steps: the columns of the published release's CSV first, then what a causal predictor needs.

A table comes from replaying exact traces under several schedules of gamma, so that the lagged signals are as diverse as
a learning policy will meet them, or from a CSV file, the release's own included.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from policies.base import ARMS, Context, Decision, Policy
from speckv_online.context import summarise
from speckv_online.errors import UserError
from speckv_online.io.csv_rows import LARGEST, read_csv
from speckv_online.io.files import write_atomically
from speckv_online.simulate.cost_table import RTX3090_RELEASE, CostTable
from speckv_online.simulate.simulator import Replay, Simulator
from speckv_online.traces.trace import Trace


@dataclass(slots=True)
class StepRow:
    """One step. The first eleven columns are the release's; the others hold neutral values when read from its file.

    ``acceptance_rate`` is NaN, an empty cell in a file, where nothing was drafted. The ``lag_`` columns are the signals
    of the latest earlier step that drafted, as in :class:`~policies.base.Context`; entropies in bits.
    """

    compression: str
    gamma: int
    task: str
    step: int
    accepted: int
    acceptance_rate: float
    tokens_produced: int
    mean_draft_entropy: float
    mean_draft_confidence: float
    max_draft_entropy: float
    min_draft_confidence: float
    prompt_id: str = ""
    split: str = ""
    schedule: str = ""
    position: int = 0
    context_length: int = 0
    drafted: int = 0
    labelled: int = 0
    last_drafted: int = 0
    last_accepted: int = 0
    acceptance: float = 0.5
    lag_mean_entropy: float = 2.0
    lag_mean_confidence: float = 0.5
    lag_max_entropy: float = 4.0
    lag_min_confidence: float = 0.25


COLUMNS = tuple(f.name for f in fields(StepRow))
RELEASE_COLUMNS = COLUMNS[:11]
#: Lagged column -> the column that it lags.
LAGGED = {
    "lag_mean_entropy": "mean_draft_entropy",
    "lag_mean_confidence": "mean_draft_confidence",
    "lag_max_entropy": "max_draft_entropy",
    "lag_min_confidence": "min_draft_confidence",
}
_KINDS = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(StepRow)}


class Schedule(Policy):
    """Draws gamma uniformly from a set at each step (from a set of one: always the same), and notes the contexts.

    Parameters
    ----------
    gammas : sequence of int
    seed : int

    Attributes
    ----------
    seen : list of tuple
        One tuple per decision since :meth:`begin`, see :data:`NOTED`.
    """

    summary = "gamma drawn at random from a set"

    NOTED = (
        "position", "context_length", "last_drafted", "last_accepted", "acceptance",
        "mean_entropy", "mean_confidence", "max_entropy", "min_confidence",
    )  # fmt: skip

    def __init__(self, gammas: Sequence[int] = ARMS, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.gammas = tuple(gammas)
        self.seen: list[tuple[float, ...]] = []

    def begin(self, context: Context) -> None:
        self.seen = []

    def decide(self, context: Context) -> Decision:
        self.seen.append(tuple(getattr(context, name) for name in self.NOTED))
        gamma = self.gammas[int(self.rng.integers(len(self.gammas)))]
        return Decision(self.new_id(), gamma, propensity=1 / len(self.gammas))


def schedule_gammas() -> dict[str, tuple[int, ...]]:
    """Return named sets of gammas to draw from: short and long fixed drafts, any, and seldom any at all."""
    fixed = {f"fixed:{gamma}": (gamma,) for gamma in (1, 2, 4, 8)}
    return fixed | {f"random:{i}": ARMS[1:] for i in range(3)} | {"sparse": (0, 0, 1, 2, 4), "rare": (0,) * 8 + (1, 4)}


def default_schedules(seed: int = 0) -> dict[str, Schedule]:
    """Return a schedule for each of :func:`schedule_gammas`, with seeds of their own."""
    return {name: Schedule(gammas, seed=seed + i) for i, (name, gammas) in enumerate(schedule_gammas().items())}


def replay_untimed(trace: Trace, schedule: Schedule) -> Replay:
    """Replay a trace where seconds play no part: the costs are those of any level."""
    return Simulator(schedule, CostTable("any", {trace.level: RTX3090_RELEASE.levels["fp16"]})).replay(trace)


def replay_rows(trace: Trace, schedule: Schedule, name: str = "") -> list[StepRow]:
    """Replay a trace under a schedule and return its steps as rows."""
    replay = replay_untimed(trace, schedule)
    rows = []
    for i, (position, context, last, hit, rate, *lagged) in enumerate(schedule.seen):
        k, n = int(replay.drafted[i]), int(replay.accepted[i])
        mean_h, max_h, mean_c, min_c = summarise(trace.signals[int(position), :k])
        rows.append(
            StepRow(
                trace.level, int(replay.gamma[i]), trace.task, i, n, n / k if k else float("nan"),
                int(replay.produced[i]), mean_h, mean_c, max_h, min_c, trace.prompt_id, trace.split, name,
                int(position), int(context), k, int(replay.labelled[i]), int(last), int(hit), rate, *lagged,
            )
        )  # fmt: skip
    return rows


def trace_rows(traces: Iterable[Trace], seed: int = 0) -> list[StepRow]:
    """Replay every trace under :func:`default_schedules`."""
    schedules = default_schedules(seed)
    pairs = ((trace, name, schedule) for trace in traces for name, schedule in schedules.items())
    return [row for trace, name, schedule in pairs for row in replay_rows(trace, schedule, name)]


def write_rows(path: str | Path, rows: Iterable[StepRow]) -> Path:
    """Write rows as CSV, whole or not at all."""

    def write(file: object) -> None:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")  # type: ignore[arg-type]
        writer.writeheader()
        for row in rows:
            cells = asdict(row)
            numbers = {k: "" if v != v else f"{v:.6g}" for k, v in cells.items() if isinstance(v, float)}
            writer.writerow(cells | numbers)

    return write_atomically(path, write)


def read_rows(path: str | Path) -> list[StepRow]:
    """Read a CSV of steps, ours or the release's.

    The release does not say where one prompt ends, but its ``step`` restarts at zero, and every combination of level
    and gamma ran the same prompts in one order: prompts are numbered by that, ``drafted`` follows from the acceptance
    rate, and the lagged signals are those of the row before.

    Raises
    ------
    UserError
        If the file cannot be read, lacks one of the release's columns, or a line is broken (file, line and column are
        named).
    """
    path = Path(path)
    rows: list[StepRow] = []
    ours = False
    runs: Counter[tuple[str, int, str]] = Counter()
    for line, cells in read_csv(path, _KINDS, RELEASE_COLUMNS, empty=("acceptance_rate",)):
        row = StepRow(**cells)
        ours = "prompt_id" in cells
        if not ours:
            row.drafted = _drafted(row)
        _check(row, f"{path} line {line}")
        if not ours:
            run = (row.compression, row.gamma, row.task)
            before = rows[-1] if rows else None
            if row.step and (before is None or (before.compression, before.gamma, before.task) != run):
                raise UserError(f"{path} line {line}, column step: a run must start at step 0, got {row.step}")
            if row.step and before is not None and row.step != before.step + 1:
                raise UserError(
                    f"{path} line {line}, column step: expected {before.step + 1} or 0, got {row.step}; "
                    "rows must be whole and in the order in which they were written"
                )
            runs[run] += row.step == 0
            row.prompt_id = f"{row.task}-{runs[run]}"
            if row.step and before is not None:
                for lagged, now in LAGGED.items():
                    setattr(row, lagged, getattr(before, now))
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no step records")
    return rows


def _drafted(row: StepRow) -> int:
    """Tokens that a step of the release drafted: fewer than gamma where its budget ended, which its rate tells."""
    if row.accepted > 0 and 0 < row.acceptance_rate <= 1:
        return min(round(row.accepted / row.acceptance_rate), row.gamma)
    return row.gamma


def _check(row: StepRow, where: str) -> None:
    """Refuse a row whose numbers contradict each other."""
    k = row.drafted
    bounds = {"gamma": 64, "drafted": row.gamma, "step": LARGEST, "accepted": k, "tokens_produced": k + 1}
    for name, most in bounds.items():
        if not 0 <= getattr(row, name) <= most:
            raise UserError(f"{where}, column {name}: must be from 0 to {most}, got {getattr(row, name)}")
    for name in ("mean_draft_confidence", "min_draft_confidence"):
        if not 0 <= getattr(row, name) <= 1:
            raise UserError(f"{where}, column {name}: must be from 0 to 1, got {getattr(row, name)}")
    if k and not abs(row.acceptance_rate - row.accepted / k) < 1e-3:
        text = f"{row.accepted} of {k} tokens accepted is {row.accepted / k:.4g}, got {row.acceptance_rate}"
        raise UserError(f"{where}, column acceptance_rate: {text}")


def column(rows: Sequence[StepRow], name: str) -> np.ndarray:
    """Return one column as an array."""
    return np.array([getattr(row, name) for row in rows])
