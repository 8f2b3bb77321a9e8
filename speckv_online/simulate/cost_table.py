"""What a step costs in seconds, per compression level: the simulator's clock.

A step that drafts tokens by ``j`` forwards of the draft and submits ``k`` of them costs

    T = first + t_d * j + c * behind + T_v(k + 1) + slope * (context - usual context) + t_0

the linear model of speculative decoding's speed-up analyses (Leviathan et al. 2023, section 3.3), with a table where
the verify time is not linear in its width. Where j > 0, ``first`` is what the first forward takes on top, and c is what
each token of the context takes that the draft has yet to read. Times are seconds, lengths tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.base import PolicyError, reason
from policies.costs.prior import WIDTHS, CostPrior
from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.io.step_records import StepRecord

FORMAT, VERSION = "speckv-cost", 1
#: Share of its time in the table that a verification takes at least, however short the context: a slope that was fitted
#: to long ones says nothing of those.
LEAST = 0.1


@dataclass(frozen=True)
class LevelCost(CostPrior):
    """Cost of a step at one compression level: what policies are told beforehand, and what a replay charges.

    Attributes
    ----------
    verify_seconds : tuple of float
        As in :class:`policies.costs.prior.CostPrior`, continued up to width 17.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "verify_seconds", tuple(self.table().tolist()))

    def seconds(self, drafted: int, context: float | None = None, forwards: float | None = None) -> float:
        """Return the modelled seconds of a step that verifies all it drafts, the draft's catching up left out.

        >>> cost = LevelCost(0.25, (1.0, 1.5), 0.125)
        >>> cost.seconds(0), cost.seconds(1)
        (1.125, 1.875)

        Parameters
        ----------
        drafted : int
            Tokens drafted.
        context : float, optional
            Tokens of context; ``context_length`` by default.
        forwards : float, optional
            How many of the tokens took a forward of the draft; all by default.
        """
        verify, paid = self.verify_seconds[drafted], drafted if forwards is None else forwards
        if context is not None:
            verify = max(verify + self.context_seconds * (context - self.context_length), LEAST * verify)
        return self.draft_seconds * paid + self.first_draft_seconds * min(paid, 1) + verify + self.overhead_seconds


@dataclass(frozen=True)
class CostTable:
    """Costs of all levels on one device.

    Attributes
    ----------
    name : str
        Short name for reports, e.g. ``measured``.
    source : str
        Where the numbers come from.
    levels : mapping of str to LevelCost
    details : mapping
        Hardware, software and whatever else is to be kept with the numbers.
    """

    name: str
    levels: Mapping[str, LevelCost]
    source: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def level(self, name: str) -> LevelCost:
        """Return one level's cost; raises :class:`UserError` for a level that the table lacks."""
        try:
            return self.levels[name]
        except KeyError:
            known = ", ".join(self.levels) or "none at all"
            raise UserError(
                f"cost table {self.name!r} has no level {name!r}; it has {known}: give --levels, or another table"
            ) from None

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON."""
        levels = {name: asdict(cost) for name, cost in self.levels.items()}
        document = {"format": FORMAT, "version": VERSION, "name": self.name, "source": self.source}
        document |= {"details": dict(self.details), "levels": levels}
        return write_atomically(path, lambda f: f.write(json.dumps(document, indent=1) + "\n"))


#: The published release's timings: one RTX 3090, Llama-3.2-1B draft, 3B target, no KV cache, verify flat in width.
RTX3090_RELEASE = CostTable(
    "rtx3090-release",
    {level: LevelCost(0.0105, (verify,)) for level, verify in (("fp16", 0.020), ("int8", 0.090), ("nf4", 0.036))},
    source="SpecKV release (arXiv 2605.02888): one RTX 3090, Llama-3.2-1B draft, 3B target",
)

BUILT_IN = {RTX3090_RELEASE.name: RTX3090_RELEASE}


def load_cost(spec: str | Path) -> CostTable:
    """Return a built-in table by name, or read one from a JSON file.

    Raises
    ------
    UserError
        If the name is unknown or the file is not a cost table that this version reads.
    """
    if str(spec) in BUILT_IN:
        return BUILT_IN[str(spec)]
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"no cost table {str(spec)!r}: give a JSON file or one of {', '.join(BUILT_IN)}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"expected {FORMAT} version {VERSION}")
        levels = {}
        for name, numbers in document["levels"].items():
            try:
                levels[name] = LevelCost(**numbers)
            except (PolicyError, TypeError) as error:
                raise ValueError(f"at {name}, {error}") from None
        return CostTable(document["name"], levels, document.get("source", ""), document.get("details", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a cost table: {reason(error)}; write one with python -m experiments.profile"
        ) from error


def fit_level(records: Iterable[StepRecord]) -> LevelCost:
    """Fit one level's cost to measured steps, by medians throughout, so that stalls of a busy machine do not count.

    T_v has one median per width; widths that were not seen are interpolated, or continued at the average rate of
    growth. The draft's time is a line through the medians per number of forwards. The context slope is the median slope
    over pairs of steps of one width (Theil and Sen). First steps tell what the draft takes to read a prompt, and
    nothing else.

    Raises
    ------
    UserError
        If there is no record with a positive verify time.
    """
    rows = [
        (r.drafted, r.forwards, r.context_length, r.draft_seconds, r.verify_seconds, r.seconds, r.step) for r in records
    ]
    data = np.array([row for row in rows if row[4] > 0], dtype=float).reshape(-1, 7)
    first = data[data[:, 6] == 0, 1:4].T
    data = data[data[:, 6] > 0, :6]
    if not len(data):
        raise UserError("no timed steps to fit a cost table to: record some with python -m experiments.profile")
    drafted, forwards, context, draft, verify, total = data.T
    widths = drafted.astype(int) + 1
    centre = float(np.median(context))
    slope = _theil_sen(widths, context, verify)
    level = verify - slope * (context - centre)
    seen = np.unique(widths)
    medians = np.array([np.median(level[widths == w]) for w in seen])
    # A verify is never cheaper for being wider: what looks so is noise of the smaller sample.
    medians = np.maximum.accumulate(medians)
    table = np.interp(np.arange(1, WIDTHS + 1), seen, medians)
    growth = (medians[-1] - medians[0]) / max(1, seen[-1] - seen[0])
    table[seen[-1] :] = medians[-1] + growth * np.arange(1, WIDTHS - seen[-1] + 1)
    once, t_d = _draft_line(forwards[forwards > 0], draft[forwards > 0])
    overhead = max(0.0, float(np.median(total - draft - verify)))
    verify_seconds, catch_up = tuple(float(v) for v in table), _catch_up(first, once, t_d)
    return LevelCost(t_d, verify_seconds, overhead, slope, centre, catch_up_seconds=catch_up, first_draft_seconds=once)


def fit_cost(
    records: Mapping[str, Iterable[StepRecord]],
    name: str = "measured",
    source: str = "",
    details: Mapping[str, Any] | None = None,
) -> CostTable:
    """Fit a table to measured step records, given per level."""
    return CostTable(name, {level: fit_level(steps) for level, steps in records.items()}, source, details or {})


def _draft_line(forwards: np.ndarray, draft: np.ndarray) -> tuple[float, float]:
    """Return what the first forward of the draft takes on top, and each of them: zeros where there was none.

    Least squares on the medians by number of forwards, whose variance is taken to grow with that number.
    """
    if not len(forwards):
        return 0.0, 0.0
    j, counts = np.unique(forwards, return_counts=True)
    medians, weights = np.array([np.median(draft[forwards == n]) for n in j]), counts / j
    centre, middle = np.average(j, weights=weights), np.average(medians, weights=weights)
    spread = weights @ (j - centre) ** 2
    t_d = float(weights @ ((j - centre) * (medians - middle)) / spread) if len(j) > 1 else 0.0
    once = float(middle - t_d * centre)
    if len(j) < 2 or once < 0.0:  # neither may be below zero
        return 0.0, float(weights @ (j * medians) / (weights @ j**2))
    return (once, t_d) if t_d > 0.0 else (float(middle), 0.0)


def _catch_up(first: np.ndarray, once: float, t_d: float) -> float:
    """Median seconds per token of a prompt that the draft read in a first step; 0 where none did.

    Parameters
    ----------
    first : ndarray, shape (3, n)
        Forwards, context and draft seconds of first steps.
    once, t_d : float
        Seconds of a step's first forward on top, and per forward.
    """
    forwards, context, draft = first
    read = (forwards > 0) & (context > 1)
    if not read.any():
        return 0.0
    each = (draft - once - t_d * forwards)[read] / (context[read] - 1)
    return max(0.0, float(np.median(each)))


def _theil_sen(groups: np.ndarray, x: np.ndarray, y: np.ndarray, pairs: int = 20_000) -> float:
    """Median slope of y on x over random pairs of one group, zero or more; too short a range of x gives zero."""
    if np.ptp(x) < 32:
        return 0.0
    rng = np.random.default_rng(0)
    i, j = rng.integers(len(x), size=(2, pairs))
    usable = (groups[i] == groups[j]) & (np.abs(x[i] - x[j]) >= 16)
    if usable.sum() < 30:
        return 0.0
    i, j = i[usable], j[usable]
    return max(0.0, float(np.median((y[i] - y[j]) / (x[i] - x[j]))))
