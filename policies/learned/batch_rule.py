"""What `online` does in batches: one decision for all rows, by the marginal seconds of the whole forward.

The unit is a token: the seconds that a batch which drafts nothing takes for one, over how many times as fast the
batch is lately. A row's next token is worth its chance to be accepted, times what an accepted token of this row saves.
Rows end at different times: a token of the last row saves a step of its own, one of a row that ends early only makes
later steps narrower by a row. Whose row ends last is not known, so the savings are averaged over rows with about as
much left.

- Submitting: of all drafted tokens of all rows, those of the highest survival are sent, as many as pay for the seconds
  by which they widen the forward.
- Drafting: a round of the draft model costs a share that is paid once, and a share per row. A row gains what its token
  is worth beyond the price of its verification, in case it looks good once it is drafted: the chance after drafting
  is taken to be a beta variable whose mean is the chance before. The round pays if the rows' gains do, for one round or
  for several.
- Lookups take no forward; a row turns to them where that gains more.
- Where the draft has to read much first, the gains of all steps to come have to pay for the reading. How much of the
  expected gains came true lately is a factor of theirs.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import NamedTuple

import numpy as np

from policies.acceptance.step import Step
from policies.costs.batch_costs import BatchCosts

#: Rounds that a plan looks ahead.
AHEAD = 4
#: The chance of a drafted token is taken to be a beta variable with so many pseudo-counts.
SPREAD = 2.5
#: Rows' remaining tokens that differ by NEAR, and by SHARE of what is left, count as about the same.
NEAR, SHARE = 2.0, 0.1
#: Tokens that the draft may have to read without a look at all that is left; log V's doubt above which nothing is known
#: of a forward's slope; steps after which the draft is tried all the same.
FEW, DOUBTFUL, PATIENCE = 4, 0.15, 12
#: Tokens that the expected gains of the draft are worth beforehand, and what is kept of the account at each step.
BELIEF, KEEP = 4.0, 0.995
#: Share of what is left that a text uses before it ends, about. Tokens that texts may have lost by reading for the
#: draft, beyond which no more is read, and what is kept of that account at each step.
USED, DEBT, FORGIVE = 0.5, 10.0, 0.998
#: Kept of the account of the latest rate at each step.
LATELY = 0.98
#: The row that ends last gains less than the rows do on the whole, the more so the more there are: a power of that.
LAST = -0.15
_GRID = 64


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return E[(P - c)+] and Pr[P > c] for P beta of mean p, by p and c on a grid of 0 to 1.

    Sums, no products of matrices: those wake the threads of a BLAS, which then take the cores of the next forwards.
    """
    edges = (1.0 - np.cos(np.linspace(0.0, np.pi, 2049))) / 2.0
    x = (edges[1:] + edges[:-1]) / 2.0
    grid = np.linspace(0.0, 1.0, _GRID + 1)
    means = np.clip(grid, 0.004, 0.996)[:, None]
    log_density = (SPREAD * means - 1.0) * np.log(x) + (SPREAD * (1.0 - means) - 1.0) * np.log1p(-x)
    mass = np.exp(log_density) * np.diff(edges)
    mass /= mass.sum(axis=1, keepdims=True)
    # Of the x above each c: their mass, and their mass times x.
    whole, weighted = (np.cumsum(m[:, ::-1], axis=1)[:, ::-1] for m in (mass, mass * x))
    whole, weighted = (np.pad(m, ((0, 0), (0, 1)))[:, np.searchsorted(x, grid, "right")] for m in (whole, weighted))
    return weighted - grid * whole, whole


class Prices(NamedTuple):
    """What a step of so many rows costs, in tokens.

    Attributes
    ----------
    wider : ndarray
        By K, what K more tokens in the forward cost.
    slope, most : float
        What one more token costs about, and what it may cost.
    first, each_round, each, read : float
        Of drafting, see :attr:`~policies.costs.batch_costs.BatchCosts.draft`.
    savings : ndarray, shape (rows,)
        What an accepted token saves, of the row that has the most left, the second most, ...
    pads : bool
        Whether all rows are as wide as the widest.
    may_drop : bool
        Whether drafted tokens may be dropped.
    """

    wider: np.ndarray
    slope: float
    most: float
    first: float
    each_round: float
    each: float
    read: float
    savings: np.ndarray
    pads: bool
    may_drop: bool

    @classmethod
    def of(cls, costs: BatchCosts, rows: int, gain: float, pads: bool, may_drop: bool) -> Prices:
        """Return the prices where tokens come ``gain`` times as fast as without drafts."""
        verify = np.array(costs.verify)
        token = costs.plain(rows) / rows / gain
        wider = (verify[rows:] - verify[rows]) / token
        few = rows if pads else max((rows + 1) // 2, 1)
        times = verify[: rows + 1] + costs.rest * np.arange(rows + 1)
        savings = np.maximum(np.diff(times), 0.0) / (token * gain)
        savings[0] *= rows**LAST
        first, each_round, each, read = (seconds / token for seconds in costs.draft)
        slope = float(wider[few]) / few
        dear = verify[rows + few] * exp(costs.doubt(rows, rows + few)) - verify[rows]
        return cls(wider, slope, float(dear) / few / token, first, each_round, each, read, savings, pads, may_drop)

    def worth(self, remaining: list[int]) -> np.ndarray:
        """Return what an accepted token of each row saves, shape (rows,)."""
        left = np.array(remaining, dtype=float)
        ranked = np.sort(left)[::-1]
        near = np.exp(-np.abs(left[:, None] - ranked) / (NEAR + SHARE * left.mean()))
        found: np.ndarray = near @ self.savings / near.sum(axis=1)
        return found

    def lookup(self, chance: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return what going on with lookups gains each row, the next of which is right with a chance."""
        gain, survival = np.zeros(len(chance)), value.copy()
        for _ in range(AHEAD):
            survival = survival * chance
            gain += np.maximum(survival - self.slope, 0.0)
        return gain

    def plan(self, chance: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return what drafting on with the model gains each row in one, two, ... rounds, shape (AHEAD, rows).

        What the rounds cost for all rows is left out.

        Parameters
        ----------
        chance : ndarray
            That the next token is accepted if those before it are.
        value : ndarray
            What the tokens so far are worth if accepted, by their chance: survival times :meth:`worth`.
        """
        found, so_far = np.empty((AHEAD, len(chance))), np.zeros(len(chance))
        going, value = np.ones(len(chance)), np.maximum(value, 1e-9)
        at = np.minimum((chance * _GRID + 0.5).astype(int), _GRID)
        for row in found:
            price = self.slope / value
            if self.may_drop:  # a token that looks bad once it is drafted need not be submitted
                where = np.minimum((price * _GRID + 0.5).astype(int), _GRID)
                over, passes = (table[at, where] for table in tables())
                so_far = so_far + going * (value * over - self.each)
                going = going * passes
                hit = np.minimum(price + over / np.maximum(passes, 1e-9), 1.0)
                value = np.maximum(value * hit, 1e-9)
            else:
                value = np.maximum(value * chance, 1e-9)
                so_far = so_far + value - self.slope - self.each
            row[:] = so_far
        return found

    def rounds(self, gains: np.ndarray, instead: np.ndarray, begun: bool) -> tuple[float, np.ndarray]:
        """Return what the best number of rounds gains beyond what else the rows would do, and which rows take part.

        ``begun`` says whether the step had a round already.
        """
        beyond = np.maximum(gains - instead, 0.0)
        totals = beyond.sum(axis=1) - self.each_round * np.arange(1, AHEAD + 1)
        most = int(totals.argmax())
        return float(totals[most]) - (0.0 if begun else self.first), beyond[most] > 0.0

    def best(self, survivals: list[list[float]], worth: list[float]) -> list[int]:
        """Return how many of each row's drafted tokens to submit.

        ``survivals`` are those of each row's first, second, ... token.
        """
        counts = [len(row) for row in survivals]
        if not sum(counts):
            return counts
        if self.pads:
            width = max(counts)
            table = np.zeros((len(counts), width))
            for i, row in enumerate(survivals):
                table[i, : len(row)] = worth[i] * np.array(row)
            rows = len(self.savings)
            net = np.cumsum(table.sum(axis=0)) - self.wider[rows * np.arange(1, width + 1)]
            most = int(net.argmax()) + 1 if net.max() > 0.0 else 0
            return [min(count, most) for count in counts]
        values = np.concatenate([w * np.array(row) for w, row in zip(worth, survivals, strict=True)])
        owner = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(-values, kind="stable")
        net = np.cumsum(values[order]) - self.wider[1 : len(values) + 1]
        at = int(net.argmax())
        if net[at] <= 0.0:
            return [0] * len(counts)
        found: list[int] = np.bincount(owner[order[: at + 1]], minlength=len(counts)).tolist()
        return found


class RowStep:
    """What a decision about a row of a batch keeps.

    Attributes
    ----------
    step : Step or None
        The row's step where the model may draft.
    prices : Prices or None
        Of the step under way; None where nothing is weighed.
    worth : float
        What an accepted token of the row saves.
    """

    __slots__ = ("prices", "step", "worth")

    def __init__(self, step: Step | None, prices: Prices | None, worth: float) -> None:
        self.step, self.prices, self.worth = step, prices, worth


class Account:
    """How a level's batches fare lately.

    Attributes
    ----------
    expected, true : float
        Gains of the draft that were expected, and what came true of them, in tokens.
    net : float
        What came true of the draft's gains, less what it cost to read.
    tokens, plain : float
        Tokens of the latest steps, and what no drafts would have made in the same seconds.
    waited : int
        Steps that the draft was not considered in, as too little is known of forwards.
    """

    def __init__(self) -> None:
        self.expected = self.true = self.net = 0.0
        self.tokens = self.plain = 0.0
        self.waited = 0

    @property
    def factor(self) -> float:
        """What is to be expected of gains of the draft, as a share of what the plan says."""
        return min(max((BELIEF + self.true) / (BELIEF + self.expected), 0.0), 1.5)

    @property
    def gain(self) -> float:
        """How many times as many tokens as without drafts came of the latest steps; at least one."""
        found = (self.tokens + 20.0) / (self.plain + 20.0)
        return found if found > 1.0 else 1.0

    def add(self, tokens: float, plain: float) -> None:
        """Count a step."""
        self.tokens, self.plain = LATELY * self.tokens + tokens, LATELY * self.plain + plain
        self.expected *= KEEP
        self.true *= KEEP
        self.net *= FORGIVE
