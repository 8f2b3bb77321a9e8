"""Whether it pays that the draft model reads what it has not read yet: of most texts nothing, of a long prompt much.

The reading is paid once, before the draft's first token. What it brings comes token by token: n more tokens take the
time of n / r plain steps where the draft may be asked, and of n / u where only lookups may. Both speeds are learnt, and
start from what is usual. How long a text goes on is known from its budget, and from how long texts are.
"""

from __future__ import annotations

from math import exp, inf

import numpy as np

from policies.base import PolicyError, State
from policies.estimators.bayesian_linear import check_array

KEY = "reading."
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


class Speed:
    """How many tokens came of how many steps, the latest ones counting most.

    Attributes
    ----------
    tokens, steps : float
        Discounted sums.
    """

    __slots__ = ("_base", "_new", "_since", "steps", "tokens")

    def __init__(self) -> None:
        self.tokens = self.steps = 0.0
        # What others may know already, how many steps ago that was, and how many steps others do not know.
        self._base, self._since, self._new = (0.0, 0.0), 0, 0

    def add(self, tokens: float, steps: float) -> None:
        """Take in a step of so many tokens, which counts as so many steps."""
        self.tokens = KEEP * self.tokens + tokens
        self.steps = KEEP * self.steps + steps
        self._since += 1
        self._new += 1

    def load(self, tokens: float, steps: float) -> None:
        """Restore the sums."""
        self.tokens, self.steps = tokens, steps
        self._base, self._since, self._new = (tokens, steps), 0, 0

    def _own(self) -> tuple[float, float]:
        kept = KEEP**self._since
        return self.tokens - kept * self._base[0], self.steps - kept * self._base[1]

    def take_delta(self) -> tuple[float, float, float]:
        """Return the sums since the last call, and of how many steps they are."""
        own, count = self._own(), self._new
        self.load(self.tokens, self.steps)
        return *own, float(count)

    def merge(self, tokens: float, steps: float, count: float) -> None:
        """Add another copy's sums of so many steps."""
        own, kept = self._own(), KEEP**count
        self.tokens, self.steps = kept * self.tokens + tokens, kept * self.steps + steps
        self._base, self._since = (self.tokens - own[0], self.steps - own[1]), 0


class Reading:
    """What the draft brings at a level where it has read the text.

    Attributes
    ----------
    asked : Speed
        Tokens, and as many steps without drafting as would have taken as long, where the draft could be asked.
    other : Speed
        The same where it could not, as there was much to read.
    """

    __slots__ = ("asked", "other")

    def __init__(self) -> None:
        self.asked, self.other = Speed(), Speed()

    def add(self, unread: bool, tokens: int, steps: float) -> None:
        """Take in a step of so many tokens, which took as long as so many steps without drafting."""
        if not unread:
            self.asked.add(tokens, steps)
            return
        self.asked.add(0.0, 0.0)
        self.other.add(tokens, steps)

    def pays(self, steps: float, remaining: int) -> bool:
        """Whether a reading that takes as long as so many plain steps should be made where at most so many tokens may
        follow."""
        more = LENGTH * (1.0 - exp(-remaining / LENGTH))
        each = (STEPS + self.asked.steps) / (USUAL * STEPS + self.asked.tokens)
        other = (STEPS + self.other.steps) / (STEPS + self.other.tokens)
        return more * (other - each) > steps


class Readings:
    """:class:`Reading` by compression level."""

    def __init__(self) -> None:
        self._levels = dict[str, Reading]()

    def level(self, name: str) -> Reading:
        """Return a level's, made on first use."""
        found = self._levels.get(name)
        if found is None:
            found = self._levels[name] = Reading()
        return found

    def state(self) -> State:
        """Return the sums of all levels that have any."""
        return {
            f"{KEY}{name}": np.array([r.asked.tokens, r.asked.steps, r.other.tokens, r.other.steps])
            for name, r in self._levels.items()
        }

    def load(self, state: State) -> None:
        """Restore :meth:`state`; states of former versions have none."""
        self._levels.clear()
        for key in [key for key in state if key.startswith(KEY)]:
            sums = check_array(state, key, (4,)).astype(float)
            if (sums < 0.0).any():
                raise PolicyError(f"the state's '{key}' must not be below zero")
            tokens, steps, other_tokens, other_steps = sums.tolist()
            reading = self.level(key.removeprefix(KEY))
            reading.asked.load(tokens, steps)
            reading.other.load(other_tokens, other_steps)

    def take_delta(self) -> State:
        """Return what was added since the last call."""
        return {
            f"{KEY}{name}": np.array([*reading.asked.take_delta(), *reading.other.take_delta()])
            for name, reading in self._levels.items()
        }

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        for key in [key for key in delta if key.startswith(KEY)]:
            tokens, steps, count, *other = check_array(delta, key, (6,)).tolist()
            reading = self.level(key.removeprefix(KEY))
            reading.asked.merge(tokens, steps, count)
            reading.other.merge(*other)
