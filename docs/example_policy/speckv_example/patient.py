"""`patient`: drafts on while the draft is confident, and learns how confident it has to be."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import CONFIDENCE, Context, Decision, Draft, Outcome, Policy, PolicyError, State


class Patient(Policy):
    """Stop after a token whose confidence is below a threshold that moves towards the wanted acceptance rate.

    Parameters
    ----------
    wanted : float
        Acceptance rate to aim at, between 0 and 1: the threshold rises after rejections and falls after acceptances.
    step : float
        How far it moves.
    """

    summary = "stops at low confidence; the threshold follows the acceptance (example)"
    learns = True
    positional: ClassVar[str] = "wanted"

    def __init__(self, *, wanted: float = 0.7, step: float = 0.02, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 < wanted < 1:
            raise PolicyError(f"wanted must be between 0 and 1, got {wanted}")
        self.wanted, self.step, self.threshold = wanted, step, 0.5

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), context.max_gamma, stops=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals[-1, CONFIDENCE] >= self.threshold)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        # At the wanted rate the expected moves up and down are equal.
        up = (outcome.tested - outcome.accepted) * self.wanted
        down = outcome.accepted * (1.0 - self.wanted)
        self.threshold = min(max(self.threshold + self.step * (up - down), 0.0), 1.0)

    def state_dict(self) -> State:
        return {"patient.threshold": np.array(self.threshold)}

    def load_state_dict(self, state: State) -> None:
        self.threshold = float(state["patient.threshold"])

    def info(self) -> dict[str, Any]:
        return {"threshold": self.threshold}
