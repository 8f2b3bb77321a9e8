"""A policy for calibrations: it draws the number of drafts, whatever comes of them."""

from __future__ import annotations

from policies.base import Context, Decision, Policy

#: Numbers of drafts; none is as frequent as all others together.
GAMMAS = (0, 0, 0, 0, 1, 2, 4, 8)


class Exploring(Policy):
    """Draws gamma at random, and keeps it for 16 requests that it is asked for, one after the other."""

    summary = "gamma drawn at random: for calibrations"

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self._asked, self._gamma = -1, 0

    def decide(self, context: Context) -> Decision:
        asked = self.new_id()
        if asked // 16 != self._asked:
            self._asked, self._gamma = asked // 16, int(self.rng.choice(GAMMAS))
        return Decision(asked, min(self._gamma, context.max_gamma))
