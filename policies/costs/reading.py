"""Whether it pays that the draft model reads what it has not read yet: of most texts nothing, of a long prompt much.

The reading is paid once, before the draft's first token. What it brings comes token by token: n more tokens take the
time of n / r plain steps where the draft may be asked, and of n / u where only lookups may. Both speeds are learnt, and
start from what is usual. How long a text goes on is known from its budget, and from how long texts are.
"""

from __future__ import annotations

from math import exp, inf

#: Catching up by fewer tokens is left out: that is within the noise of a forward.
CAUGHT = 8
#: Reading that takes less than so many steps without drafting is not weighed.
MUCH = 3.0
#: Tokens per plain step's time beforehand where the draft may be asked, how many steps that counts for, and what is
#: kept of what was seen at each step.
USUAL, STEPS, KEEP = 1.3, 30.0, 0.998
#: Tokens after which a text ends on average, if its budget does not end it before.
LENGTH = 256.0


def dear(catch_up: float, plain: float) -> float:
    """Return from how many unread tokens on reading is weighed: one takes ``catch_up``, a plain step ``plain``."""
    return max(MUCH * plain / catch_up, CAUGHT) if catch_up > 0.0 else inf


class Reading:
    """What the draft brings at a level where it has read the text.

    Attributes
    ----------
    tokens, steps : float
        Tokens, and as many steps without drafting as would have taken as long, where the draft could be asked.
    other_tokens, other_steps : float
        The same where it could not, as there was much to read.
    """

    __slots__ = ("other_steps", "other_tokens", "steps", "tokens")

    def __init__(self) -> None:
        self.tokens = self.steps = self.other_tokens = self.other_steps = 0.0

    def add(self, unread: bool, tokens: int, steps: float) -> None:
        """Take in a step of so many tokens, which took as long as so many steps without drafting."""
        self.tokens *= KEEP
        self.steps *= KEEP
        if not unread:
            self.tokens += tokens
            self.steps += steps
            return
        self.other_tokens = KEEP * self.other_tokens + tokens
        self.other_steps = KEEP * self.other_steps + steps

    def pays(self, steps: float, remaining: int) -> bool:
        """Whether a reading that takes as long as so many plain steps should be made where at most so many tokens may
        follow."""
        more = LENGTH * (1.0 - exp(-remaining / LENGTH))
        each = (STEPS + self.steps) / (USUAL * STEPS + self.tokens)
        other = (STEPS + self.other_steps) / (STEPS + self.other_tokens)
        return more * (other - each) > steps
