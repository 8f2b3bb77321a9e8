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
#: Most stretches slept through at a time.
LONGEST = 16
#: Weight of the latest step in the mean of the policy's own seconds, and how many times that mean one step counts most.
LATEST, STALL = 0.02, 10.0
NUMBERS = 8


class Nap:
    """One level's account of being awake, and when to sleep.

    Attributes
    ----------
    tokens, seconds : float
        Produced in the stretches since the last :meth:`start`, and the modelled seconds they took; for the caller to
        add to.
    slept : int
        Stretches slept through, in all.
    """

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0
        self.slept = self.row_asleep = 0
        self._policy = 0.0
        # Discounted: stretches asleep or awake; and of those awake tokens, their squares, gain, gain squared by tokens.
        self._all = self._weight = self._squares = self._gain = self._spread = 0.0

    def spent(self, seconds: float) -> None:
        """Note what the policy itself took of a step."""
        usual = self._policy
        if usual:
            most = STALL * usual
            self._policy = usual + LATEST * ((seconds if seconds < most else most) - usual)
        else:
            self._policy = seconds

    def start(self, plain: float, allowed: bool) -> bool:
        """Begin a stretch, and return whether to sleep through it.

        Parameters
        ----------
        plain : float
            Seconds of a step without drafting, the policy's own time included.
        allowed : bool
            Whether plain decoding is the better baseline.
        """
        self._all = KEEP * self._all + 1.0
        for name in ("_weight", "_squares", "_gain", "_spread"):
            setattr(self, name, KEEP * getattr(self, name))
        if self.tokens:
            self._close(plain)
        if allowed and self.row_asleep < LONGEST and self.bound() < 0.0:
            self.slept += 1
            self.row_asleep += 1
            return True
        self.row_asleep = 0
        return False

    def _close(self, plain: float) -> None:
        tokens, gain = self.tokens, self.tokens - self.seconds / max(plain - self._policy, 0.1 * plain)
        self.tokens = self.seconds = 0.0
        self._weight += tokens
        self._squares += tokens * tokens
        self._gain += gain
        self._spread += gain * gain / tokens

    def bound(self) -> float:
        """Upper confidence bound of the gain per token; infinite before there is data."""
        weight = self._weight
        if not weight:
            return float("inf")
        count, mean = weight * weight / self._squares, self._gain / weight
        variance = (PRIOR * SPREAD**2 + count * max(self._spread / weight - mean * mean, 0.0)) / (PRIOR + count)
        return mean + sqrt(2.0 * variance * log(1.0 + self._all) / count)

    def row(self) -> list[float]:
        """Everything that is saved; a stretch under way is not."""
        sums = [self._all, self._weight, self._squares, self._gain, self._spread]
        return [float(self.slept), float(self.row_asleep), self._policy, *sums]

    def fill(self, row: list[float]) -> None:
        """Restore :meth:`row`."""
        self.slept, self.row_asleep = int(row[0]), int(row[1])
        self._policy, self._all, self._weight, self._squares, self._gain, self._spread = row[2:]
        self.tokens = self.seconds = 0.0
