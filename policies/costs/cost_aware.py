"""What policies share that weigh tokens against measured seconds."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from policies.base import ARMS, MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.costs.cost_model import CostModel, CostPrior
from policies.costs.level_costs import HALF_LIFE
from policies.estimators.adwin import Drift

Objective: TypeAlias = Literal["tokens_per_second", "tokens_per_step"]


class CostAware(Policy):
    """A policy over arms with an online cost model per compression level.

    Parameters
    ----------
    arms : tuple of int
        Gammas to choose from, each 0 to 16, rising.
    objective : {'tokens_per_second', 'tokens_per_step'}
        With ``tokens_per_second`` a step's reward is its tokens less lambda times its seconds (renewal-reward,
        Dinkelbach); ``tokens_per_step`` ignores time.
    cost_half_life : float
        Steps after which a measured time counts half.
    adwin : float
        Where above 0, an ADWIN detector of this significance watches the acceptance of every level's drafts, and the
        policy returns to what it started from when it finds a change, costs excepted. Off by default: forgetting
        (``discount``) loses less to a change that the prior does not know either.
    """

    #: True if :class:`~policies.guards.safety.SafetyGuard` goes around the policy by default.
    guarded: ClassVar[bool] = False
    #: False where what was learnt does not add up over workers: then nothing is handed out, costs neither.
    shares: ClassVar[bool] = True
    #: What every delta of the policy holds besides sums of costs; others' deltas are told by its absence.
    delta_key: ClassVar[str] = ""

    def __init__(
        self,
        *,
        arms: tuple[int, ...] = ARMS,
        objective: Objective = "tokens_per_second",
        cost_half_life: float = HALF_LIFE,
        adwin: float = 0.0,
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not arms or list(arms) != sorted(set(arms)) or arms[0] < 0 or arms[-1] > MAX_GAMMA:
            raise PolicyError(f"arms must be different gammas from 0 to {MAX_GAMMA} in rising order, got {arms}")
        if objective not in ("tokens_per_second", "tokens_per_step"):
            raise PolicyError(f"objective must be tokens_per_second or tokens_per_step, got '{objective}'")
        if not 1 <= cost_half_life < float("inf"):
            raise PolicyError(f"cost_half_life must be at least 1 step, got {cost_half_life}")
        self.arms = tuple(arms)
        self.gammas = np.array(arms, dtype=float)
        self.timed = objective == "tokens_per_second"
        self.costs = CostModel(cost_half_life, self.arms)
        if adwin and type(self).forget is CostAware.forget:
            raise PolicyError("adwin resets what was learnt, and nothing here could be reset: leave it away")
        self.drift = Drift(adwin) if adwin else None

    def legal(self, context: Context) -> int:
        """Return how many arms the step allows, at least one."""
        return bisect_right(self.arms, context.max_gamma) or 1

    def forget(self) -> None:
        """Return to what the policy started from; costs, which forget by themselves, are kept."""

    def set_costs(self, level: str, prior: CostPrior) -> None:
        """Tell the policy what is known of a level's times before the first step, e.g. from a calibration.

        A state brings what its policy was told: call this after :meth:`load_state_dict`.
        """
        self.costs.set_prior(level, prior)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        if decision.features is not None and outcome.labelled:
            self.teach(decision, outcome)
            if self.drift is not None and self.drift.add(outcome):
                self.forget()

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        """Learn from a step that tested at least one token; asked once per decision that kept features."""

    def state_dict(self) -> State:
        return self.costs.state()

    def load_state_dict(self, state: State) -> None:
        self.costs.load(state)

    def take_delta(self) -> State:
        return self.costs.take_delta() if self.shares else {}

    def merge(self, delta: State) -> None:
        own = [key for key in delta if not key.startswith("cost.")]
        alone = type(self).take_delta is CostAware.take_delta  # there is nothing but costs to hand out
        if delta and (self.delta_key not in own if self.delta_key else own and alone):
            raise PolicyError(f"this is no delta of {type(self).__name__}: merge deltas of the same policy only")
        if self.shares:
            self.costs.merge(delta)

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.drift is None else {"resets": self.drift.alarms}
        for name, costs in self.costs.levels.items():
            found[f"{name}.rate"] = float(costs.rate)
            found[f"{name}.draft_seconds"] = float(costs.draft)
            found[f"{name}.verify_seconds"] = [float(v) for v in costs.verify]
        return found
