"""A policy that needs its guard."""

from __future__ import annotations

from policies.base import Context, Decision, Outcome, Policy
from policies.costs.cost_model import CostPrior
from policies.guards.safety import SafetyGuard
from tests.support.tapes import COSTS


class Stubborn(Policy):
    """Always one gamma, and claims to learn."""

    learns = True

    def __init__(self, gamma: int) -> None:
        super().__init__()
        self.gamma = gamma

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.gamma, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.first_time(decision.id)


def told(policy: SafetyGuard, level: str) -> SafetyGuard:
    """Give a guard the true costs."""
    t_d, verify, growth = COSTS[level]
    policy.model.set_prior(level, CostPrior(t_d, (verify, verify + growth), 0.001))
    return policy
