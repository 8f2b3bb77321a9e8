"""Acceptance of drafts whose signals nobody sees: from what earlier drafts of the same request came to.

An online logistic regression over tested tokens. The log-odds of a request's j-th drafted token are a weighted sum of
the request's own acceptance so far (shrunk towards that of all requests), of how its latest draft ended, and of j. The
sums forget exponentially, as those of :class:`~policies.estimators.bayesian_linear.GaussianHead`, which keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.base import MAX_GAMMA, State
from policies.estimators.bayesian_linear import BUFFER, GaussianHead, check_array

#: Features of a request: constant, log-odds of its acceptance, whether its latest draft was accepted as a whole, or not
#: at all; then how far a whole acceptance carries, and a number of each position, those from the last one on alike.
REQUEST, POSITIONS = 4, 8
SIZE = REQUEST + 1 + POSITIONS
#: Prior mean and standard deviation of the weights.
MEAN = np.array([0.0, 1.0, 0.3, -0.3, 0.0, *[0.0] * POSITIONS])
DEVIATION = np.array([0.7, 0.5, 0.5, 0.5, 0.5, *[0.3] * POSITIONS])
#: Tested tokens that all requests' acceptance counts for, in that of one, and what is kept of a request's own counts at
#: each of its drafts, and of all requests' at each step; what is left of all requests' counts at least.
SHRINK, KEEP, KEEP_ALL, LEAST = 4.0, 0.93, 0.96, 8.0
#: Weight of a step's rows that is left after each later one, and steps between updates of the weights in use.
DISCOUNT, EVERY = 0.998, 16
#: Least weight p (1 - p) of a row.
FLOOR = 0.01


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
        self.hits, self.tested = 2.0, 4.0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._tokens = 0
        self._where = np.minimum(np.arange(MAX_GAMMA), POSITIONS - 1)
        self._far = np.minimum(np.arange(MAX_GAMMA), 4) / 4.0
        # By slot: tokens accepted and tested, older ones counting less; 1 where the latest draft was accepted as a
        # whole, or not at all.
        self._requests = np.zeros((16, 4))
        self._table: np.ndarray | None = None
        self._width = 1
        self._read()

    def start(self, slot: int) -> None:
        """Begin a request: nothing is known of the one that had its slot."""
        if slot >= len(self._requests):
            self._requests = np.concatenate((self._requests, np.zeros((slot + 1, 4))))
        self._requests[slot] = 0.0
        self._table = None

    def survival(self, most: int) -> np.ndarray:
        """Return the chance that the first 1, 2, ... drafted tokens are all accepted, of ``most`` or more, by slot."""
        if self._table is None or most > self._table.shape[1]:
            self._width = max(self._width, most)
            about = self._about = self._requests.copy()
            hits, tested = about[:, 0], about[:, 1]
            mean = SHRINK * self.hits / self.tested
            np.log((hits + (mean + 0.1)) / (tested - hits + (SHRINK - mean + 0.1)), out=tested)
            about[:, 0] = 1.0
            eta = about @ self._columns[:, : self._width]
            eta += self._by_place[: self._width]
            np.exp(np.negative(eta, out=eta), out=eta)
            eta += 1.0
            self._table = (1.0 / eta).cumprod(axis=1)
        return self._table

    def add(self, slots: Sequence[int], tested: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in what a step's drafts came to, each of one tested token or more."""
        self.survival(1)
        at, total = np.array(slots), sum(tested)
        new = np.array((accepted, tested)).T
        if self._tokens + total > BUFFER:
            self._fold()
        self._waiting.append((self._about[at], new))
        self._tokens += total
        self.hits = KEEP_ALL * self.hits + sum(accepted)
        self.tested = KEEP_ALL * self.tested + total
        found = self._requests[at]
        found[:, :2] *= KEEP
        found[:, :2] += new
        hits = new[:, 0]
        found[:, 2], found[:, 3] = hits == new[:, 1], hits == 0
        self._requests[at] = found
        self._table = None
        if len(self._waiting) >= EVERY or self.head.steps < EVERY:
            self.refresh()

    def fade(self, steps: int) -> None:
        """Let what is known of all requests count less, as it does after steps without drafts; the rate stays."""
        keep = KEEP_ALL**steps
        if self.tested * keep > LEAST:
            self.hits *= keep
            self.tested *= keep

    def refresh(self) -> None:
        """Learn from the drafts that wait."""
        self._fold()
        self.head.refresh()
        self._read()

    def _fold(self) -> None:
        """Hand the drafts that wait to the regression; of very many tokens in a step the first ones."""
        if not self._waiting:
            return
        about = np.concatenate([rows for rows, _ in self._waiting])
        hits, tested = np.concatenate([found for _, found in self._waiting]).T
        lengths = [int(found[:, 1].sum()) for _, found in self._waiting]
        self._waiting.clear()
        self._tokens, count = 0, sum(lengths)
        row = np.arange(len(tested)).repeat(tested)
        j = np.arange(count) - (tested.cumsum() - tested)[row]
        phi = np.zeros((count, SIZE))
        phi[:, :REQUEST] = about[row]
        phi[:, REQUEST] = about[row, 2] * self._far[j]
        phi[np.arange(count), REQUEST + 1 + self._where[j]] = 1.0
        eta = phi @ self._weights
        p = 1.0 / (1.0 + np.exp(-np.clip(eta, -30.0, 30.0)))
        weight = np.maximum(p * (1.0 - p), FLOOR)
        root = np.sqrt(weight)
        phi *= root[:, None]
        y = root * eta + ((j < hits[row]) - p) / root
        if count > BUFFER:
            phi, y, lengths = phi[:BUFFER], y[:BUFFER], [BUFFER]
        self.head.add(phi, y, lengths)

    def _read(self) -> None:
        self._weights = w = self.head.mean
        self._by_place, self._table = w[REQUEST + 1 :][self._where], None
        self._columns = np.repeat(w[:REQUEST, None], MAX_GAMMA, axis=1)
        self._columns[2] += w[REQUEST] * self._far

    def state(self) -> State:
        """All that was learnt, as arrays."""
        self._fold()
        return {f"history.{k}": v for k, v in self.head.state().items()} | {
            "history.all": np.array([self.hits, self.tested])
        }

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        self._waiting.clear()
        self._tokens = 0
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
