"""Acceptance of each drafted token as an online logistic regression, before and after the token is drafted.

Two heads share this file: ``before`` predicts whether the next token will be accepted, given those drafted so far in
the step and how drafts after the same tokens fared (:mod:`policies.acceptance.context_table`); ``after`` knows the
token's own signals too, and MLP16's hidden layer as of the step's tokens up to it. The log-odds are x.(w + d) + m x.v +
m^2 q, with m the level's draft quality (:mod:`policies.acceptance.draft_quality`) and w, v and q fitted offline; of the
hidden layer, w is MLP16's own pretrained output layer and v is zero. The correction d is fitted online by
iteratively reweighted least squares: its sums (A += s phi phi^T, b += s phi z with s = p (1 - p) and z the working
response) forget exponentially and add up over workers, like those of
:class:`~policies.estimators.bayesian_linear.GaussianHead`, which keeps them.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from policies.acceptance.context_table import SHAPE, TokenHistory
from policies.acceptance.draft_quality import DOUBT, DraftQuality
from policies.acceptance.features import BEFORE, NUMBERS, OWN, rows
from policies.acceptance.mlp16 import HIDDEN, StepNet, Weights, resolve_weights
from policies.acceptance.step import Net, Step
from policies.base import PolicyError, State, reason
from policies.estimators.bayesian_linear import GaussianHead, check_array, check_start, fingerprint

#: Features of both heads that an npz has weights of, and all of them.
HEADS = {"before": BEFORE, "after": OWN}
AFTER = OWN + HIDDEN
DEFAULT_PRIOR = Path(__file__).parents[1] / "data" / "online.npz"
#: Steps that wait at most before they become rows.
WAITING = 256
#: Least weight p (1 - p) of a row: keeps one surprise from moving the weights by much.
FLOOR = 0.005
#: How many times as fast the quality of a draft is forgotten: it is one number, and another draft has another.
QUALITY = 5.0


def prior_means() -> tuple[np.ndarray, np.ndarray]:
    """Weights (before, after) that hold without any data: a drafted token is accepted as often as the draft believes,
    and one not drafted yet as often as the sequence's tokens were lately."""
    before, after = np.zeros(2 * BEFORE + 1), np.zeros(2 * OWN + 1)
    before[6] = 3.0
    after[1] = 3.0
    return before, after


class AcceptanceModel:
    """The two heads, their data, and their files.

    Parameters
    ----------
    path : str or Path
        An npz with arrays ``before`` and ``after`` (33,), each w, v and q; ``before_precision`` and ``after_precision``
        (16, 16) of w; and ``history``, the table of :class:`~policies.acceptance.context_table.TokenHistory`; empty for
        the shipped one if there is one, else, and for ``none``, :func:`prior_means`. ``mlp16`` (), which may be
        missing, is what MLP16's predicted rate counts in log-odds.
    strength : float
        How many tested tokens the prior is worth at most.
    discount : float
        Forgetting per step.
    weights : str, Path or Weights
        MLP16: an npz; the shipped one by default.

    Attributes
    ----------
    quality : DraftQuality
        How good the draft is at each level.
    history : TokenHistory
        How drafts after the same tokens fared.
    """

    def __init__(
        self,
        path: str | Path = "",
        strength: float = 1500.0,
        discount: float = 0.9995,
        weights: str | Path | Weights = "",
    ) -> None:
        if not 0 < strength < float("inf") or not 0 < discount <= 1:
            raise PolicyError(f"strength must be above 0 and discount in (0, 1], got {strength} and {discount}")
        self.net = StepNet(resolve_weights(weights))
        prior = with_mlp16(load_prior(path, strength), self.net.weights, strength)
        self.heads = tuple(GaussianHead(w, a, discount) for w, a in zip(prior.means, prior.precisions, strict=True))
        self._slopes, self._curves = prior.slopes, prior.curves
        self._rate = prior.rate
        self._start = fingerprint(*prior.means, *prior.slopes, prior.curves, self.net.matrix)
        self.quality = DraftQuality(discount**QUALITY)
        self.history = TokenHistory(prior.history, discount)
        self._clear()
        self._read()

    @property
    def pending(self) -> int:
        """Steps not learnt from yet."""
        return len(self._levels)

    def weights(self, level: str) -> tuple[list[float], list[float], Net]:
        """Return both heads' weights in use at a level, as of the latest :meth:`refresh`, and MLP16's."""
        found = self._weights.get(level)
        if found is None:
            m = self.quality.value(level)
            parts = []
            for head, slope, curve in zip(self.heads, self._slopes, self._curves, strict=True):
                w = head.mean + m * slope
                w[0] += m * m * curve
                parts.append(w)
            before, after = parts
            net = self.net.units, self.net.rest(level).tolist(), after[OWN:].tolist()
            found = self._weights[level] = before.tolist(), after[:OWN].tolist(), net
        return found

    def known(self, level: str) -> float:
        """Return how much is known of a level, in steps, as of the latest :meth:`refresh`."""
        found = self._known.get(level)
        if found is None:
            found = self._known[level] = min(self.heads[0].steps, self.quality.information(level))
        return found

    def add(self, step: Step, labelled: int, accepted: int) -> None:
        """Note a step: how many of its tokens, all described, were tested and accepted."""
        surplus = variance = 0.0
        (numbers, labels), note, memory = self._tested, self.history.note, step.memory
        count = len(labels)
        for j, where, p, about in step.asked:
            if j >= labelled:
                break
            numbers += about
            hit = j < accepted
            note(memory, where, hit)
            labels.append(1.0 if hit else 0.0)
            surplus += hit - p
            variance += p * (1.0 - p) + DOUBT
        self._levels.append(step.level)
        self._lengths.append(len(labels) - count)
        if self.quality.surprised(step.level, surplus, variance):
            self._known.clear()
            self._alarms[step.level] = len(labels)
        self.history.step()
        if len(self._levels) >= WAITING:
            self._linearise()

    def remember(self, step: Step, labelled: int, accepted: int) -> None:
        """Note a step in what its text remembers, and learn nothing from it."""
        for j, where, _, _ in step.asked:
            if j < labelled:
                self.history.remember(step.memory, where, j < accepted)

    def _linearise(self) -> None:
        """Turn the noted steps into weighted rows of both heads, at the weights in use."""
        names, lengths, (numbers, labels), alarms = self._levels, self._lengths, self._tested, self._alarms
        if not names:
            return
        self._clear()
        levels = list(dict.fromkeys(names))
        at = np.repeat([levels.index(name) for name in names], lengths)
        half_age = np.repeat(0.5 * self.quality.discount ** np.arange(len(lengths) - 1, -1, -1), lengths)
        y, m = np.array(labels), np.array([self.quality.value(level) for level in levels])[at]

        packed = struct.pack(f"{len(numbers)}d", *numbers)  # numpy takes twice as long to read lists
        table = np.frombuffer(packed).reshape(-1, NUMBERS)
        before, after = rows(table)
        units = self.net.hidden(levels, at, table[:, 16:], table[:, 15].astype(int) + 1)
        sums = np.zeros((2, len(levels)))
        members = (at == np.arange(len(levels))[:, None]).astype(float)
        formers = [(level, m) for level, m in self.quality.formers().items() if level in levels]
        better = dict.fromkeys([level for level, _ in formers], 0.0)
        for head, slope, curve, phi in zip(
            self.heads, self._slopes, self._curves, (before, np.hstack([after, units])), strict=True
        ):
            own, by_quality = (phi @ np.column_stack([head.mean, slope])).T
            eta = own + m * (by_quality + curve * m)
            for level, former in formers:
                mine = (at == levels.index(level)) & (np.arange(len(at)) >= alarms.get(level, 0))
                other = own[mine] + former * (by_quality[mine] + curve * former)
                gain = y[mine] * (other - eta[mine]) - np.logaddexp(0.0, other) + np.logaddexp(0.0, eta[mine])
                better[level] += 0.5 * float(gain.sum())  # half: both heads tell of the same tokens
            p = 1.0 / (1.0 + np.exp(-np.minimum(np.maximum(eta, -30.0), 30.0)))
            variance = np.maximum(p * (1.0 - p), FLOOR)
            error, root = y - p, np.sqrt(variance)
            gradient = by_quality + 2.0 * curve * m
            information = half_age * variance * gradient**2  # half: both heads tell of the same tokens
            score = information * m + half_age * gradient * error
            sums += members @ information, members @ score
            head.add(phi * root[:, None], root * own + error / root, lengths)
        self.quality.add(dict(zip(levels, sums.T, strict=True)), len(lengths))
        for level, gain in better.items():
            self.quality.compare(level, gain)

    def refresh(self) -> None:
        """Learn from the noted steps."""
        self._linearise()
        for head in self.heads:
            head.refresh()
        self._read()

    def forget(self) -> None:
        """Return to the prior."""
        self._clear()
        for head in self.heads:
            head.forget()
        self.quality.forget()
        self.history.forget()
        self._read()

    def _clear(self) -> None:
        """Drop the noted steps."""
        # Level and number of tested tokens of each; what describes those, one behind the other, and labels.
        self._levels, self._lengths = list[str](), list[int]()
        self._tested = list[float](), list[float]()
        # By level, how many tested tokens were noted when its draft seemed to be another one.
        self._alarms = dict[str, int]()

    def _read(self) -> None:
        self._weights: dict[str, tuple[list[float], list[float], Net]] = {}
        self._known: dict[str, float] = {}

    def state(self) -> State:
        """All that was learnt, as arrays."""
        self._linearise()
        own = {"hazard.start": self._start}
        return own | _prefixed([head.state() for head in self.heads]) | self.quality.state() | self.history.state()

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        check_start(state, "hazard.start", self._start)
        self._clear()
        for name, head in zip(HEADS, self.heads, strict=True):
            head.load(_part(state, name))
        self.quality.load(state)
        self.history.load(state)
        self._read()

    def take_delta(self) -> State:
        """Sums since the last call."""
        self._linearise()
        own = {"hazard.start": self._start} | _prefixed([head.take_delta() for head in self.heads])
        return own | self.quality.take_delta() | self.history.take_delta()

    def merge(self, delta: State) -> None:
        """Add sums that another copy handed out."""
        if delta and "before.head.sums" not in delta:
            raise PolicyError("the delta holds no sums of acceptance: merge deltas of the same policy only")
        check_start(delta, "hazard.start", self._start)
        self._linearise()
        for name, head in zip(HEADS, self.heads, strict=True):
            head.merge(_part(delta, name))
        self.quality.merge(delta)
        self.history.merge(delta)
        self._read()

    def save_prior(self, path: str | Path) -> None:
        """Write what was learnt as a prior for later runs (an npz that the constructor reads)."""
        self.refresh()
        arrays: State = {"history": self.history.table(), "mlp16": np.array(self._rate)}
        for (name, d), head, slope, curve in zip(HEADS.items(), self.heads, self._slopes, self._curves, strict=True):
            arrays[name] = np.concatenate([head.mean[:d], slope[:d], [curve]])
            arrays[f"{name}_precision"] = (head.prior_precision + head.state()["head.sums"][:, :-1])[:d, :d]
        arrays["after"][0] -= self._rate * self.net.weights.b2[0]
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)


class Prior(NamedTuple):
    """What both heads start from: w, v and q of each, the precisions of w, the table of token histories if there is
    one, and what MLP16's predicted rate counts in log-odds."""

    means: tuple[np.ndarray, ...]
    slopes: tuple[np.ndarray, ...]
    curves: np.ndarray
    precisions: tuple[np.ndarray, ...]
    history: np.ndarray | None
    rate: float


def load_prior(path: str | Path, strength: float) -> Prior:
    """Return what an npz holds, without MLP16's hidden layer."""
    if path == "none" or (not path and not DEFAULT_PRIOR.is_file()):
        # Information of one typical row is about 0.15 phi phi^T.
        return _split(prior_means(), [0.15 * 0.05 * strength * np.eye(d) for d in HEADS.values()], None, 0.0)
    file = Path(path or DEFAULT_PRIOR)
    if not file.is_file() or not zipfile.is_zipfile(file):
        raise PolicyError(f"no npz with acceptance weights at {file}: give acceptance=FILE.npz, or none to start cold")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state = {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise PolicyError(f"cannot read acceptance weights from {file}: {reason(error)}") from error
    means = [check_array(state, name, (2 * d + 1,)).astype(float) for name, d in HEADS.items()]
    precisions = []
    for name, d in HEADS.items():
        a = check_array(state, f"{name}_precision", (d, d)).astype(float)
        # The corner belongs to the constant: the information of all rows together, at 0.15 each about their number.
        a = a * min(1.0, 0.15 * strength / a[0, 0]) + 1e-3 * np.eye(d)
        precisions.append(0.5 * (a + a.T))
    rate = float(check_array(state, "mlp16", ())) if "mlp16" in state else 0.0
    return _split(means, precisions, check_array(state, "history", SHAPE), rate)


def _split(
    means: Sequence[np.ndarray], precisions: Sequence[np.ndarray], history: np.ndarray | None, rate: float
) -> Prior:
    d = [len(a) for a in precisions]
    w, v = (tuple(found[i * n : (i + 1) * n] for found, n in zip(means, d, strict=True)) for i in (0, 1))
    return Prior(w, v, np.array([found[-1] for found in means]), tuple(precisions), history, rate)


def with_mlp16(prior: Prior, weights: Weights, strength: float) -> Prior:
    """Return the prior with MLP16's hidden layer behind the features of the second head, its output layer their mean.

    How sure it is of them is told by the offline data's own moments of the hidden layer, where the weights have those.
    """
    (before, own), rate = prior.means, prior.rate
    own = own.copy()
    own[0] += rate * weights.b2[0]
    after = np.append(own, rate * weights.W2[:, 0])
    precision = np.zeros((AFTER, AFTER))
    precision[:OWN, :OWN] = prior.precisions[1]
    precision[OWN:, OWN:] = 0.15 * strength * weights.moments[:HIDDEN, :HIDDEN]
    slopes = prior.slopes[0], np.append(prior.slopes[1], np.zeros(HIDDEN))
    return prior._replace(means=(before, after), slopes=slopes, precisions=(prior.precisions[0], precision))


def _prefixed(states: list[State]) -> State:
    return {f"{n}.{k}": v for n, state in zip(HEADS, states, strict=True) for k, v in state.items()}


def _part(state: State, name: str) -> State:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
