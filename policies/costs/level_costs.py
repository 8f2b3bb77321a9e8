"""Seconds per step, learned online: T(k) = t_d k + T_v(k+1) + t_0 for each compression level, and the rate lambda.

Verify times are fitted as ``a P(w) + b (w-1) P(1) + s (c - c0)`` over width w and context length c, where P is a prior
shape at context length c0 (a calibration's table, or nearly flat): linear until the data says otherwise, when each
width's own mean residual takes over with the number of times it was seen. Times are Huber-clipped around the current
estimate, so that a stall of the machine moves nothing by much while a lasting change is followed. All statistics are
sums that forget exponentially, so workers can add theirs up.

A machine that others use too changes its pace, and drafts are longer in some texts than in others: widths that were met
in slow minutes would look dear. So times are divided by how much slower the latest steps were than those before them.
"""

from __future__ import annotations

import numpy as np

from policies.base import ARMS, State
from policies.costs.deferred import Deferred
from policies.costs.pace import Pace
from policies.costs.prior import VAGUE, WIDTHS, CostPrior
from policies.costs.reading import CAUGHT, dear
from policies.costs.sums import ALL, OF_DRAFT, OF_READING, RATE, SUMS, faded, parts, rescale, saved, solve, whole
from policies.estimators.bayesian_linear import check_array

#: Steps after which a measurement counts half.
HALF_LIFE = 400.0
#: Steps between refits, once a level has been seen as often as the second says.
REFIT_EVERY, REFIT_ALWAYS = 32, 16
#: A width's own mean residual counts n / (n + OWN) after n visits.
OWN = 5.0
#: As how many caught-up tokens a prior's step counts; how many steps that drafted its ``first`` is worth.
READ, FIRST = 10.0, 5.0
#: How many drafted tokens that took a forward each an arm's price starts from.
ASKED = 2.0
#: How many times another an early time has to be for one of the two to be taken for a stall, where nothing was told.
FAR = 4.0
#: What a part of a step may take, as a share of another's, even where it took next to nothing so far: three times
#: nothing would stay nothing for ever.
LITTLE = 0.01
#: Where draft and target compare in another way, by that factor, the machine has another shape: what is kept then.
OTHER, KEPT = 1.3, 0.05
#: Share of its time at the usual context length that a verification takes at least, however short the context.
LEAST = 0.1
_K = np.arange(WIDTHS)


class LevelCosts(Deferred):
    """Cost estimates of one compression level.

    Attributes
    ----------
    seconds : ndarray, shape (17,)
        T(k) for k = 0..16 at the usual context length.
    verify : ndarray, shape (17,)
        T_v(w) for w = 1..17.
    draft, first : float
        t_d, the marginal seconds of one more drafted token, and what the first one takes on top.
    catch_up, dear : float
        Seconds for each token that the draft has to read first, and from how many on that is weighed.
    overhead : float
        t_0, seconds of a step besides drafting and verifying.
    rate : float
        lambda, tokens per second: discounted tokens over discounted seconds.
    price : ndarray, shape (17,)
        ``rate * seconds``: what drafting k tokens costs, in tokens.
    asked : float
        Share of drafted tokens that took a forward of the draft model; lookups take none.
    arm_seconds, arm_price : ndarray, shape (K,)
        ``seconds`` and ``price`` of each arm, of whose tokens that share takes a forward.
    """

    def __init__(self, prior: CostPrior = VAGUE, half_life: float = HALF_LIFE, arms: tuple[int, ...] = ARMS) -> None:
        super().__init__(early=1 + REFIT_ALWAYS)
        self._arms = np.array(arms)
        self._keep = 0.5 ** (1.0 / half_life)
        self.version = 0
        self.deviation = 0.3
        self._gain = 1.0
        self._pace = Pace()
        # The pace seen here, and the deviation, until the next step after sums were taken over that have seen none.
        self._own: tuple[float, float, float, int] | None = None
        # All sums, and those since the last exchange.
        self._total, self._delta, self._count = np.zeros(ALL), np.zeros(ALL), 0
        self._clear_block()
        self.set_prior(prior)

    def set_prior(self, prior: CostPrior) -> None:
        """Start from, or change to, another prior; what was measured is kept."""
        self.take()
        self.prior = prior
        self._vague = prior == VAGUE
        p = self._shape = prior.table()
        q = self._slope = np.arange(WIDTHS) * p[0]
        self._moments = np.column_stack([p * p, p * q, q * q, p, q, np.ones(WIDTHS)])
        self._refit()

    @property
    def vague(self) -> bool:
        """Whether nothing was told of the level."""
        return self._vague

    def _until_due(self) -> int:
        return 1 if self._pace.told else REFIT_EVERY - self._pending

    def _add(
        self, total: float, verify: float, draft: float, k: int, drafted: int, context: int, caught_up: int,
        produced: int, threads: int,
    ) -> None:  # fmt: skip
        if caught_up >= CAUGHT and 0.0 < draft < 1e9:
            self._catch_up(caught_up, draft - self.first - self.draft * drafted)
        if not (0.0 < total < 1e9 and verify >= 0.0 and draft >= 0.0):
            return
        if self._own is not None:
            mine = self._pace
            (self.deviation, mine.now, mine.lately, mine.steps), self._own = self._own, None
        if threads != self._threads:
            if self._threads:
                self._pace.another_machine()
            self._threads = threads
        if self.steps == 1 and self._vague:
            return  # the first call warms caches up and would be the only measure of scale
        if self._pace.told:  # the machine is another one, and all estimates are off alike
            expected = max(self._expected[k] + self._per_token * context, self._least[k])
            drafting = self.first + self.draft * drafted if drafted and caught_up <= 1 else 0.0
            self._pace.compare(verify, expected, draft, drafting)
            if self._pace.found:
                self._fold()
            return
        c, rest, pace = float(context), total - draft - verify, 1.0
        if verify > 0.0:
            pace = self._pace.now / self._pace.lately
            verify, draft, rest = verify / pace, draft / pace, rest / pace
            expected = self._expected[k] + self._per_token * c
            if expected < self._least[k]:
                expected = self._least[k]
            verify = self._clip(verify, expected)
            if not self._vague or self.steps > REFIT_ALWAYS:
                self._pace.verified(pace * verify / expected)
            g = self._gain
            of_width, seen, taken = self._block[k], g * c, g * verify
            of_width[0] += g
            of_width[1] += taken
            of_width[2] += seen
            of_width[3] += seen * c
            of_width[4] += taken * c
        # Each step weighs more than the one before; refit scales them all down, so that the latest one weighs 1.
        g, sums = self._gain, self._block_sums
        self._gain = g / self._keep
        if drafted < k:
            sums[11] += g * (k - drafted)
        # A draft that had to read more than its last token first, after steps without drafting, is not typical.
        if drafted and draft > 0.0 and caught_up <= 1:
            # A stall here would be held against the draft for hundreds of steps. A drafted token takes no longer than
            # a forward of the target, whatever else is not known yet.
            told = self._measured[0] > 3.0 or not self._vague
            most = 3.0 * (self.first + self.draft * drafted) if told else verify * drafted
            if 0.0 < most < draft:
                draft = most
            if (usual := self.first + self.draft * drafted) > 0.0:
                self._pace.drafted(draft * pace / usual)
            sums[0] += g
            sums[1] += g * drafted
            sums[2] += g * drafted * drafted
            sums[3] += g * draft
            sums[4] += g * drafted * draft
        rest = rest if rest > 0.0 else 0.0
        most, little = 3.0 * self.overhead if self._measured[1] > 3.0 else verify, LITTLE * verify
        most = most if most > little else little
        sums[5] += g
        sums[6] += g * (rest if rest < most else most)
        modelled = self.spent(k, drafted)
        modelled += self.catch_up * (caught_up - 1) if drafted and caught_up > 1 else 0.0
        g **= RATE
        sums[7] += g * produced
        sums[8] += g * modelled
        self._pending += 1
        if self._pending >= REFIT_EVERY or self.steps < REFIT_ALWAYS:
            self._fold()

    def _catch_up(self, tokens: int, seconds: float) -> None:
        """Take in what the draft took to read so many tokens; reading one takes at most as long as drafting one."""
        most = max(3.0 * self.catch_up, LITTLE * self.draft) if self._total[OF_READING] > 0.0 else self.draft
        each = min(most, self.draft)
        self._block_sums[9] += self._gain * tokens
        self._block_sums[10] += self._gain * min(max(seconds, 0.0), each * tokens)

    def _clip(self, value: float, expected: float) -> float:
        """Huber-clip a time around its estimate, and widen or narrow the allowance."""
        if self._vague and self.steps < REFIT_ALWAYS:
            if self.steps == 2:
                return value
            if FAR * value < expected:  # what came before was a stall
                self._total[:], self._delta[:], self._count = 0.0, 0.0, 0
                self._clear_block()
                return value
            if self.steps == 3:
                return min(value, FAR * expected)
        most = 1.0 + (4.0 * self.deviation if self.deviation > 0.05 else 0.2)
        if value > expected * most:
            value = expected * most
        elif value < expected / most:
            value = expected / most
        self.deviation += 0.05 * (abs(value / expected - 1.0) - self.deviation)
        return value

    def _clear_block(self) -> None:
        self._block, self._block_sums = [[0.0] * 5 for _ in range(WIDTHS)], [0.0] * SUMS
        self._pending = 0
        self._gain = 1.0

    def refit(self) -> None:
        """Take all measurements in and solve for the estimates anew."""
        self.take()
        self._fold()

    def _fold(self) -> None:
        """Fold the latest measurements in and solve for the estimates anew."""
        if not (self._pending or self._block_sums[9] or self._pace.found):
            return
        block, keep = np.empty(ALL), self._keep**self._pending
        block[:OF_DRAFT].reshape(5, WIDTHS)[:] = np.array(self._block).T
        block[OF_DRAFT:] = self._block_sums
        block *= faded(self._keep ** max(self._pending - 1, 0))
        kept = faded(keep)
        for sums in (self._total, self._delta):
            sums *= kept
            sums += block
        self._count += self._pending
        self._clear_block()
        told = self._pace.told
        if change := self._pace.change():
            for sums in (self._total, self._delta):
                rescale(sums, *change)
                sums *= 1.0 if told or 1.0 / OTHER < change[0] / change[1] < OTHER else KEPT
        self._refit()

    def _refit(self) -> None:
        self.version += 1
        p, q, prior = self._shape, self._slope, self.prior
        widths = self._total[:OF_DRAFT].reshape(5, WIDTHS)
        n, v, c = widths[:3]
        (npp, npq, nqq, np_, nq, n_), (_, _, _, vp, vq, v_), (_, _, _, cp, cq, c_), cc, cv = (
            widths @ self._moments
        ).tolist()
        # Normal equations of (a, b, s) with pseudo-observations for a = 1, b = 0, s = the prior's: a calibration is
        # trusted for its shape far more than for its scale.
        square, s0, centre = float(p[0]) ** 2, prior.context_seconds, prior.context_length
        if self._vague and n_ > 0.0:
            centre = c_ / n_
        weak = 0.1 * prior.weight * square
        xp, xq, xx = cp - centre * np_, cq - centre * nq, cc[5] - 2 * centre * c_ + n_ * centre**2 + 1e6
        a, b, s = solve(
            (npp + weak, npq, xp, nqq + (160.0 + 80.0 * prior.weight) * square, xq, xx),
            (vp + weak, vq, cv[5] - centre * v_ + 1e6 * s0),
        )
        a, s = max(a, 1e-3), max(s, 0.0)
        line = a * p + b * q
        own = (v - n * line - s * (c - n * centre)) / (n + OWN)
        usual = np.maximum(line + own, 0.1 * a * p[0])
        # A slope that was learned in long contexts says nothing of short ones: left alone, it goes below zero there.
        least = LEAST * usual
        verify = usual - s * centre
        self._expected, self._least, self._per_token = verify.tolist(), least.tolist(), s
        self.verify = np.maximum(verify + s * (c_ / n_ if n_ > 0.0 else centre), least)
        self._refit_draft(a)
        self._solve_rate()

    def _refit_draft(self, scale: float) -> None:
        m, k, kk, d, kd, rests, rest, _, _, read, reading, free = self._total[OF_DRAFT:].tolist()
        self._measured, prior = (m, rests), self.prior
        w = max(prior.weight, 0.01)
        # d = first + t_d k; the prior says both relative to the target's speed.
        kk, kd = kk + w, kd + w * prior.draft_seconds * scale
        m, d = m + FIRST, d + FIRST * prior.first_draft_seconds * scale
        det = m * kk - k * k
        self.first: float = max((d * kk - k * kd) / det, 0.0)
        self.draft: float = max((m * kd - k * d) / det, 0.0) if self.first > 0.0 else kd / kk
        w = prior.weight
        self.overhead = (rest + w * prior.overhead_seconds) / (rests + w)
        w *= READ
        self.catch_up = (reading + w * scale * prior.catch_up_seconds) / (read + w)
        self.asked = 1.0 - free / (float(self._total[:WIDTHS] @ _K) + ASKED) if free else 1.0

    def _solve_rate(self) -> None:
        self.seconds = self.draft * _K + self.verify
        self.seconds += self.overhead
        self.seconds[1:] += self.first
        self._steps_take: list[float] = self.seconds.tolist()  # asked for every step
        self.dear = dear(self.catch_up, self._steps_take[0])
        tokens, seconds = self._total[OF_DRAFT + 7 : OF_READING].tolist()
        # One token per plain step is what the prior promises until there is data.
        w = 2.0
        self.rate = (tokens + w) / (seconds + w * float(self.seconds[0]))
        self.price = self.rate * self.seconds
        self.arm_seconds, arms = self.seconds[self._arms], self._arms
        if self.asked < 1.0:
            free = 1.0 - self.asked
            self.arm_seconds -= free * self.draft * arms + free**arms * self.first * (arms > 0)
        self.arm_price = self.rate * self.arm_seconds

    def spent(self, drafted: int, forwards: int) -> float:
        """Return the seconds of a step that submitted so many tokens and made so many forwards of the draft."""
        first = 0.0 if (drafted > 0) == (forwards > 0) else self.first if forwards else -self.first
        return self._steps_take[drafted] + self.draft * (forwards - drafted) + first

    def state(self) -> State:
        """Sums and the prior, as arrays."""
        self.refit()
        prior, pace = self.prior, self._pace
        times = [prior.draft_seconds, prior.overhead_seconds, prior.context_seconds]
        return {
            **parts(self._total.copy()),
            "misc": np.array([self.steps, self.deviation, float(self._vague), pace.now, pace.lately, pace.steps]),
            "prior": np.array([*times, prior.context_length, prior.weight, *prior.verify_seconds]),
            "catch_up": np.array(prior.catch_up_seconds),
            "first": np.array(prior.first_draft_seconds),
        }

    def load(self, state: State) -> None:
        """Restore :meth:`state`. Where that has no pace, as merged sums, the next step goes on with that of before."""
        total, misc, prior = saved(state)
        self.take()  # of what was seen here the pace is kept
        pace = self._pace
        if misc[5]:
            self._own = None
        elif pace.steps:
            self._own = self.deviation, pace.now, pace.lately, pace.steps
        pace.now, pace.lately, pace.steps = misc[3], misc[4], int(misc[5])
        self._clear_block()
        self.steps, self.deviation = int(misc[0]), misc[1]
        self._total, self._delta, self._count = total, np.zeros(ALL), 0
        self.set_prior(prior)

    def take_delta(self) -> State:
        """Sums gathered since the last call."""
        self.refit()
        delta, count = self._delta, self._count
        self._delta, self._count = np.zeros(ALL), 0
        return {**parts(delta), "count": np.array(float(count))}

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        self.refit()
        count = int(check_array(delta, "count", ()))
        more = whole(delta)
        self._total *= faded(self._keep**count)
        self._total += more
        self.steps += count
        self._refit()
