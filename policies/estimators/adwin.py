"""Resets at abrupt changes: an ADWIN detector per compression level watches the acceptance of drafted tokens."""

from __future__ import annotations

from typing import Any

from policies.base import Outcome, PolicyError
from policies.optional import require

#: Steps that wait before the detectors see them, off the hot path.
BATCH = 32


class Drift:
    """Tells when the acceptance of a level's drafts has changed (ADWIN: Bifet & Gavaldà, 2007; river's).

    Parameters
    ----------
    delta : float
        Chance of a false alarm that ADWIN's test allows, between 0 and 1.

    Attributes
    ----------
    alarms : int
        Changes found so far.
    """

    def __init__(self, delta: float) -> None:
        if not 0 < delta < 1:
            raise PolicyError(f"adwin must be between 0 and 1, or 0 for off, got {delta}")
        self.delta, self.alarms = delta, 0
        self._make = require("river.drift", "river").ADWIN
        self._detectors: dict[str, Any] = {}
        self._waiting: list[tuple[str, int, int]] = []

    def add(self, outcome: Outcome) -> bool:
        """Note a step; True where a batch of them shows a change."""
        self._waiting.append((outcome.level, outcome.accepted, outcome.labelled))
        return len(self._waiting) >= BATCH and self._check()

    def _check(self) -> bool:
        found = False
        for level, accepted, labelled in self._waiting:
            detector = self._detectors.get(level)
            if detector is None:
                detector = self._detectors[level] = self._make(delta=self.delta)
            for j in range(labelled):
                detector.update(float(j < accepted))
                found |= bool(detector.drift_detected)
        self._waiting.clear()
        self.alarms += found
        return found
