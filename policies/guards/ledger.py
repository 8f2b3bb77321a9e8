"""One level's account of the safety guard: the budget, and what the fixed gamma would have done."""

from __future__ import annotations

from policies.base import Outcome
from policies.guards.sleep import SleepSchedule

#: Weight that the counts of a review keep until the next one.
KEEP = 0.98


#: The j-th probe of a baseline comes at step PROBE * j^2; later by the square of how many times CLOSE of the best rate
#: it is behind, up to FAR times, as so many fewer probes tell the two rates apart.
PROBE, CLOSE, FAR = 16, 0.1, 4.0


#: Weight of the latest step in the local mean of the fixed gamma's tokens per step, and in the shares of its tokens
#: that take a forward, and that the drafter has at all.
LOCAL, SHARE = 0.2, 0.02


#: A debt is void where plain decoding turns out to be so many times as fast, or as slow, as it was thought to be.
OTHER = 1.3


#: Share of its estimated tokens that the fixed gamma should make.
FAIR = 0.75


#: Numbers of a ledger's row that do not depend on the fixed gamma.
OWN = 12


class Ledger:
    """One level's budget, what the fixed gamma would have done, and the probing schedule."""

    def __init__(self, gamma: int, budget: float) -> None:
        self.full = self.gamma = gamma
        # Most tokens that a step was allowed to draft; a fixed gamma beyond them comes down to them.
        self.most = 0
        self.steps, self.budget = 0, budget
        self.interventions = 0
        # Plain decoding's tokens per second when the budget's debt began, about.
        self.plain = 0.0
        # The fixed gamma's tokens per step hereabouts; tokens so far, and the steps it would have needed for them.
        # Worth two steps at acceptance one half before there is data.
        self.local = 1.0 + sum(0.5**i for i in range(1, gamma + 1))
        self.forget()
        # Share of drafted tokens that took a forward of the draft model; of the fixed gamma's that the drafter has.
        self.forwards = self.offered = 1.0
        # Probes of gamma 0 and of the fixed gamma: how many there were, and the step of the next one.
        self.probes, self.due, self.spacing = [0, 0], [0, 0], [PROBE, PROBE]
        self.sleep = SleepSchedule()
        self.baseline, self.rate = 0, 0.0  # the better baseline, and (1 - epsilon) of its tokens per second

    def forget(self) -> None:
        """Judge the fixed gamma by the latest steps only."""
        self.tokens, self.fixed_steps, self.short = 2.0 * self.local, 2.0, 0.0
        # By r = 1..gamma: steps that drafted at least r tokens past the point where the policy would have stopped (or
        # met a rejection there), and how many of the first r were accepted in all.
        self.seen = [2.0] * self.full
        self.more = [2.0 * sum(0.5**i for i in range(1, r + 1)) for r in range(1, self.full + 1)]

    def allow(self, limit: int) -> None:
        """Note how many tokens a step may draft, more than ever before."""
        self.most = limit
        self.gamma = limit if 0 < limit < self.full else self.full

    def disproved(self, allowance: float) -> bool:
        """Whether the fixed gamma has fallen far short of its estimate, which is forgotten then."""
        if self.short <= allowance:
            return False
        self.forget()
        return True

    def told(self, plain: float) -> None:
        """Take in plain decoding's tokens per second; a debt that was reckoned with quite another number is void."""
        if self.plain / OTHER < plain < self.plain * OTHER:
            return
        if self.plain:
            self.budget = max(self.budget, 0.0)
        self.plain = plain

    def row(self) -> list[float]:
        """Everything that is saved."""
        counts = [float(x) for x in (self.steps, self.budget, self.interventions, *self.probes, *self.due)]
        return [*counts, self.local, self.tokens, self.fixed_steps, self.forwards, self.short, *self.seen, *self.more,
                self.offered]  # fmt: skip

    def fill(self, row: list[float]) -> None:
        """Restore :meth:`row`."""
        self.steps, self.interventions = int(row[0]), int(row[2])
        self.budget = row[1]
        self.probes, self.due = [int(v) for v in row[3:5]], [int(v) for v in row[5:7]]
        self.local, self.tokens, self.fixed_steps, self.forwards, self.short = row[7:OWN]
        self.seen, self.more = row[OWN : OWN + self.full], row[OWN + self.full : OWN + 2 * self.full]
        self.offered = row[-1] if len(row) > OWN + 2 * self.full else 1.0  # older states lack it

    def count(self, outcome: Outcome, stop: int) -> None:
        """Count a step; ``stop`` is where the policy would have stopped if it was taken over, else -1."""
        n, k, gamma = outcome.accepted, outcome.drafted, self.gamma
        known = float(n if n < gamma else gamma)
        if outcome.labelled == n and k < gamma and not outcome.exhausted:  # all of a shorter draft was accepted
            r = gamma - n - 1
            known += self.more[r] / self.seen[r]
        if 0 <= stop <= n and stop < outcome.labelled:
            extra = n - stop
            for r in range(1, len(self.seen) + 1):
                if r <= extra or outcome.labelled > n or outcome.exhausted:
                    self.seen[r - 1] += 1.0
                    self.more[r - 1] += min(extra, r)
        # Page's cumulative sum (Biometrika, 1954): tokens missing from three quarters of what was expected.
        short = self.short + FAIR * self.tokens / self.fixed_steps - 1.0 - known
        self.short = short if short > 0.0 else 0.0
        self.local += LOCAL * (1.0 + known - self.local)
        self.tokens += outcome.produced
        self.fixed_steps += outcome.produced / self.local

    def fade(self) -> None:
        """Let old counts fade; probes get rarer, so theirs more slowly."""
        self.tokens *= KEEP
        self.fixed_steps *= KEEP
        self.seen = [KEEP**0.25 * x for x in self.seen]
        self.more = [KEEP**0.25 * x for x in self.more]
