"""SGLang's adaptive number of draft steps (pull request sgl-project/sglang#21599, ``adaptive_spec_params.py``)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.estimators.bayesian_linear import check_array

WARM_UP, INTERVAL = 10, 5


class SgLang(Policy):
    """Move between tiers of gamma by an exponentially weighted accepted length e <- 0.8 e + 0.2 n.

    After 10 steps of warm-up, every 5th step: go down while e <= previous tier - 0.75, else up while e > tier - 0.5.

    Parameters
    ----------
    start : int
        The first tier.
    tiers : tuple of int
        Gammas to move between.
    """

    summary = "SGLang's adaptive tiers of gamma by the average accepted length"
    learns = True
    positional: ClassVar[str] = "start"

    def __init__(
        self, *, start: int = 3, tiers: tuple[int, ...] = (1, 3, 5, 7), seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not tiers or list(tiers) != sorted(set(tiers)) or tiers[0] < 1 or tiers[-1] > MAX_GAMMA:
            raise PolicyError(f"tiers must be different gammas from 1 to {MAX_GAMMA} in rising order, got {tiers}")
        if start not in tiers:
            raise PolicyError(f"start must be one of the tiers {tiers}, got {start}")
        self.tiers, self.tier = tiers, tiers.index(start)
        self.average, self.steps = start - 1.0, 0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.tiers[self.tier], context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or not outcome.drafted:
            return
        self.average = 0.8 * self.average + 0.2 * outcome.accepted
        self.steps += 1
        if self.steps <= WARM_UP or (self.steps - WARM_UP) % INTERVAL:
            return
        before, tiers = self.tier, self.tiers
        while self.tier > 0 and self.average <= tiers[self.tier - 1] - 0.75:
            self.tier -= 1
        if self.tier == before:
            while self.tier < len(tiers) - 1 and self.average > tiers[self.tier] - 0.5:
                self.tier += 1

    def state_dict(self) -> State:
        return {"sglang": np.array([self.tier, self.average, self.steps], dtype=float)}

    def load_state_dict(self, state: State) -> None:
        tier, average, steps = check_array(state, "sglang", (3,)).tolist()
        if not 0 <= tier < len(self.tiers):
            raise PolicyError(
                f"the state's tier {tier:g} does not exist here: load it with the tiers it was saved with"
            )
        self.tier, self.average, self.steps = int(tier), average, int(steps)
