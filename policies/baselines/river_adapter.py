"""river's bandit policies over fixed gammas, through one adapter (river 0.26, ``river.bandit``).

river's policies keep Python objects, so they have no arrays to save: a run starts them afresh. Known limits of 0.26.1
that the adapter works around: Exp3 overflows as its weights grow (they are divided by their maximum now and then, which
changes no probability); ThompsonSampling needs a reward distribution given; ``burn_in`` breaks LinUCBDisjoint. Its
ThompsonSampling cannot tell the probability of its choice, so the propensity of that one is given as 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from policies.base import Context, Decision, Outcome, PolicyError
from policies.costs.cost_aware import CostAware
from policies.optional import require

Name: TypeAlias = Literal["ucb", "exp3", "thompson", "epsilon-greedy", "linucb"]


class River(CostAware):
    """One of river's bandits; the reward is a step's value tokens - lambda * T(k), scaled to about [0, 1].

    Parameters
    ----------
    policy : {'ucb', 'exp3', 'thompson', 'epsilon-greedy', 'linucb'}
        Which bandit.
    epsilon : float
        Exploration: epsilon of ``epsilon-greedy``, gamma of ``exp3``, alpha of ``linucb``, delta of ``ucb``.
    """

    summary = "a bandit of the river library (river:ucb|exp3|thompson|epsilon-greedy|linucb)"
    learns = True
    shares: ClassVar[bool] = False  # the bandit itself cannot be shared, and costs without it would be of no use
    positional: ClassVar[str] = "policy"

    def __init__(self, *, policy: Name = "ucb", epsilon: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        bandit, proba = require("river.bandit", "river"), require("river.proba", "river")  # takes half a second

        if not 0 < epsilon <= 1:
            raise PolicyError(f"epsilon must be above 0 and at most 1, got {epsilon}")
        seed = int(self.rng.integers(2**31))
        self.name = policy
        self.bandit: Any = {
            "ucb": lambda: bandit.UCB(delta=epsilon, seed=seed),
            "exp3": lambda: bandit.Exp3(gamma=epsilon, seed=seed),
            "thompson": lambda: bandit.ThompsonSampling(reward_obj=proba.Gaussian(), seed=seed),
            "epsilon-greedy": lambda: bandit.EpsilonGreedy(epsilon=epsilon, seed=seed),
            "linucb": lambda: bandit.LinUCBDisjoint(alpha=epsilon, seed=seed),
        }[policy]()
        self._ids = list(range(len(self.arms)))
        self._index = {gamma: i for i, gamma in enumerate(self.arms)}
        self._played = [0] * len(self.arms)

    def decide(self, context: Context) -> Decision:
        ids = self._ids[: self.legal(context)]
        features = _context(context) if self.name == "linucb" else None
        first = next((i for i in ids if not self._played[i]), None)
        if first is not None and self.name != "exp3":
            arm, propensity = first, 1.0  # river's means of nothing are zero or undefined
            self._played[arm] = 1
        else:
            share = self._pmf(ids)
            arm = self.bandit.pull(ids) if features is None else self.bandit.pull(ids, context=_named(features))
            propensity = 1.0 if share is None else min(float(share[arm]), 1.0)  # sums may round up
        return Decision(self.new_id(), min(self.arms[arm], context.max_gamma), False, propensity, 0, features)

    def _pmf(self, ids: list[int]) -> np.ndarray | None:
        """Probability of each arm, where river's policy has one that can be written down."""
        p = np.zeros(len(self.arms))
        if self.name == "exp3":
            weights = np.array([self.bandit._weights[i] for i in ids])
            p[ids] = (1 - self.bandit.gamma) * weights / weights.sum() + self.bandit.gamma / len(weights)
            return p
        if self.name == "epsilon-greedy":
            means = [self.bandit._rewards[i].get() for i in ids]
            p[ids] = self.bandit.current_epsilon / len(means)
            p[means.index(max(means))] += 1.0 - self.bandit.current_epsilon
            return p
        return None

    def pmf(self, context: Context) -> np.ndarray | None:
        """Probability of each of ``arms``; None for bandits that cannot tell, and until each arm was played once."""
        ids = self._ids[: self.legal(context)]
        return self._pmf(ids) if self.name == "exp3" or all(self._played[i] for i in ids) else None

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        arm = self._index.get(decision.gamma)
        if arm is None or (decision.gamma != outcome.drafted and not outcome.exhausted):
            return
        reward = float(outcome.produced)
        if self.timed:
            costs = self.costs.level(outcome.level)
            reward -= costs.rate * costs.spent(outcome.drafted, outcome.forwards)
        span = self.arms[-1] + 1.0
        reward = min(max((reward + 0.5 * span) / (1.5 * span), 0.0), 1.0)
        if self.name == "linucb":
            self.bandit.update(arm, _named(decision.features), reward)
        elif self.name == "exp3":
            self._update_exp3(arm, reward, decision.propensity)
        else:
            self.bandit.update(arm, reward)

    def _update_exp3(self, arm: int, reward: float, propensity: float) -> None:
        # river divides by the probability of its latest pull; with late outcomes it has to be that of this decision.
        self.bandit._probabilities[arm] = propensity
        self.bandit.update(arm, reward)
        weights = self.bandit._weights
        top = max(weights.values())
        if top > 1e100:
            for key in weights:
                weights[key] = max(weights[key] / top, 1e-100)


def _context(c: Context) -> np.ndarray:
    return np.array([1.0, c.acceptance, c.mean_entropy / 4, c.mean_confidence, c.max_entropy / 8, c.min_confidence])


def _named(features: np.ndarray | None) -> dict[str, float]:
    return {} if features is None else {f"x{i}": v for i, v in enumerate(features.tolist())}
