"""Acceptance of each drafted token as an online logistic regression, before and after the token is drafted.

Two heads share this file: ``before`` predicts whether the next token will be accepted, given those drafted so far in
the step; ``after`` knows the token's own signals too. Both are fitted by iteratively reweighted least squares: its sums
(A += s phi phi^T, b += s phi z with s = p (1 - p) and z the working response) forget exponentially and add up
over workers, like those of :class:`~policies.gaussian.GaussianHead`, which keeps them.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, NGRAM, Outcome, PolicyError, State
from policies.gaussian import GaussianHead, check_array

DIM = 10
#: Columns of the features that a step starts from, see :func:`start_features`.
START = 5
DEFAULT_PRIOR = Path(__file__).parent / "data" / "goodput.npz"
#: Steps that wait at most before they become rows.
WAITING = 64
#: Least weight p (1 - p) of a row: keeps one surprise from moving the weights by much.
FLOOR = 0.05


def log_odds(confidence: float) -> float:
    """Log-odds of a probability, kept within -4 and 6, in thirds."""
    if confidence <= 0.0180:
        return -4.0 / 3.0
    if confidence >= 0.9975:
        return 2.0
    return math.log(confidence / (1.0 - confidence)) / 3.0


def token_features(row: list[float]) -> tuple[float, float, float, float, float]:
    """Describe a drafted token by its signals: log-odds, entropy, log margin, n-gram agreement and disagreement."""
    n = row[NGRAM]
    return (
        log_odds(row[CONFIDENCE]),
        0.25 * row[ENTROPY],
        0.5 * math.log1p(max(row[MARGIN], 0.0)),
        0.5 + 0.125 * n if n > 0.0 else 0.0,
        0.5 - 0.125 * n if n < 0.0 else 0.0,
    )


def before_features(start: list[float], previous: tuple[float, ...] | None, j: int) -> list[float]:
    """Features of the j-th token (from 0) before it is drafted; ``previous`` describes the one before it."""
    acceptance, whole, lagged_odds, lagged_entropy, _ = start
    if previous is None:
        return [1.0, lagged_odds, lagged_entropy, 0.0, 0.0, 0.0, acceptance, whole, 0.0, 1.0]
    return [1.0, *previous, acceptance, whole, j * 0.125 if j < 8 else 1.0, 0.0]


def after_features(
    start: list[float], own: tuple[float, ...], previous: tuple[float, ...] | None, j: int
) -> list[float]:
    """Features of the j-th token (from 0) once it is drafted."""
    last = start[2] if previous is None else previous[0]
    return [1.0, *own, start[0], last, j * 0.125 if j < 8 else 1.0, start[1] if previous is None else 0.0]


def probability(weights: list[float], features: list[float]) -> float:
    """Logistic regression's probability."""
    eta = sum(map(float.__mul__, weights, features))
    if eta > 30.0:
        return 1.0
    return 1.0 / (1.0 + math.exp(-eta)) if eta > -30.0 else 0.0


def prior_means() -> tuple[np.ndarray, np.ndarray]:
    """Weights (before, after) that hold without any data: a drafted token is accepted as often as the draft believes,
    and one not drafted yet as often as the sequence's tokens were lately."""
    before, after = np.zeros(DIM), np.zeros(DIM)
    before[6] = 3.0
    after[1] = 3.0
    return before, after


class Hazard:
    """The two heads, their data, and their files.

    Parameters
    ----------
    path : str or Path
        An npz with arrays ``before``, ``after`` (10,) and ``before_precision``, ``after_precision`` (10, 10); empty for
        the shipped one if there is one, else, and for ``none``, :func:`prior_means`.
    strength : float
        How many tested tokens the prior is worth at most.
    discount : float
        Forgetting per step.

    Attributes
    ----------
    before, after : list of float
        Weights in use, as of the latest :meth:`refresh`.
    """

    def __init__(self, path: str | Path = "", strength: float = 500.0, discount: float = 0.9995) -> None:
        if not 0 < strength < float("inf") or not 0 < discount <= 1:
            raise PolicyError(f"strength must be above 0 and discount in (0, 1], got {strength} and {discount}")
        means, precisions = load_prior(path, strength)
        self.heads = tuple(GaussianHead(m, a, discount, noise=1.0) for m, a in zip(means, precisions, strict=True))
        self._steps: list[tuple[list[float], list[list[float]], int]] = []
        self._read()

    @property
    def pending(self) -> int:
        """Steps not learnt from yet."""
        return len(self._steps)

    def add(self, start: list[float], outcome: Outcome) -> None:
        """Note a step: its tested tokens and how many of them were accepted."""
        self._steps.append((start, outcome.signals[: outcome.tested].tolist(), outcome.accepted))
        if len(self._steps) >= WAITING:
            self._linearise()

    def _linearise(self) -> None:
        """Turn the noted steps into weighted rows of both heads, at the weights in use."""
        if not self._steps:
            return
        before: list[list[float]] = []
        after: list[list[float]] = []
        labels: list[float] = []
        lengths: list[int] = []
        for start, rows, accepted in self._steps:
            previous = None
            for j, row in enumerate(rows):
                own = token_features(row)
                before.append(before_features(start, previous, j))
                after.append(after_features(start, own, previous, j))
                labels.append(1.0 if j < accepted else 0.0)
                previous = own
            lengths.append(len(rows))
        self._steps.clear()
        y = np.array(labels)
        for head, features, weights in zip(self.heads, (before, after), (self._w_before, self._w_after), strict=True):
            phi = np.array(features)
            eta = phi @ weights
            p = 1.0 / (1.0 + np.exp(-np.clip(eta, -30.0, 30.0)))
            s = np.sqrt(np.maximum(p * (1.0 - p), FLOOR))
            phi *= s[:, None]
            head.add(phi, s * eta + (y - p) / s, list(lengths))

    def refresh(self) -> None:
        """Learn from the noted steps."""
        self._linearise()
        for head in self.heads:
            head.refresh()
        self._read()

    def _read(self) -> None:
        self._w_before, self._w_after = (head.mean for head in self.heads)
        self.before, self.after = self._w_before.tolist(), self._w_after.tolist()

    def state(self) -> State:
        """Sums of both heads, as arrays."""
        self._linearise()
        return _prefixed(self.heads, [head.state() for head in self.heads])

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        self._steps.clear()
        for name, head in zip(("before", "after"), self.heads, strict=True):
            head.load(_part(state, name))
        self._read()

    def take_delta(self) -> State:
        """Sums since the last call."""
        self._linearise()
        return _prefixed(self.heads, [head.take_delta() for head in self.heads])

    def merge(self, delta: State) -> None:
        """Add sums that another copy handed out."""
        self._linearise()
        for name, head in zip(("before", "after"), self.heads, strict=True):
            head.merge(_part(delta, name))
        self._read()

    def restore_delta(self, delta: State) -> None:
        """Hand a taken delta back."""
        for name, head in zip(("before", "after"), self.heads, strict=True):
            head.restore_delta(_part(delta, name))

    def save_prior(self, path: str | Path) -> None:
        """Write what was learnt as a prior for later runs (an npz that the constructor reads)."""
        self.refresh()
        arrays: State = {}
        for name, head in zip(("before", "after"), self.heads, strict=True):
            arrays[name] = head.mean
            arrays[f"{name}_precision"] = head.prior_precision + head.state()["head.sums"][:, :-1]
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)


def load_prior(path: str | Path, strength: float) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return prior means and precisions of (before, after)."""
    if path == "none" or (not path and not DEFAULT_PRIOR.is_file()):
        # Information of one typical row is about 0.15 phi phi^T.
        return prior_means(), (0.15 * 0.05 * strength * np.eye(DIM),) * 2
    file = Path(path or DEFAULT_PRIOR)
    if not file.is_file() or not zipfile.is_zipfile(file):
        raise PolicyError(f"no npz with acceptance weights at {file}: train some, or leave the option out")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state = {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise PolicyError(f"cannot read acceptance weights from {file}: {error}") from error
    means = tuple(check_array(state, name, (DIM,)).astype(float) for name in ("before", "after"))
    precisions = []
    for name in ("before", "after"):
        a = check_array(state, f"{name}_precision", (DIM, DIM)).astype(float)
        # The corner belongs to the constant: the information of all rows together, at 0.15 each about their number.
        a = a * min(1.0, 0.15 * strength / a[0, 0]) + 1e-3 * np.eye(DIM)
        precisions.append(0.5 * (a + a.T))
    return means, tuple(precisions)


def _prefixed(heads: tuple[GaussianHead, ...], states: list[State]) -> State:
    return {f"{n}.{k}": v for n, state in zip(("before", "after"), states, strict=True) for k, v in state.items()}


def _part(state: State, name: str) -> State:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
