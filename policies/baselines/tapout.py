"""TapOut: a bandit chooses which rule stops the draft (Sridhar et al., 2025, arXiv 2511.02017).

Each step is drafted under one of several known stopping rules. UCB1 chooses it: each rule once, then the largest mean
reward + sqrt(2 ln t / n). The reward blends how many tokens were accepted and how large a part of the draft that was.

What the source leaves open, and what we chose. We could read the abstract and summaries of the text. They say: UCB1
over the rules, once per draft, with a blended reward, is the main variant; the rules need no training. They do not
give the numbers, so those are ours, and results here are not the paper's:

- The rules: the draft's confidence below 0.4, as transformers' threshold starts; the entropy above 1 nat; ``svip``;
  ``adaedl``, which learns from its own steps only; the best logit less than 1 above the second.
- The reward is alpha n / cap + (1 - alpha) n / k, with n of k tokens accepted, alpha = 0.5, and a cap of 16 tokens.
- A step whose cap the end of a budget cut, or that drafted nothing, teaches nothing.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from policies.base import MARGIN, MAX_GAMMA, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.baselines.adaedl import AdaEdl
from policies.baselines.engines.hf import Confidence
from policies.baselines.svip import Svip
from policies.estimators.bayesian_linear import check_array


class _Margin(Svip):
    """Stop after a token whose logit is not far enough above the second."""

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, MARGIN) >= 1.0)


class TapOut(Policy):
    """Draft each step under one of five stopping rules, chosen by UCB1.

    Parameters
    ----------
    alpha : float
        Weight of the accepted length in the reward; the rest is that of the acceptance rate.
    cap : int
        Most tokens to draft.
    """

    summary = "TapOut: UCB1 over five stopping rules (confidence, entropy, SVIP, AdaEDL, margin)"
    learns = True
    positional: ClassVar[str] = "alpha"

    def __init__(self, *, alpha: float = 0.5, cap: int = MAX_GAMMA, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= alpha <= 1 or not 1 <= cap <= MAX_GAMMA:
            raise PolicyError(f"need alpha from 0 to 1 and cap from 1 to {MAX_GAMMA}, got {alpha} and {cap}")
        self.alpha, self.cap = alpha, cap
        self.adaedl = AdaEdl(cap=cap)
        # Neither asked to learn: at their thresholds, confidence and sqrt(entropy) > 1.
        self.rules: dict[str, Policy] = {
            "confidence": Confidence(), "entropy": Svip(threshold=1.0, scale=1.0), "svip": Svip(),
            "adaedl": self.adaedl, "margin": _Margin(),
        }  # fmt: skip
        self._rules = tuple(self.rules.values())
        self.sums = np.zeros((2, len(self._rules)))  # steps and total reward of each rule

    def decide(self, context: Context) -> Decision:
        n, total = self.sums
        bounds = total / n + np.sqrt(2.0 * math.log(n.sum()) / n) if n.all() else -n
        rule = int(bounds.argmax())
        return Decision(self.new_id(), min(self.cap, context.max_gamma), ask_per_token=True, features=rule)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(self._rules[decision.features].proceed(decision, draft))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or decision.features is None or not outcome.drafted:
            return
        if decision.gamma < self.cap:
            return
        n, k = outcome.accepted, outcome.drafted
        self.sums[:, decision.features] += 1.0, self.alpha * n / self.cap + (1.0 - self.alpha) * n / k
        if self._rules[decision.features] is self.adaedl:
            self.adaedl.learn(decision, outcome)

    def state_dict(self) -> State:
        return {"tapout": self.sums.copy()} | self.adaedl.state_dict()

    def load_state_dict(self, state: State) -> None:
        sums = check_array(state, "tapout", self.sums.shape)
        self.adaedl.load_state_dict(state)
        self.sums = sums.copy()

    def info(self) -> dict[str, Any]:
        return {f"{name}.steps": int(n) for name, n in zip(self.rules, self.sums[0].tolist(), strict=True)}
