"""Seconds of a batch's forwards, learned online: one function of all tokens in the forward, whatever rows they are of.

A forward that reads N tokens takes V(N) = P(N) e^u(N) seconds. P is a prior shape, and u changes slowly with log N: it
is linear between knots, and its steps from knot to knot are a random walk. So V is regressed in logarithms, where noise
is relative, an outlier weighs little, and the sums of several workers add up. Batches of all sizes teach the same
function. Drafting in lock step takes first + round x rounds + each x forwards + read x tokens that the draft has to
read first.
"""

from __future__ import annotations

from math import log, sqrt
from typing import NamedTuple

import numpy as np

from policies.base import PolicyError, State
from policies.batches import Forward
from policies.costs.batch_grid import MOST, grid
from policies.costs.level_costs import HALF_LIFE, LevelCosts
from policies.costs.pace import Means
from policies.costs.prior import WIDTHS
from policies.estimators.bayesian_linear import check_array

#: Standard deviation of a measured log V.
NOISE = 0.1
#: How sure that is: standard deviation as a share of it. Standard deviation of measured draft seconds, as a share too.
DOUBT, DRAFT_NOISE = 1.0, 0.25
#: Steps between refits once so many steps were seen.
REFIT_EVERY, REFIT_ALWAYS = 8, 24
#: Seconds of more than so many standard deviations above the estimate count as so many.
FAR = 4.0
#: Weight of the latest step in means.
LATEST = 0.05


class Guess(NamedTuple):
    """What to go by where nothing is known.

    Attributes
    ----------
    always : float
        A forward of N tokens takes as long as a part that is always there, worth so many tokens, and N more.
    draft : tuple of float
        What drafting takes as shares of V(1): first, round, each, read.
    """

    always: float = 8.0
    draft: tuple[float, float, float, float] = (0.03, 0.08, 0.012, 0.012)


USUAL = Guess()


class BatchCosts:
    """Estimated seconds of one compression level's forwards in batches.

    Parameters
    ----------
    half_life : float
        Steps after which a measurement counts half.
    alone : LevelCosts, optional
        The level's costs in single decoding, where something is known of them: they give V its shape.
    most : int
        Most tokens that a forward may read.
    guess : Guess
        What to go by where nothing is known.

    Attributes
    ----------
    verify, seconds : list of float, and the same as an array
        V(N) for N = 0 (zero seconds) to ``most`` at least.
    draft : tuple of float
        Seconds of a step's first round on top, of a round, of a row in it, and of a token to read first.
    rest : float
        What a step takes besides, for each row.
    steps, version : int
        Steps seen, and how often the estimates were made anew.
    """

    def __init__(
        self, half_life: float = HALF_LIFE, alone: LevelCosts | None = None, most: int = MOST, guess: Guess = USUAL
    ) -> None:
        self._grid, self._keep = grid(most), 0.5 ** (1.0 / half_life)
        self._all = sum(self._grid.parts)
        self.draft = 0.0, 0.0, 0.0, 0.0
        self._guess = np.array(guess.draft)
        self._shape = (guess.always + self._grid.n) / (guess.always + 1.0)
        told = 0.0
        if alone is not None and (alone.steps > WIDTHS or not alone.vague):
            table = alone.verify
            slope = max(float(table[-1] - table[8]) / (WIDTHS - 9), 0.0)
            more = table[-1] + slope * np.arange(1, len(self._grid.n) - WIDTHS + 1)
            self._shape, told = np.concatenate((table, more)) / table[0], log(float(table[0]))
        self._shapes: list[float] = self._shape.tolist()
        self._start = told
        self.told, self._known = bool(told), False
        self._sums, self._delta, self._count = np.zeros(self._all), np.zeros(self._all), 0
        self.steps = self.version = 0
        self.rest, self.deviation = 0.0, 0.15
        self._pace = Means()
        # Measured steps that are not in the sums yet: tokens, V's part, how much, the draft's part; and drafts that
        # were measured by themselves: at which step, what of and how long.
        self._measured = list[tuple[float, ...]]()
        self._drafted = list[tuple[int, tuple[float, ...], float, float]]()
        self._refit()

    @property
    def ready(self) -> bool:
        """Whether anything is known of the scale."""
        return self.told or self._known

    def plain(self, rows: int) -> float:
        """Return the seconds of a step that drafts nothing."""
        return self.verify[rows] + self.rest * rows

    def drafting(self, rounds: int, forwards: int, read: int) -> float:
        """Return the seconds of drafting in so many rounds."""
        first, each_round, each, reading = self.draft
        return (first + each_round * rounds + each * forwards if rounds else 0.0) + reading * read

    def step(self, forward: Forward) -> float:
        """Return the estimated seconds of a step like this one, the policy's own left out."""
        drafting = self.drafting(forward.rounds, forward.forwards, forward.read)
        return self.verify[forward.tokens] + drafting + self.rest * forward.rows

    def doubt(self, one: int, other: int) -> float:
        """Return the standard deviation of log V(other) - log V(one)."""
        weights = self._hat(other) - self._hat(one)
        return sqrt(max(float(weights @ self._covariance @ weights), 0.0))

    def _hat(self, tokens: int) -> np.ndarray:
        """Return the weights of the knots in u at so many tokens."""
        found = np.zeros(self._grid.knots)
        at, part = self._grid.at[tokens - 1], self._grid.part[tokens - 1]
        found[at], found[at + 1] = 1.0 - part, part
        return found

    def observe(self, forward: Forward) -> None:
        """Take in what a step took; steps whose seconds are not those of a usual one have none.

        Where a step that drafted was measured as a whole, its seconds tell of the sum of V and the drafting: both are
        fitted to it together, so that it does not matter for long how they were thought to share it.
        """
        whole = bool(forward.rounds) and not forward.verify_seconds and self.ready
        own = forward.seconds - forward.policy_seconds - self.rest * forward.rows
        seconds = own if whole else forward.verify_seconds
        known = self.steps > 2 or self.told
        if not (0.0 < seconds < 1e9 and 0.0 <= forward.draft_seconds < 1e9) or (whole and not known):
            return
        self.steps += 1
        if self.steps == 1 and not self.told:
            return  # the first call warms caches up
        n = forward.tokens
        told = self.drafting(forward.rounds, forward.forwards, forward.read) if forward.rounds else 0.0
        x = 1.0, float(forward.rounds), float(forward.forwards), float(forward.read)
        usual = self.verify[n] + (told if whole else 0.0)
        at = log(self.verify[n] / self._shapes[n - 1]) - self._start
        off = log(seconds / usual)
        if known:
            pace = self._pace
            ahead = pace.now - pace.lately
            most = FAR * max(self.deviation, 0.5 * NOISE)
            off = min(max(off - ahead, -most), most)
            self.deviation += LATEST * (abs(off) - self.deviation)
            off += ahead
            pace.steps = max(self.steps - 3, 0)  # the first steps warm up
            pace.note(off)
            off -= pace.now - pace.lately
        if whole:
            part, scale = self.verify[n] / usual, 1.0 / usual
            self._measured.append((n, part, off + part * at + 1.0 - part, *(scale * number for number in x)))
        else:
            self._measured.append((n, 1.0, off + at, 0.0, 0.0, 0.0, 0.0))
            rest = forward.seconds - forward.verify_seconds - forward.draft_seconds - forward.policy_seconds
            each = min(max(rest, 0.0), 0.3 * forward.verify_seconds) / forward.rows
            self.rest += max(LATEST, 1.0 / self.steps) * (min(each, 3.0 * self.rest or each) - self.rest)
            if forward.rounds and forward.draft_seconds > 0.0:
                taken = min(forward.draft_seconds, 4.0 * told)
                self._drafted.append((len(self._measured), x, taken, DRAFT_NOISE * max(told, taken)))
        self._known = True
        if len(self._measured) >= REFIT_EVERY or self.steps < REFIT_ALWAYS:
            self._refit()

    def _fold(self) -> None:
        """Move what was measured into the sums; each step weighs more than the one before."""
        if not self._measured:
            return
        count, size = len(self._measured), self._grid.knots
        data, row = np.array(self._measured), np.arange(count)
        tokens = data[:, 0].astype(int) - 1
        at, between, part = self._grid.at[tokens], self._grid.part[tokens], data[:, 1]
        x = np.zeros((count, size + 4))
        x[row, at], x[row, at + 1] = part * (1.0 - between), part * between
        x[:, size:] = data[:, 3:]
        weighted = x * (self._keep ** (count - 1.0 - row) / NOISE**2)[:, None]
        squares, moments = weighted.T @ x, data[:, 2] @ weighted
        more = np.zeros(self._all)
        matrix, vector, draft_matrix, draft_vector, both = self._split(more)
        matrix[:], vector[:] = squares[:size, :size].ravel(), moments[:size]
        draft_matrix[:], draft_vector[:] = squares[size:, size:].ravel(), moments[size:]
        both[:] = squares[:size, size:].ravel()
        if self._drafted:
            when, numbers, taken, noise = (np.array(column) for column in zip(*self._drafted, strict=True))
            weighted = numbers * (self._keep ** (count - when) / noise**2)[:, None]
            draft_matrix += (weighted.T @ numbers).ravel()
            draft_vector += taken @ weighted
        for sums in (self._sums, self._delta):
            sums *= self._keep**count
            sums += more
        self._count += count
        self._measured.clear()
        self._drafted.clear()

    def _refit(self) -> None:
        self._fold()
        self.version += 1
        matrix, vector, draft_matrix, draft_vector, both = self._split(self._sums)
        size = self._grid.knots
        precision = matrix.reshape(size, size) + self._grid.precision
        if not both.any():
            self._covariance = np.linalg.inv(precision)
            prior = self._tell(self._start + self._covariance @ vector)
            doubt = (DOUBT * prior) ** -2.0
            draft = np.linalg.solve(np.diag(doubt) + draft_matrix.reshape(4, 4), doubt * prior + draft_vector)
        else:
            prior = self._guess * self.verify[1]
            doubt = (DOUBT * prior) ** -2.0
            cross, own = both.reshape(size, 4), np.diag(doubt) + draft_matrix.reshape(4, 4)
            covariance = np.linalg.inv(np.block([[precision, cross], [cross.T, own]]))
            found = covariance @ np.concatenate((vector, doubt * prior + draft_vector))
            self._covariance, draft = covariance[:size, :size], found[size:]
            self._tell(self._start + found[:size])
        first, each_round, each, read = np.maximum(draft, 0.05 * prior).tolist()
        self.draft = first, each_round, each, read

    def _tell(self, u: np.ndarray) -> np.ndarray:
        """Make the table of V; return what drafting takes where nothing is known of that."""
        at, part = self._grid.at, self._grid.part
        below = u[at]
        ratio = np.exp(np.minimum(np.maximum(below + part * (u[at + 1] - below), -25.0), 25.0))
        # More tokens never take less time.
        self.seconds = np.zeros(len(ratio) + 1)
        np.maximum.accumulate(self._shape * ratio, out=self.seconds[1:])
        self.verify: list[float] = self.seconds.tolist()
        return self._guess * self.verify[1]

    def state(self) -> State:
        """Sums, shape and means."""
        self._fold()
        pace = self._pace
        means = [self.steps, self.rest, self.deviation, pace.now, pace.lately, self._start, float(self.told)]
        return self._parted(self._sums) | {"shape": self._shape.copy(), "means": np.array(means, dtype=float)}

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        shape, means = (
            check_array(state, "shape", self._shape.shape).astype(float),
            check_array(state, "means", (7,)).tolist(),
        )
        sums = self._sums_of(state)
        if not (shape > 0.0).all() or means[0] < 0.0:
            raise PolicyError("the state's costs of batches must be above zero")
        self._shape, self._sums, self._delta, self._count = shape, sums, np.zeros(self._all), 0
        self.steps = int(means[0])
        self.rest, self.deviation, self._pace.now, self._pace.lately, self._start = means[1:6]
        self.told, self._known = bool(means[6]), bool(sums.any())
        self._measured.clear()
        self._drafted.clear()
        self._shapes = shape.tolist()
        self._refit()
        self._refit()  # what is expected of drafting rests on the table that was there before

    def take_delta(self) -> State:
        """Sums since the last call."""
        self._fold()
        delta, count = self._delta, self._count
        self._delta, self._count = np.zeros(self._all), 0
        start = np.array([self._start, self._shape[-1]])
        return self._parted(delta) | {"count": np.array(float(count)), "start": start}

    def merge(self, delta: State) -> None:
        """Add another copy's sums, if they are of the same shape."""
        start, sums = check_array(delta, "start", (2,)), self._sums_of(delta)
        count = int(check_array(delta, "count", ()))
        if not np.allclose(start, [self._start, self._shape[-1]]):
            return
        self._fold()
        self._sums *= self._keep**count
        self._sums += sums
        self.steps += count
        self._known = self._known or bool(sums.any())
        self._refit()

    def _parted(self, sums: np.ndarray) -> State:
        """Return sums as a state has them: those of both are left out where no step was measured as a whole."""
        own, both = np.split(sums, self._grid.ends[-1:])
        return {"sums": own.copy(), "both": both.copy()} if both.any() else {"sums": own.copy()}

    def _sums_of(self, state: State) -> np.ndarray:
        """Return the sums of a state."""
        own, both = check_array(state, "sums", (self._grid.ends[-1],)), self._grid.parts[-1]
        more = check_array(state, "both", (both,)) if "both" in state else np.zeros(both)
        return np.concatenate((own, more)).astype(float)

    def _split(self, sums: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return views of the parts of all sums."""
        return tuple(np.split(sums, self._grid.ends))
