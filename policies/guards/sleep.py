"""Whether to sleep: to decode plainly for a stretch of text without asking the policy.

Where drafting gains next to nothing, finding that out anew at every step is not free: the policy takes its time, and
the first draft of a text has the draft model read the prompt. So the choice between being awake and being asleep is a
bandit of its own with two arms, played once per stretch (a text, or 128 tokens of a longer one). Asleep is plain
decoding, which gains nothing over plain decoding. What being awake gains is measured, in tokens: what was produced,
less what plain decoding would have produced in the same modelled seconds, reading and the policy's own included. The
policy sleeps while the upper confidence bound of that gain is below zero (discounted UCB, Garivier & Moulines, ALT
2011): the clearer the loss, the rarer it is woken, but at the latest after ``LONGEST`` stretches.
"""

from __future__ import annotations

from math import log, sqrt

#: Tokens after which a longer text is a new stretch.
STRETCH = 128
#: Weight that the account of the stretches so far keeps at each new one.
KEEP = 0.998
#: A stretch's gain per token is taken to vary by SPREAD until there is data; that counts as PRIOR stretches.
SPREAD, PRIOR = 0.1, 4.0
#: Stretches awake before there is any bound (three of about one length), and most slept through at a time.
LEAST, LONGEST = 2.5, 16
#: Weight of the latest step in the mean of the policy's own seconds, and how many times that mean one step counts most.
LATEST, STALL = 0.02, 10.0
NUMBERS = 9


class SleepSchedule:
    """One level's account of being awake, and when to sleep.

    Parameters
    ----------
    spread : float
        How much a stretch's gain per token is taken to vary until there is data.

    Attributes
    ----------
    tokens, seconds : float
        Produced in the stretches since the last :meth:`start`, and the modelled seconds they took; for the caller to
        add to.
    slept, latest : int
        Stretches slept through, in all and since the policy was awake last.
    """

    def __init__(self, spread: float = SPREAD) -> None:
        self.spread = spread
        self.tokens = self.seconds = 0.0
        self.slept = self.latest = 0
        self._policy, self._steps = 0.0, 0
        # Discounted: stretches asleep or awake; and of those awake tokens, their squares, gain, gain squared by tokens.
        self._sums = [0.0] * 5

    def spent(self, seconds: float) -> None:
        """Note what the policy itself took of a step; the first one, which warms caches up, is no measure of it."""
        self._steps += 1
        if self._steps <= 2:
            self._policy = seconds
            return
        usual, weight = self._policy, 1.0 / (self._steps - 1.0)
        most = STALL * usual
        self._policy += (weight if weight > LATEST else LATEST) * ((seconds if seconds < most else most) - usual)

    def start(self, plain: float, allowed: bool) -> bool:
        """Begin a stretch, and return whether to sleep through it.

        Parameters
        ----------
        plain : float
            Seconds of a step without drafting, the policy's own time included.
        allowed : bool
            Whether plain decoding is the better baseline.
        """
        self._sums = [KEEP * x for x in self._sums]
        self._sums[0] += 1.0
        if self.tokens:
            self._close(plain)
        if allowed and self.latest < LONGEST and self.bound() < 0.0:
            self.slept += 1
            self.latest += 1
            return True
        self.latest = 0
        return False

    def _close(self, plain: float) -> None:
        """Take the stretches since the last start into account."""
        tokens, gain = self.tokens, self.tokens - self.seconds / max(plain - self._policy, 0.1 * plain)
        self.tokens = self.seconds = 0.0
        for i, more in enumerate((tokens, tokens * tokens, gain, gain * gain / tokens), 1):
            self._sums[i] += more

    def bound(self) -> float:
        """Upper confidence bound of the gain per token; infinite after fewer than ``LEAST`` stretches awake."""
        everything, tokens, squares, gain, spread = self._sums
        if tokens * tokens < LEAST * squares or not tokens:
            return float("inf")
        count, mean = tokens * tokens / squares, gain / tokens
        variance = (PRIOR * self.spread**2 + count * max(spread / tokens - mean * mean, 0.0)) / (PRIOR + count)
        return mean + sqrt(2.0 * variance * log(1.0 + everything) / count)

    def row(self) -> list[float]:
        """Everything that is saved; a stretch under way is not."""
        return [float(self.slept), float(self.latest), float(self._steps), self._policy, *self._sums]

    def fill(self, row: list[float]) -> None:
        """Restore :meth:`row`; raises ValueError where a number but the gain is negative."""
        if min(*row[:7], row[8]) < 0.0:
            raise ValueError("negative numbers")
        self.slept, self.latest, self._steps = int(row[0]), int(row[1]), int(row[2])
        self._policy, *self._sums = row[3:]
        self.tokens = self.seconds = 0.0
