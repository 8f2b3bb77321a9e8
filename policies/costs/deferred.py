"""Steps' times are noted when they are known, and taken in together later.

After a forward of the target nothing of the policy is left in the processor's caches: what is done at every step takes
several times as long as the same work done for many steps at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

from policies.base import Outcome

#: A step's seconds, those of its verification and its draft, tokens submitted, forwards of the draft, context length,
#: tokens caught up and produced, threads.
Times: TypeAlias = tuple[float, float, float, int, int, int, int, int, int]

#: Steps that may wait.
MOST = 256


class Deferred(ABC):
    """Notes times until they are due.

    Attributes
    ----------
    steps : int
        Steps seen, those included that wait.
    """

    def __init__(self, early: int) -> None:
        self.steps, self._threads, self._early = 0, 0, early
        self._waiting, self._due = list[Times](), 1

    def observe(self, outcome: Outcome) -> None:
        """Note one step's times. The first ``early`` ones, and those of another number of threads, are due at once."""
        o = outcome
        total, verify, draft = o.seconds, o.verify_seconds, o.draft_seconds
        self._waiting.append(
            (total, verify, draft, o.drafted, o.forwards, o.context_length, o.caught_up, o.produced, o.threads)
        )
        if 0.0 < total < 1e9 and verify >= 0.0 and draft >= 0.0:
            self.steps += 1
            self._due -= 1
            if self._due <= 0 or self.steps <= self._early or o.threads != self._threads:
                self.take()
        elif len(self._waiting) >= MOST:  # where no clock is read, no step is ever due
            self.take()

    def take(self) -> None:
        """Take the noted steps in."""
        waiting, self._waiting = self._waiting, []
        for times in waiting:
            self._add(*times)
        self._due = self._until_due()

    @abstractmethod
    def _add(
        self, total: float, verify: float, draft: float, k: int, drafted: int, context: int, caught_up: int,
        produced: int, threads: int,
    ) -> None:  # fmt: skip
        """Take in one step."""

    @abstractmethod
    def _until_due(self) -> int:
        """Return after how many more steps they are due."""
