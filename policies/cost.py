"""Seconds per step, learned online: T(k) = t_d k + T_v(k+1) + t_0 for each compression level, and the rate lambda.

Verify times are fitted as ``a P(w) + b (w-1) P(1) + s c`` over width w and context length c, where P is a prior shape
(a calibration's table, or nearly flat): linear until the data says otherwise, when each width's own mean residual takes
over with the number of times it was seen. Times are Huber-clipped around the current estimate, so that a stall of the
machine moves nothing by much while a lasting change is followed. All statistics are sums that forget exponentially, so
workers can add theirs up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.base import ARMS, MAX_GAMMA, Outcome, PolicyError, State

WIDTHS = MAX_GAMMA + 1
#: Steps after which a measurement counts half.
HALF_LIFE = 400.0
#: Steps between refits once a level has been seen often.
REFIT_EVERY = 16
#: A width's own mean residual counts n / (n + OWN) after n visits.
OWN = 5.0


@dataclass(frozen=True, slots=True)
class CostPrior:
    """What a calibration, or a cost file, says about one compression level.

    Attributes
    ----------
    draft_seconds : float
        t_d, seconds to draft one token.
    verify_seconds : tuple of float
        T_v(w) for w = 1, 2, ...; the last two entries are extended in a straight line up to width 17.
    overhead_seconds : float
        t_0, what a step takes besides drafting and verifying.
    context_seconds : float
        Growth of T_v per token of context.
    context_length : float
        Context length at which the table holds.
    weight : float
        How many observed steps the table is worth.
    """

    draft_seconds: float
    verify_seconds: tuple[float, ...]
    overhead_seconds: float = 0.0
    context_seconds: float = 0.0
    context_length: float = 0.0
    weight: float = 20.0

    def __post_init__(self) -> None:
        times = (self.draft_seconds, self.overhead_seconds, *self.verify_seconds)
        if not self.verify_seconds or not all(0 <= t < float("inf") for t in times) or min(self.verify_seconds) <= 0:
            raise PolicyError(f"cost prior needs finite seconds, and verify times above zero: {self}")

    def table(self) -> np.ndarray:
        """T_v for widths 1 to 17, shape (17,)."""
        given = np.asarray(self.verify_seconds, dtype=float)[:WIDTHS]
        slope = max(given[-1] - given[-2], 0.0) if len(given) > 1 else 0.0
        extra = given[-1] + slope * np.arange(1, WIDTHS - len(given) + 1)
        return np.concatenate([given, extra])


#: Used until something better is known; its scale yields to the first measurements.
VAGUE = CostPrior(0.010, (0.050, 0.0515), weight=0.01)


class LevelCosts:
    """Cost estimates of one compression level.

    Attributes
    ----------
    seconds : ndarray, shape (17,)
        T(k) for k = 0..16 at the usual context length.
    verify : ndarray, shape (17,)
        T_v(w) for w = 1..17.
    draft, first : float
        t_d, the marginal seconds of one more drafted token, and what the first one takes on top.
    overhead : float
        t_0, seconds of a step besides drafting and verifying.
    rate : float
        lambda, tokens per second: discounted tokens over discounted seconds.
    price : ndarray, shape (17,)
        ``rate * seconds``: what drafting k tokens costs, in tokens.
    arm_seconds, arm_price : ndarray, shape (K,)
        ``seconds`` and ``price`` of each arm.
    """

    def __init__(self, prior: CostPrior = VAGUE, half_life: float = HALF_LIFE, arms: tuple[int, ...] = ARMS) -> None:
        self._arms = np.array(arms)
        self._keep = 0.5 ** (1.0 / half_life)
        self.steps = self.version = 0
        self.deviation = 0.3
        # Rows: count, sum of seconds, of context, of its square, of their product; one column per width.
        self._widths = np.zeros((5, WIDTHS))
        # Draft: count, k, k squared, d, k d. Rest: count, t_0, tokens, seconds.
        self._sums = np.zeros(9)
        self._delta = (np.zeros((5, WIDTHS)), np.zeros(9), 0)
        self._clear_block()
        self.set_prior(prior)

    def set_prior(self, prior: CostPrior) -> None:
        """Start from, or change to, another prior; what was measured is kept."""
        self.prior = prior
        self._shape = prior.table()
        self._slope = np.arange(WIDTHS) * self._shape[0]
        self._refit()

    def observe(self, outcome: Outcome, drafted: int) -> None:
        """Take in one step's times; ``drafted`` counts the tokens that the draft seconds paid for."""
        verify, draft, total = outcome.verify_seconds, outcome.draft_seconds, outcome.seconds
        if not (0.0 < total < 1e9 and verify >= 0.0 and draft >= 0.0):
            return
        self.steps += 1
        if self.steps == 1 and self.prior is VAGUE:
            return  # the first call warms caches up and would be the only measure of scale
        k = outcome.drafted
        if verify > 0.0:
            verify = self._clip(verify, self._verify[k] + self._per_token * outcome.context_length)
            w, c, block = k, float(outcome.context_length), self._block
            block[w] += 1.0
            block[WIDTHS + w] += verify
            block[2 * WIDTHS + w] += c
            block[3 * WIDTHS + w] += c * c
            block[4 * WIDTHS + w] += c * verify
        sums = self._block_sums
        # A draft that had to read more than its last token first, after steps without drafting, is not typical.
        if drafted and draft > 0.0 and outcome.caught_up <= 1:
            draft = min(draft, 3.0 * (self.first + self.draft * drafted)) if self._sums[0] > 3 else draft
            sums[0] += 1.0
            sums[1] += drafted
            sums[2] += drafted * drafted
            sums[3] += draft
            sums[4] += drafted * draft
        rest = max(total - outcome.draft_seconds - outcome.verify_seconds, 0.0)
        sums[5] += 1.0
        sums[6] += min(rest, 3.0 * self.overhead) if self._sums[5] > 3 else min(rest, verify)
        sums[7] += outcome.produced
        sums[8] += min(total, verify + draft + rest)
        self._pending += 1
        if self._pending >= REFIT_EVERY or self.steps < REFIT_EVERY:
            self.refit()

    def _clip(self, value: float, expected: float) -> float:
        """Huber-clip a time around its estimate, and widen or narrow the allowance."""
        if self.steps <= 3 and self.prior is VAGUE:
            return value
        allowance = max(4.0 * self.deviation, 0.2)
        value = min(max(value, expected / (1.0 + allowance)), expected * (1.0 + allowance))
        self.deviation += 0.05 * (abs(value / expected - 1.0) - self.deviation)
        return value

    def _clear_block(self) -> None:
        self._block = [0.0] * (5 * WIDTHS)
        self._block_sums = [0.0] * 9
        self._pending = 0

    def refit(self) -> None:
        """Fold the latest measurements in and solve for the estimates anew."""
        if not self._pending:
            return
        self.add(np.array(self._block).reshape(5, WIDTHS), np.array(self._block_sums), self._pending)
        widths, sums, count = self._delta
        keep = self._keep**self._pending
        widths *= keep
        sums *= keep
        widths += np.array(self._block).reshape(5, WIDTHS)
        sums += self._block_sums
        self._delta = (widths, sums, count + self._pending)
        self._clear_block()
        self._refit()

    def add(self, widths: np.ndarray, sums: np.ndarray, count: int) -> None:
        """Add sums over ``count`` steps, after forgetting by as much."""
        keep = self._keep**count
        self._widths *= keep
        self._sums *= keep
        self._widths += widths
        self._sums += sums

    def _refit(self) -> None:
        self.version += 1
        n, v, c, cc, cv = self._widths
        p, q, prior = self._shape, self._slope, self.prior
        unit = p[0]
        # Normal equations of (a, b, s) with pseudo-observations for a = 1, b = 0, s = the prior's: a calibration is
        # trusted for its shape far more than for its scale.
        s0, centre = prior.context_seconds, prior.context_length
        if prior is VAGUE and n.sum() > 0:
            centre = c.sum() / n.sum()
        dc, dcc, dcv = c - n * centre, cc - 2 * centre * c + n * centre**2, cv - centre * v
        np_, nq = n * p, n * q
        gram = np.array(
            [
                [np_ @ p + 0.1 * prior.weight * unit**2, np_ @ q, p @ dc],
                [0.0, nq @ q + (160.0 + 80.0 * prior.weight) * unit**2, q @ dc],
                [0.0, 0.0, dcc.sum() + 1e6],
            ]
        )
        gram[1, 0], gram[2, 0], gram[2, 1] = gram[0, 1], gram[0, 2], gram[1, 2]
        right = np.array([v @ p + 0.1 * prior.weight * unit**2, v @ q, dcv.sum() + 1e6 * s0])
        a, b, s = np.linalg.solve(gram, right)
        a, s = max(a, 1e-3), max(s, 0.0)
        line = a * p + b * q
        own = (v - n * line - s * dc) / (n + OWN)
        fitted = np.maximum(line + own, 0.1 * a * unit)
        usual = c.sum() / n.sum() if n.sum() > 0 else centre
        self._per_token = s
        self._verify = fitted - s * centre
        self.verify = self._verify + s * usual
        self._refit_draft(a)
        self._solve_rate()

    def _refit_draft(self, scale: float) -> None:
        m, k, kk, d, kd, rests, rest, _, _ = self._sums.tolist()
        prior = self.prior
        w = max(prior.weight, 0.01)
        # d = first + t_d k; the prior says first = 0, and t_d relative to the target's speed.
        kk, kd = kk + w, kd + w * prior.draft_seconds * scale
        m += 5.0
        det = m * kk - k * k
        self.first = max((d * kk - k * kd) / det, 0.0)
        self.draft = max((m * kd - k * d) / det, 0.0) if self.first > 0.0 else kd / kk
        w = prior.weight
        self.overhead = (rest + w * prior.overhead_seconds) / (rests + w)

    def _solve_rate(self) -> None:
        k = np.arange(WIDTHS)
        self.seconds = self.draft * k + self.verify + self.overhead
        self.seconds[1:] += self.first
        tokens, seconds = float(self._sums[7]), float(self._sums[8])
        # One token per plain step is what the prior promises until there is data.
        w = 2.0
        self.rate = (tokens + w) / (seconds + w * float(self.seconds[0]))
        self.price = self.rate * self.seconds
        self.arm_price, self.arm_seconds = self.price[self._arms], self.seconds[self._arms]

    def state(self) -> State:
        """Sums and the prior, as arrays."""
        self.refit()
        prior = self.prior
        times = [prior.draft_seconds, prior.overhead_seconds, prior.context_seconds]
        return {
            "widths": self._widths.copy(),
            "sums": self._sums.copy(),
            "misc": np.array([self.steps, self.deviation, float(prior is VAGUE)]),
            "prior": np.array([*times, prior.context_length, prior.weight, *prior.verify_seconds]),
        }

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        p = state["prior"].tolist()
        vague = bool(state["misc"][2])
        self._clear_block()
        self.steps, self.deviation = int(state["misc"][0]), float(state["misc"][1])
        self._widths, self._sums = state["widths"].copy(), state["sums"].copy()
        self.set_prior(VAGUE if vague else CostPrior(p[0], tuple(p[5:]), p[1], p[2], p[3], p[4]))

    def take_delta(self) -> State:
        """Sums gathered since the last call."""
        self.refit()
        widths, sums, count = self._delta
        self._delta = (np.zeros((5, WIDTHS)), np.zeros(9), 0)
        return {"widths": widths, "sums": sums, "count": np.array(float(count))}

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        self.refit()
        count = int(delta["count"])
        self.add(delta["widths"], delta["sums"], count)
        self.steps += count
        self._refit()


class CostModel:
    """:class:`LevelCosts` by level."""

    def __init__(self, half_life: float = HALF_LIFE, arms: tuple[int, ...] = ARMS) -> None:
        self.half_life, self.arms = half_life, arms
        self.levels: dict[str, LevelCosts] = {}

    def level(self, name: str) -> LevelCosts:
        """Return a level's costs, made on first use."""
        found = self.levels.get(name)
        if found is None:
            found = self.levels[name] = LevelCosts(VAGUE, self.half_life, self.arms)
        return found

    def set_prior(self, level: str, prior: CostPrior) -> None:
        """Set what is known of a level beforehand."""
        self.level(level).set_prior(prior)

    def observe(self, outcome: Outcome, drafted: int | None = None) -> None:
        """Take in one step's times."""
        self.level(outcome.level).observe(outcome, outcome.drafted if drafted is None else drafted)

    def state(self) -> State:
        """All levels' states; keys are ``cost.<level>.<array>``."""
        return {f"cost.{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.state().items()}

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        self.levels.clear()
        for name, part in split_levels(state).items():
            self.level(name).load(part)

    def take_delta(self) -> State:
        """Sums gathered since the last call, for every level."""
        return {f"cost.{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.take_delta().items()}

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        for name, part in split_levels(delta).items():
            self.level(name).merge(part)


def split_levels(state: State) -> dict[str, State]:
    """Group ``cost.<level>.<array>`` keys by level; other keys are left out."""
    found: dict[str, State] = {}
    for key, value in state.items():
        if key.startswith("cost."):
            level, _, array = key.removeprefix("cost.").rpartition(".")
            found.setdefault(level, {})[array] = value
    return found
