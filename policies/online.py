"""MLP16 that goes on learning: its hidden layer as features, its output layer as the prior of a Bayesian head.

The head keeps predicting MLP16's quantity, every arm's acceptance rate accepted / gamma. Thompson sampling (or UCB)
over its Gaussian posterior picks the arm with the best reward, rate * gamma + 1 - lambda * T(gamma), in tokens.

A step teaches about more arms than the one played, see :mod:`policies.labels`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import ARMS, Context, Decision, Outcome, PolicyError, State
from policies.gaussian import GaussianHead, check_array
from policies.labels import ArmLabels, Mode
from policies.learned import CostAware
from policies.mlp16 import HIDDEN, Mlp16, Objective, resolve_weights

STATE_FORMAT = 1
#: Posterior samples per refresh; a Thompson decision picks one of them, so its propensity is exact.
ENSEMBLE = 16


class Online(CostAware):
    """Thompson sampling or UCB over MLP16's features, warm-started from its weights.

    Parameters
    ----------
    weights : str or Weights
        An npz file; the shipped weights by default.
    strength : float
        How many records of the offline data the prior is worth.
    explore : str
        ``thompson``, ``ucb`` or ``greedy``; ``thompson:0.5`` and ``ucb:2`` scale the posterior's spread. As a step
        teaches about nearly every arm, little exploration is needed: a fifth of the spread by default.
    labels : {'imputed', 'one_sided', 'played'}
        Which arms a step teaches about, see :class:`~policies.labels.ArmLabels`.
    discount : float
        Forgetting per step, 0 < rho <= 1; the prior is re-injected as the data fades.
    noise : float
        Noise variance of a rate; 0 estimates it.
    refresh : int
        Steps between updates of the posterior that decisions use.
    extra : bool
        Add the sequence's lagged acceptance to MLP16's features, with a prior of no influence.
    arms, objective, cost_half_life, seed, worker
        As in :class:`~policies.learned.CostAware`.
    """

    summary = "MLP16's features with a Bayesian head that learns from every step (Thompson sampling or UCB)"
    learns = True
    guarded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weights: str = "",
        strength: float = 200.0,
        explore: str = "thompson:0.2",
        labels: Mode = "imputed",
        discount: float = 1.0,
        noise: float = 0.0,
        refresh: int = 8,
        extra: bool = False,
        objective: Objective = "tokens_per_second",
        arms: tuple[int, ...] = ARMS,
        **options: Any,
    ) -> None:
        super().__init__(arms=arms, objective=objective, **options)
        self.explore, self.spread = _exploration(explore)
        if not 0 < strength < float("inf"):
            raise PolicyError(f"strength must be above zero, got {strength}")
        if not 0 < discount <= 1:
            raise PolicyError(f"discount must be above 0 and at most 1, got {discount}")
        if not 0 <= noise < float("inf") or refresh < 1:
            raise PolicyError(f"noise must not be negative and refresh at least 1, got {noise} and {refresh}")
        self.labels, self.every = ArmLabels(self.arms, labels), refresh
        found = resolve_weights(weights)
        self.net = Mlp16(found, self.arms, extra)
        d = HIDDEN + 1
        moments = np.eye(d) if found.phi_cov is None else found.phi_cov
        # Units that were never active offline have no precision of their own: a little of the mean keeps A0 regular.
        moments = moments + 0.01 * np.trace(moments) / d * np.eye(d)
        mean = found.head
        if extra:
            mean = np.append(mean, (0.0, 0.0))
            moments = np.block([[moments, np.zeros((d, 2))], [np.zeros((2, d)), 0.05 * np.eye(2)]])
        self.head = GaussianHead(mean, strength * moments, discount, noise)
        k = len(self.arms)
        self._column = self.gammas[:, None].copy()
        self._rates = np.empty((k, ENSEMBLE))
        self._zeros, self._ones = np.zeros((k, ENSEMBLE)), np.ones((k, ENSEMBLE))
        self._refresh()

    def _refresh(self) -> None:
        self.head.refresh()
        if self.explore == "thompson":
            self._heads = np.ascontiguousarray(self.head.sample(self.rng, ENSEMBLE, self.spread).T)
            self._picks = self.rng.integers(0, ENSEMBLE, 64).tolist()
        self.version += 1

    def begin(self, context: Context) -> None:
        self.net.begin()

    def _values(self, level: str, features: np.ndarray) -> np.ndarray:
        """Reward of every arm under each sampled head (or the one optimistic or mean head), shape (K, samples)."""
        phi = self.net.features(level, features)
        if self.explore == "thompson":
            rates = np.dot(phi, self._heads, self._rates)
            np.maximum(rates, self._zeros, rates)
            np.minimum(rates, self._ones, rates)
        else:
            mean = phi @ self.head.mean
            if self.explore == "ucb":
                mean += self.spread * np.sqrt(np.square(phi @ self.head.factor.T).sum(axis=1))
            rates = np.clip(mean, 0.0, 1.0)[:, None]
        np.multiply(rates, self._column, rates)
        if self.timed:
            np.subtract(rates, self.costs.level(level).arm_price[:, None], rates)
        return rates

    def decide(self, context: Context) -> Decision:
        features = self.net.read(context)
        legal = self.labels.count[context.max_gamma] or 1
        best = self._values(context.level, features)[:legal].argmax(axis=0)
        if self.explore == "thompson":
            if not self._picks:
                self._picks = self.rng.integers(0, ENSEMBLE, 64).tolist()
            choices = best.tolist()
            arm = choices[self._picks.pop()]
            propensity = choices.count(arm) / ENSEMBLE
        else:
            arm, propensity = int(best[0]), 1.0
        gamma = min(self.arms[arm], context.max_gamma)
        return Decision(self.new_id(), gamma, False, propensity, self.version, features)

    def pmf(self, context: Context) -> np.ndarray:
        legal = self.labels.count[context.max_gamma] or 1
        best = self._values(context.level, self.net.read(context))[:legal].argmax(axis=0)
        return np.bincount(best, minlength=len(self.arms)) / len(best)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        features = decision.features
        if features is None or not outcome.tested:
            return
        start, stop, y = self.labels(outcome, features.item(4))
        if start >= stop:
            return
        phi = self.net.features(outcome.level, features)
        self.head.add(phi[start:stop], y[start:stop])
        if self.head.pending >= self.every:
            self._refresh()

    def state_dict(self) -> State:
        return {"online.format": np.array(STATE_FORMAT)} | self.head.state() | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "online.format", ())) != STATE_FORMAT:
            raise PolicyError(
                f"the state is not of format {STATE_FORMAT} of policy online: it was saved by another version"
            )
        self.head.load(state)
        super().load_state_dict(state)
        self._refresh()

    def take_delta(self) -> State:
        return self.head.take_delta() | super().take_delta()

    def merge(self, delta: State) -> None:
        self.head.merge(delta)
        super().merge(delta)
        self._refresh()

    def sync(self, state: State) -> None:
        """Take over merged statistics, and add again what was learnt here since the last :meth:`take_delta`."""
        delta = self.take_delta()
        self.load_state_dict(state)
        self.merge(delta)
        self.head.restore_delta(delta)

    def info(self) -> dict[str, Any]:
        return super().info() | {"noise": float(self.head.noise)}


def _exploration(text: str) -> tuple[str, float]:
    """Split ``explore``'s value into its name and scale."""
    name, _, scale = text.partition(":")
    if name not in ("thompson", "ucb", "greedy"):
        raise PolicyError(f"explore must be thompson, ucb or greedy, got '{name}'")
    try:
        value = float(scale) if scale else 1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise PolicyError(f"the scale in explore={text} must be a number, zero or more")
    return name, value
