"""What one step teaches about every arm, not only the one that was played."""

from __future__ import annotations

import numpy as np

from policies.base import MAX_GAMMA, Outcome


class ArmLabels:
    """Acceptance rates accepted / gamma of arms, from a step that drafted k and accepted n.

    Arms up to k are known: min(n, g) / g. So are larger ones after a rejection, and where the drafter had nothing more
    to propose: n / g. With all k accepted, a larger arm's label is what is known plus what a run of acceptances at the
    sequence's own exponentially weighted acceptance would add. An accepted end of sequence says nothing about longer
    drafts.

    Parameters
    ----------
    arms : tuple of int
        Gammas, rising. Arm 0 has no acceptance rate and gets no label.
    """

    def __init__(self, arms: tuple[int, ...]) -> None:
        self._gammas = np.array(arms, dtype=float)
        self.first = 1 if arms[0] == 0 else 0
        n = np.arange(MAX_GAMMA + 1.0)[:, None]
        self._known = np.minimum(n, self._gammas) / np.maximum(self._gammas, 1.0)
        # Number of arms up to each gamma.
        self._count = [sum(g <= limit for g in arms) for limit in range(MAX_GAMMA + 1)]

    def __call__(self, outcome: Outcome, acceptance: float) -> tuple[int, int, np.ndarray]:
        """Return (start, stop, y): arms start..stop-1 are labelled, with rates ``y[start:stop]``.

        Parameters
        ----------
        outcome : Outcome
            What the step turned out to be.
        acceptance : float
            The sequence's exponentially weighted accepted / tested when the step was decided.
        """
        n = outcome.accepted
        y: np.ndarray = self._known[n]
        if outcome.rejected or (outcome.exhausted and outcome.produced > n):
            return self.first, self._count[MAX_GAMMA], y
        stop = self._count[n]
        if n == outcome.drafted and outcome.produced > n and stop < len(y):
            p = min(max(acceptance, 0.05), 0.95)
            y = y.copy()
            more = self._gammas[stop:]
            y[stop:] = (n + p * (1.0 - p ** (more - n)) / (1.0 - p)) / more
            stop = len(y)
        return self.first, stop, y
