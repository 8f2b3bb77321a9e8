"""The steps of an engine that decodes several sequences at once."""

from __future__ import annotations

from policies.base import Decision, Outcome
from policies.level_features import batch_size


class EngineSteps:
    """Gathers what the sequences of a batch learn until the engine's step is whole.

    An engine verifies its whole batch in one step, and its rules count such steps. Here every sequence of a batch
    learns by itself. The name of the level says how large the batch is at most (``nf4@8``: 5 to 8 sequences). A step is
    whole once so many outcomes are in, or when the next decision is asked for (:meth:`take`). One sequence alone makes
    a step with every outcome.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Decision, Outcome]] = []

    def add(self, decision: Decision, outcome: Outcome) -> list[tuple[Decision, Outcome]]:
        """Take in an outcome; return the whole step if this one completes it, else an empty list."""
        self._open.append((decision, outcome))
        return self.take() if len(self._open) >= batch_size(outcome.level) else []

    def take(self) -> list[tuple[Decision, Outcome]]:
        """Return what is there of a step, and start the next one."""
        found, self._open = self._open, []
        return found
