"""Acceptance of drafts whose signals nobody sees: from what earlier drafts of the same request came to.

An online logistic regression over tested tokens. The log-odds of a request's j-th drafted token are a weighted sum of
the request's own acceptance so far (shrunk towards that of all requests), of how its latest draft ended, and of j. The
sums forget exponentially, as those of :class:`~policies.estimators.bayesian_linear.GaussianHead`, which keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from policies.base import MAX_GAMMA, State
from policies.estimators.bayesian_linear import GaussianHead, check_array

#: Features of a request: constant, log-odds of its acceptance, whether its latest draft was accepted as a whole, or not
#: at all; then how far a whole acceptance carries, and a number of each position, those from the last one on alike.
REQUEST, POSITIONS = 4, 8
SIZE = REQUEST + 1 + POSITIONS
#: Prior mean and standard deviation of the weights.
MEAN = np.array([0.0, 1.0, 0.3, -0.3, 0.0, *[0.0] * POSITIONS])
DEVIATION = np.array([0.7, 0.5, 0.5, 0.5, 0.5, *[0.3] * POSITIONS])
#: Tested tokens that all requests' acceptance counts for, in that of one, and what is kept of a request's own counts at
#: each of its drafts, and of all requests' at each step.
SHRINK, KEEP, KEEP_ALL = 4.0, 0.93, 0.99
#: Weight of a step's rows that is left after each later one, and steps between updates of the weights in use.
DISCOUNT, EVERY = 0.998, 16
#: Least weight p (1 - p) of a row.
FLOOR = 0.01


class Request:
    """What a request's drafts came to, lately.

    Attributes
    ----------
    hits, tested : float
        Tokens accepted and tested, older ones counting less.
    whole, none : float
        1 where the latest draft was accepted as a whole, or not at all.
    """

    __slots__ = ("hits", "none", "tested", "whole")

    def __init__(self) -> None:
        self.hits = self.tested = self.whole = self.none = 0.0

    def note(self, accepted: int, labelled: int) -> None:
        """Take in a draft."""
        self.hits = KEEP * self.hits + accepted
        self.tested = KEEP * self.tested + labelled
        self.whole, self.none = float(labelled == accepted), float(not accepted)


class HistoryModel:
    """The regression.

    Attributes
    ----------
    head : GaussianHead
        Its sums.
    hits, tested : float
        Of all requests, as those of one.
    """

    def __init__(self) -> None:
        self.head = GaussianHead(MEAN, np.diag(DEVIATION**-2.0), DISCOUNT)
        self.hits, self.tested = 1.0, 2.0
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._where = np.minimum(np.arange(MAX_GAMMA), POSITIONS - 1)
        self._far = np.minimum(np.arange(MAX_GAMMA), 4) / 4.0
        self._read()

    def describe(self, requests: Sequence[Request]) -> np.ndarray:
        """Return the features of requests, shape (rows, REQUEST)."""
        mean = SHRINK * self.hits / self.tested
        rows = [
            (1.0, log((r.hits + mean + 0.1) / (r.tested - r.hits + SHRINK - mean + 0.1)), r.whole, r.none)
            for r in requests
        ]
        return np.array(rows)

    def survival(self, about: np.ndarray, most: int) -> np.ndarray:
        """Return the chance that each request's first 1, 2, ... drafted tokens are all accepted, (rows, most)."""
        eta = (about @ self._own)[:, None] + self._by_place[:most] + about[:, 2:3] * self._carry[:most]
        found: np.ndarray = np.cumprod(1.0 / (1.0 + np.exp(-eta)), axis=1)
        return found

    def add(self, about: np.ndarray, labelled: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in what drafts came to, one of each described request; those with no tested token teach nothing."""
        self.hits = KEEP_ALL * self.hits + sum(accepted)
        self.tested = KEEP_ALL * self.tested + sum(labelled)
        self._waiting.append((about, np.array(labelled), np.array(accepted)))
        if len(self._waiting) >= EVERY or self.head.steps < EVERY:
            self.refresh()

    def refresh(self) -> None:
        """Learn from the drafts that wait."""
        self._fold()
        self.head.refresh()
        self._read()

    def _fold(self) -> None:
        for about, labelled, accepted in self._waiting:
            if not (count := int(labelled.sum())):
                continue
            row = np.repeat(np.arange(len(labelled)), labelled)
            j = np.arange(count) - np.repeat(np.cumsum(labelled) - labelled, labelled)
            phi = np.zeros((count, SIZE))
            phi[:, :REQUEST] = about[row]
            phi[:, REQUEST] = about[row, 2] * self._far[j]
            phi[np.arange(count), REQUEST + 1 + self._where[j]] = 1.0
            eta = phi @ self._weights
            p = 1.0 / (1.0 + np.exp(-np.clip(eta, -30.0, 30.0)))
            weight = np.maximum(p * (1.0 - p), FLOOR)
            root = np.sqrt(weight)
            self.head.add(phi * root[:, None], root * eta + ((j < accepted[row]) - p) / root)
        self._waiting.clear()

    def _read(self) -> None:
        self._weights = w = self.head.mean
        self._own = w[:REQUEST]
        self._by_place, self._carry = w[REQUEST + 1 :][self._where], w[REQUEST] * self._far

    def state(self) -> State:
        """All that was learnt, as arrays."""
        self._fold()
        return {f"history.{k}": v for k, v in self.head.state().items()} | {
            "history.all": np.array([self.hits, self.tested])
        }

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        self._waiting.clear()
        found = check_array(state, "history.all", (2,)).astype(float)
        self.head.load({k.removeprefix("history."): v for k, v in state.items() if k.startswith("history.head.")})
        self.hits, self.tested = found.tolist()
        self._read()

    def take_delta(self) -> State:
        """Sums since the last call."""
        self._fold()
        return {f"history.{k}": v for k, v in self.head.take_delta().items()}

    def merge(self, delta: State) -> None:
        """Add sums that another copy handed out."""
        self._fold()
        self.head.merge({k.removeprefix("history."): v for k, v in delta.items() if k.startswith("history.head.")})
        self._read()
