"""Seconds of a serving engine's steps: a table that a calibration writes, by tokens in the forward and context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically

FORMAT, VERSION = "speckv-engine-costs", 1


@dataclass(frozen=True)
class EngineCosts:
    """What a step takes.

    A step that reads N tokens in a forward takes ``verify`` at N, ``context`` for each token of context that its
    requests have, and ``rest`` for each request. Drafting takes ``first`` once, ``each_round`` for each round, ``each``
    for each drafted token, and ``read`` for each token that the draft model has to read first. Beyond the table,
    ``verify`` goes on as a straight line.

    Attributes
    ----------
    name : str
        Of the engine and the machine.
    verify : tuple of float
        Seconds of a forward that reads 1, 2, ... tokens.
    first, each_round, each, read, rest, context : float
        Seconds, none negative.
    """

    name: str
    verify: tuple[float, ...]
    first: float = 0.0
    each_round: float = 0.0
    each: float = 0.0
    read: float = 0.0
    rest: float = 0.0
    context: float = 0.0

    def __post_init__(self) -> None:
        rest = (self.first, self.each_round, self.each, self.read, self.rest, self.context)
        table = np.asarray(self.verify, dtype=float)
        if len(table) < 2 or not np.isfinite(table).all() or not (table > 0).all() or (np.diff(table) < 0).any():
            raise UserError("an engine's verify must be two or more seconds above zero that do not fall")
        if not np.isfinite(rest).all() or min(rest) < 0:
            raise UserError("an engine's seconds must be finite and not negative")

    def seconds(self, tokens: int, rows: int, context: int, rounds: int, forwards: int, read: int) -> float:
        """Return the seconds of a step.

        Parameters
        ----------
        tokens : int
            Tokens that the target reads.
        rows, context : int
            Requests in the step, and tokens of context that they have together.
        rounds, forwards, read : int
            Of the draft model; zero where there is none.
        """
        table = self.verify
        verify = table[tokens - 1] if tokens <= len(table) else self._beyond(tokens)
        drafting = self.first + self.each_round * rounds + self.each * forwards + self.read * read if rounds else 0.0
        return verify + self.context * context + self.rest * rows + drafting

    def _beyond(self, tokens: int) -> float:
        table, half = self.verify, len(self.verify) // 2
        slope = (table[-1] - table[half]) / (len(table) - 1 - half)
        return table[-1] + slope * (tokens - len(table))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        head = {"format": FORMAT, "version": VERSION}
        write_atomically(path, lambda file: file.write(json.dumps(head | asdict(self))))

    @classmethod
    def load(cls, path: str | Path) -> EngineCosts:
        """Read a table; raises :class:`UserError` for a file that holds none."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.pop("format", "") != FORMAT or found.pop("version", 0) != VERSION:
                raise ValueError("it is no table of this version")
            return cls(**found | {"verify": tuple(found["verify"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read an engine's costs from {path}: {error}") from error


def fit(name: str, steps: Sequence[Sequence[float]]) -> EngineCosts:
    """Fit a table to measured steps.

    Parameters
    ----------
    name : str
        Of the engine and the machine.
    steps : sequence of (tokens, rows, context, rounds, forwards, read, seconds)
        Steps that only decoded, and such that read prompts.

    Returns
    -------
    EngineCosts
        ``verify`` is piecewise linear between knots that are a factor of 1.5 apart. All numbers are fitted together by
        least squares of relative errors, none negative; steps of more than 1.5 times the fit are left out then, as the
        machine stalled there.
    """
    from scipy.optimize import nnls

    data = np.asarray(steps, dtype=float)
    if data.ndim != 2 or data.shape[1] != 7 or len(data) < 20:
        raise UserError("a calibration needs 20 steps or more, of seven numbers each")
    most = int(data[:, 0].max())
    knots = np.unique(np.round(1.5 ** np.arange(0, np.log(most) / np.log(1.5) + 1)).clip(1, max(most, 2)))
    # Non-negative rises from knot to knot: a forward of more tokens takes no less.
    rises = [np.ones(len(data))] + [
        np.clip((data[:, 0] - low) / (high - low), 0.0, 1.0) for low, high in pairwise(knots.tolist())
    ]
    drafted = (data[:, 3] > 0).astype(float)
    columns = np.column_stack([*rises, drafted, data[:, 3], data[:, 4], data[:, 5], data[:, 1], data[:, 2]])
    seconds, kept = data[:, 6], np.ones(len(data), dtype=bool)
    for _ in range(3):
        weight = 1.0 / seconds[kept]
        found, _ = nnls(columns[kept] * weight[:, None], seconds[kept] * weight)
        kept = seconds <= 1.5 * (columns @ found)
    table = np.interp(np.arange(1, int(knots[-1]) + 1), knots, np.cumsum(found[: len(knots)]))
    first, each_round, each, read, rest, context = found[len(knots) :].tolist()
    return EngineCosts(name, tuple(table.tolist()), first, each_round, each, read, rest, context)
