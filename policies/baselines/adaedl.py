"""AdaEDL: an entropy-based bound against an adaptive threshold (Agrawal et al., 2024, arXiv 2410.18351)."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from policies.base import ENTROPY, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.baselines.svip import LN2
from policies.estimators.bayesian_linear import check_array


class AdaEdl(Policy):
    """Stop after a token where 1 - sqrt(0.2 H) < lambda (H in nats), with lambda steering acceptance towards 0.9.

    After each round AR <- 0.5 AR + 0.5 n/k; lambda' is lambda + 0.01 if AR < 0.9, else lambda - 0.01 if fewer than the
    most allowed tokens were accepted, else lambda; lambda <- 0.9 lambda + 0.1 lambda'. At least one token is drafted.

    Parameters
    ----------
    threshold : float
        lambda to start from.
    cap : int
        k_max, most tokens to draft.
    target : float
        Wanted acceptance rate.
    """

    summary = "AdaEDL: stop when 1 - sqrt(0.2 * entropy) < an adaptive threshold (nats)"
    learns = True
    positional: ClassVar[str] = "threshold"

    def __init__(
        self, *, threshold: float = 0.4, cap: int = 16, target: float = 0.9, seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not (-10 <= threshold <= 1 and 0 < target <= 1 and cap >= 1):
            raise PolicyError(f"need threshold from -10 to 1, 0 < target <= 1, cap >= 1: {threshold}, {target}, {cap}")
        self.threshold, self.cap, self.target = threshold, cap, target
        self.rate = target

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.cap, context.max_gamma), stops=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        entropy = max(draft.signals.item(draft.drafted - 1, ENTROPY), 0.0) * LN2
        return 1.0 - math.sqrt(0.2 * entropy) >= self.threshold

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or not outcome.drafted:
            return
        self.rate = 0.5 * self.rate + 0.5 * outcome.accepted / outcome.drafted
        if self.rate < self.target:
            wanted = self.threshold + 0.01
        elif outcome.accepted != decision.gamma:
            wanted = self.threshold - 0.01
        else:
            wanted = self.threshold
        self.threshold = 0.9 * self.threshold + 0.1 * wanted

    def state_dict(self) -> State:
        return {"adaedl": np.array([self.threshold, self.rate])}

    def load_state_dict(self, state: State) -> None:
        self.threshold, self.rate = check_array(state, "adaedl", (2,)).tolist()
