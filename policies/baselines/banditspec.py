"""BanditSpec's UCBSpec and EXP3Spec over fixed gammas (Hou et al., ICML 2025, arXiv 2505.15141).

The reward of a step is the number of tokens Y that it produced, 1 to L + 1 with L the largest gamma. The paper takes
the rounds of all arms to last equally long. With ``objective=tokens_per_second`` the price of a step in tokens,
lambda * T(k), is taken off, so that arms of different length compare; then Y is shifted back to its old range.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from policies.base import Context, Decision, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware, Objective
from policies.estimators.bayesian_linear import check_array

ARMS = (1, 2, 4, 6, 8, 12, 16)


class _ArmBandit(CostAware):
    """Rewards by arm. Where the budget's end allows no arm, the cut first one is played, which teaches about none."""

    learns = True
    shares: ClassVar[bool] = False  # which arm comes next depends on the order of all steps: workers keep their own
    positional: ClassVar[str] = "objective"
    sums: np.ndarray

    def __init__(
        self, *, arms: tuple[int, ...] = ARMS, objective: Objective = "tokens_per_step", **options: Any
    ) -> None:
        super().__init__(arms=arms, objective=objective, **options)
        self.longest = self.arms[-1]
        if not self.longest:
            raise PolicyError("arms must hold a gamma above 0: there is nothing to choose from")
        self._index = {gamma: i for i, gamma in enumerate(self.arms)}

    def reward(self, outcome: Outcome) -> float:
        """Y, from 1 to L + 1; where time counts less the price of the step, plus that of an empty one."""
        if not self.timed:
            return float(outcome.produced)
        costs = self.costs.level(outcome.level)
        price = costs.rate * (costs.spent(outcome.drafted, outcome.forwards) - costs.seconds.item(0))
        return float(min(max(outcome.produced - price, 0.0), self.longest + 1.0))

    def _arm(self, decision: Decision, outcome: Outcome) -> int | None:
        if not self.first_time(decision.id):
            return None
        self.costs.observe(outcome)
        return self._index.get(decision.gamma) if outcome.exhausted or decision.gamma == outcome.drafted else None

    def state_dict(self) -> State:
        return super().state_dict() | {"arms": self.gammas.copy(), "sums": self.sums.copy()}

    def load_state_dict(self, state: State) -> None:
        arms = check_array(state, "arms", self.gammas.shape)
        if not np.array_equal(arms, self.gammas):
            raise PolicyError(f"the state is about arms {arms.tolist()}, this policy has {list(self.arms)}")
        self.sums = check_array(state, "sums", self.sums.shape).copy()
        super().load_state_dict(state)


class UcbSpec(_ArmBandit):
    """UCBSpec: each arm once, then the largest mean + (L/2) sqrt((1+n)/n^2 (1 + 2 ln(K t^2 sqrt(1+n) / delta))).

    Parameters
    ----------
    delta : float
        Confidence level.
    arms : tuple of int
        Gammas to choose from.
    """

    summary = "BanditSpec's UCB over fixed gammas (objective=tokens_per_step|tokens_per_second)"

    def __init__(self, *, delta: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < delta < 1:
            raise PolicyError(f"delta must be between 0 and 1, got {delta}")
        self.delta = delta
        self.sums = np.zeros((2, len(self.arms)))  # plays and total reward of each arm

    def bounds(self) -> np.ndarray:
        """Upper confidence bound of every arm; infinity for those not played."""
        n, total = self.sums
        t, k = max(n.sum(), 1.0), len(n)
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(k * t * t * np.sqrt(1.0 + n) / self.delta)
            bound = total / n + 0.5 * self.longest * np.sqrt((1.0 + n) / n**2 * (1.0 + 2.0 * log))
        return np.where(n > 0, bound, np.inf)

    def decide(self, context: Context) -> Decision:
        gamma = self.arms[int(self.bounds()[: self.legal(context)].argmax())]
        return Decision(self.new_id(), min(gamma, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        arm = self._arm(decision, outcome)
        if arm is not None:
            self.sums[:, arm] += 1.0, self.reward(outcome)


class Exp3Spec(_ArmBandit):
    """EXP3Spec: p_i ~ exp(-eta_t sum Z_i), Z_i = 1{i = I} (L + 1 - Y) / (L p_i), eta_t = sqrt(ln K / (t K)).

    Parameters
    ----------
    arms : tuple of int
        Gammas to choose from.
    """

    summary = "BanditSpec's EXP3 over fixed gammas (objective=tokens_per_step|tokens_per_second)"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sums = np.zeros((2, len(self.arms)))  # plays and total estimated loss of each arm

    def pmf(self, context: Context) -> np.ndarray:
        """Probability of each of ``arms``."""
        k, t = len(self.arms), self.sums[0].sum() + 1.0
        legal = self.legal(context)
        weight = np.zeros(k)
        loss = self.sums[1, :legal]
        weight[:legal] = np.exp(-math.sqrt(math.log(k) / (t * k)) * (loss - loss.min()))
        weight /= weight.sum()
        return weight

    def decide(self, context: Context) -> Decision:
        p = self.pmf(context)
        arm = min(int(np.searchsorted(np.cumsum(p), self.rng.random())), self.legal(context) - 1)
        return Decision(self.new_id(), min(self.arms[arm], context.max_gamma), propensity=float(p[arm]))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        arm = self._arm(decision, outcome)
        if arm is not None:
            loss = (self.longest + 1.0 - self.reward(outcome)) / (self.longest * decision.propensity)
            self.sums[:, arm] += 1.0, loss
