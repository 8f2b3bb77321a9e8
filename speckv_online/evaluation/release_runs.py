"""The release's experiment CSV: one run of one prompt at one level and one gamma, with its seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from speckv_online.errors import UserError
from speckv_online.io.csv_rows import read_csv


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded at one level with one gamma; times in seconds of wall clock.

    ``prompt_id`` numbers the prompts of a task in the order in which they ran, as
    :func:`speckv_online.evaluation.release_steps.read_rows` does.
    """

    compression: str
    gamma: int
    task: str
    prompt: str
    num_tokens: int
    elapsed_sec: float
    tokens_per_sec: float
    num_steps: int
    prompt_id: str = ""


COLUMNS = tuple(f.name for f in fields(Run) if f.name != "prompt_id")
_KINDS = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Run)}


def read_runs(path: str | Path) -> list[Run]:
    """Read an experiment CSV.

    Raises
    ------
    UserError
        If the file cannot be read, lacks a column, or a line is broken (file, line and column are named).
    """
    runs: list[Run] = []
    counts: dict[tuple[str, int, str], int] = {}
    for line, cells in read_csv(path, {n: _KINDS[n] for n in COLUMNS}, COLUMNS):
        for name in ("num_tokens", "elapsed_sec", "num_steps"):
            if cells[name] <= 0:
                raise UserError(f"{path} line {line}, column {name}: must be above zero, got {cells[name]}")
        if not 0 <= cells["gamma"] <= 64:
            raise UserError(f"{path} line {line}, column gamma: must be from 0 to 64, got {cells['gamma']}")
        key = (cells["compression"], cells["gamma"], cells["task"])
        counts[key] = counts.get(key, 0) + 1
        runs.append(Run(**cells, prompt_id=f"{cells['task']}-{counts[key]}"))
    if not runs:
        raise UserError(f"{path} holds no runs")
    return runs


def goodput(runs: Iterable[Run]) -> float:
    """Return Σtokens/Σseconds in tokens per second."""
    runs = list(runs)
    return sum(r.num_tokens for r in runs) / sum(r.elapsed_sec for r in runs)


def best_gamma_by_task(runs: Iterable[Run]) -> dict[tuple[str, str], int]:
    """Return, per (level, task), the gamma with the best *mean* of its runs' tokens/s: the release's task oracle."""
    speeds: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run in runs:
        speeds.setdefault((run.compression, run.task), {}).setdefault(run.gamma, []).append(run.tokens_per_sec)
    return {cell: max(found, key=lambda g: float(np.mean(found[g]))) for cell, found in speeds.items()}
