"""The release's CSV of steps, and what its columns leave to be told: prompts, drafted tokens, the signals before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from speckv_online.errors import UserError
from speckv_online.io.csv_rows import LARGEST, read_csv


@dataclass(slots=True)
class StepRow:
    """One step; the first eleven columns are the release's.

    The ``lag_`` columns are the signals of the step before, as in :class:`~policies.base.Context`; entropies in bits.
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
    drafted: int = 0
    lag_mean_entropy: float = 2.0
    lag_mean_confidence: float = 0.5
    lag_max_entropy: float = 4.0
    lag_min_confidence: float = 0.25


COLUMNS = tuple(f.name for f in fields(StepRow))[:11]
#: Lagged column -> the column that it lags.
LAGGED = {
    "lag_mean_entropy": "mean_draft_entropy",
    "lag_mean_confidence": "mean_draft_confidence",
    "lag_max_entropy": "max_draft_entropy",
    "lag_min_confidence": "min_draft_confidence",
}
_KINDS = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(StepRow)[:11]}


def read_rows(path: str | Path) -> list[StepRow]:
    """Read the release's CSV of steps.

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
    runs: Counter[tuple[str, int, str]] = Counter()
    for line, cells in read_csv(path, _KINDS, COLUMNS):
        row = StepRow(**cells)
        row.drafted = _drafted(row)
        _check(row, f"{path} line {line}")
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
