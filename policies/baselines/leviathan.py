"""The closed form of Leviathan et al. (ICML 2023, arXiv 2211.17192) with acceptance and costs estimated online."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware
from policies.estimators.bayesian_linear import check_array

GAMMAS = tuple(range(MAX_GAMMA + 1))


def expected_tokens(alpha: float, gamma: np.ndarray) -> np.ndarray:
    """E(gamma) = (1 - alpha^(gamma+1)) / (1 - alpha), the tokens of a step if each is accepted with chance alpha."""
    if alpha > 1.0 - 1e-9:
        return gamma + 1.0
    return (1.0 - alpha ** (gamma + 1.0)) / (1.0 - alpha)


class Leviathan(CostAware):
    """argmax over gamma >= 0 of E(gamma) / T(gamma), alpha = accepted / tested, exponentially weighted per level.

    Parameters
    ----------
    half_life : float
        Drafting steps after which an acceptance counts half.
    start : float
        alpha before there is data, worth ten tested tokens.
    """

    summary = "Leviathan's closed form: argmax E(gamma)/T(gamma) with an exponentially weighted acceptance"
    learns = True
    shares: ClassVar[bool] = False  # the weighted counts are one sequence's
    positional: ClassVar[str] = "half_life"

    def __init__(
        self, *, half_life: float = 50.0, start: float = 0.5, arms: tuple[int, ...] = GAMMAS, **options: Any
    ) -> None:
        super().__init__(arms=arms, **options)
        if not 1 <= half_life < float("inf") or not 0 < start < 1:
            raise PolicyError(f"half_life must be at least 1 and start between 0 and 1, got {half_life} and {start}")
        self.keep, self.start = 0.5 ** (1.0 / half_life), start
        self.counts: dict[str, list[float]] = {}

    def alpha(self, level: str) -> float:
        """Acceptance per tested token at a level."""
        accepted, labelled = self.counts.get(level, (10.0 * self.start, 10.0))
        return accepted / labelled

    def decide(self, context: Context) -> Decision:
        tokens = expected_tokens(self.alpha(context.level), self.gammas)
        if self.timed:
            tokens = tokens / self.costs.level(context.level).arm_seconds
        return Decision(self.new_id(), min(self.arms[int(tokens[: self.legal(context)].argmax())], context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        if outcome.labelled:
            accepted, labelled = self.counts.get(outcome.level, (10.0 * self.start, 10.0))
            keep = self.keep
            self.counts[outcome.level] = [keep * accepted + outcome.accepted, keep * labelled + outcome.labelled]

    def state_dict(self) -> State:
        return super().state_dict() | {f"counts.{level}": np.array(row) for level, row in self.counts.items()}

    def load_state_dict(self, state: State) -> None:
        keys = [key for key in state if key.startswith("counts.")]
        self.counts = {key.removeprefix("counts."): check_array(state, key, (2,)).tolist() for key in keys}
        super().load_state_dict(state)
