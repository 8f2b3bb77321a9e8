"""SpecDec++: stop where a rejection among the drafted tokens is likely (Huang et al., 2024, arXiv 2405.19715).

The paper trains an acceptance head on the draft's hidden states; here the head is the logistic regression of
:mod:`policies.acceptance.model` on the draft's signals, pretrained, learning online, or both.
"""

from __future__ import annotations

from typing import ClassVar

from policies.acceptance.model import Hazard
from policies.acceptance.step import Step
from policies.base import Context, Decision, Draft, Outcome, Policy, PolicyError, State


class SpecDecPlusPlus(Policy):
    """Stop once 1 - prod a_i > threshold, with at least ``least`` and at most ``cap`` tokens.

    Parameters
    ----------
    threshold : float
        Probability of at least one rejection at which drafting ends; 0.3 in the paper's code.
    least, cap : int
        Bounds; the paper's are 2 and 20, cut to what a step allows.
    acceptance : str
        An npz of acceptance weights; the shipped ones by default, ``none`` for a cold start.
    train : bool
        Whether the head goes on learning; the paper's is frozen after its training.
    """

    summary = "SpecDec++: stop when the predicted chance of a rejection exceeds 0.3"
    learns = True
    positional: ClassVar[str] = "threshold"

    def __init__(
        self,
        *,
        threshold: float = 0.3,
        least: int = 2,
        cap: int = 20,
        acceptance: str = "",
        train: bool = True,
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= threshold <= 1 or not 0 <= least <= cap:
            raise PolicyError(f"need threshold from 0 to 1 and 0 <= least <= cap, got {threshold}, {least}, {cap}")
        self.threshold, self.least, self.cap, self.train = threshold, least, cap, train
        self.hazard = Hazard(acceptance, discount=1.0)

    def decide(self, context: Context) -> Decision:
        features = Step(context, self.hazard)
        return Decision(self.new_id(), min(self.cap, context.max_gamma), True, 1.0, self.version, features)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        step: Step = decision.features
        drafted = draft.drafted
        step.extend(drafted, draft)
        return drafted < self.least or 1.0 - step.survival[drafted] <= self.threshold

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or not self.train or decision.features is None or not outcome.tested:
            return
        decision.features.extend(outcome.tested, outcome)
        self.hazard.add(decision.features, outcome.tested, outcome.accepted)
        if self.hazard.pending >= 16:
            self.hazard.refresh()
            self.version += 1

    def state_dict(self) -> State:
        return self.hazard.state()

    def load_state_dict(self, state: State) -> None:
        self.hazard.load(state)

    def take_delta(self) -> State:
        return self.hazard.take_delta()

    def merge(self, delta: State) -> None:
        self.hazard.merge(delta)
