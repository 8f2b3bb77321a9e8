"""MLP16 that goes on learning: its hidden layer as features, its output layer as the prior of a Bayesian head.

The head keeps predicting MLP16's quantity, every arm's acceptance rate accepted / gamma. Thompson sampling (or UCB)
over its Gaussian posterior picks the arm with the best reward, rate * gamma + 1 - lambda * T(gamma), in tokens.

A step teaches about more arms than the one played, see :mod:`policies.estimators.arm_labels`.

The prior is that of MLP16's own draft and data. It is wide in the directions in which heads fitted to other drafts
differ, where the weights tell them. So a few steps with a better or worse draft move the head as a whole.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from policies.base import Context, Decision, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware
from policies.estimators.arm_labels import ArmLabels, Mode
from policies.estimators.bayesian_linear import PRIOR_NOISE, GaussianHead, check_array, check_start, fingerprint, widen
from policies.learned.mlp16 import HIDDEN, Mlp16, resolve_weights
from policies.level_features import N_LEVEL

STATE_FORMAT = 2
#: Posterior samples per refresh; a Thompson decision picks one of them, so its propensity is exact.
ENSEMBLE = 16
#: How likely a draft is to be like the others that heads were fitted to, rather than like MLP16's own.
OTHER = 0.5
#: Steps until the first update of the posterior.
FIRST = 4


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
        Which arms a step teaches about, see :class:`~policies.estimators.arm_labels.ArmLabels`.
    discount : float
        Forgetting per step, 0 < rho <= 1; the prior is re-injected as the data fades.
    noise : float
        Noise variance of a rate; 0 estimates it.
    refresh : int
        Steps between updates of the posterior that decisions use; the first updates come sooner.
    levels : {'described', 'code'}
        ``described`` adds bits per weight, the cost of a drafted token relative to the target's and the growth of
        verify time with width to the head's inputs, with weights that start at zero; with ``code``, MLP16's 0, 1, 2 is
        all that tells levels apart.
    arms, objective, cost_half_life, adwin, seed, worker
        As in :class:`~policies.costs.cost_aware.CostAware`.
    """

    summary = "MLP16's features with a Bayesian head that learns from every step (Thompson sampling or UCB)"
    learns = True
    guarded: ClassVar[bool] = True
    delta_key: ClassVar[str] = "head.sums"

    def __init__(
        self,
        *,
        weights: str = "",
        strength: float = 200.0,
        explore: str = "thompson:0.2",
        labels: Mode = "imputed",
        discount: float = 1.0,
        noise: float = 0.0,
        refresh: int = 16,
        levels: Literal["described", "code"] = "described",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.explore, self.spread = _exploration(explore)
        if not 0 < strength < float("inf"):
            raise PolicyError(f"strength must be above zero, got {strength}")
        if not 0 < discount <= 1:
            raise PolicyError(f"discount must be above 0 and at most 1, got {discount}")
        if not 0 <= noise < float("inf") or not 1 <= refresh <= 64:
            raise PolicyError(f"noise must not be negative and refresh from 1 to 64, got {noise} and {refresh}")
        if levels not in ("described", "code"):
            raise PolicyError(f"levels must be described or code, got '{levels}'")
        self.labels, self.every = ArmLabels(self.arms, labels), refresh
        found = resolve_weights(weights)
        extra = N_LEVEL if levels == "described" else 0
        self.net = Mlp16(found, self.arms, extra)
        d, prior_noise = HIDDEN + 1, found.noise_var or PRIOR_NOISE
        # The offline data does not say how the rest of a level's description bears on acceptance: weights near zero.
        precision = strength * np.eye(d + extra)
        precision[:d, :d] = strength * found.moments
        if found.head_shift is not None:
            # Another draft moves the whole head at once: empirical Bayes over the drafts that heads were fitted to.
            # The covariance added is the mean square of the shifts, where the own draft's is zero.
            shift = np.pad(found.head_shift, ((0, 0), (0, extra)))
            precision = widen(precision, (OTHER / len(shift) / prior_noise) ** 0.5 * shift)
        mean = np.append(found.head, np.zeros(extra))
        self.head = GaussianHead(mean, precision, discount, noise, prior_noise)
        self._start = fingerprint(found.W1, found.b1, mean)
        self._waiting: list[tuple[str, np.ndarray, int, int, np.ndarray]] = []
        self._most = np.tile(self.gammas, (ENSEMBLE if self.explore == "thompson" else 1, 1))
        self._prices: dict[str, tuple[int, np.ndarray]] = {}
        self._refresh()

    def features(self, context: Context) -> np.ndarray:
        """What :class:`~policies.learned.mlp16.Mlp16` reads of a context, and the description of its level, shape (6 +
        E,)."""
        return self.net.read(context, self.costs.describe(context.level) if self.net.extra else ())

    def _refresh(self) -> None:
        """Learn from the steps that wait, and draw the heads of the next decisions."""
        self._fold()
        self.head.refresh()
        self._draw()

    def _draw(self) -> None:
        # The first steps tell most: what is new to the prior shows in them.
        self._due = min(self.every, FIRST + int(self.head.steps))
        if self.explore == "thompson":
            self._heads = self.head.sample(self.rng, ENSEMBLE, self.spread)
            self._picks = self.rng.integers(0, ENSEMBLE, 64).tolist()
        else:
            self._heads = self.head.mean[None]
        self.version += 1

    def _fold(self) -> None:
        if not self._waiting:
            return
        levels, xs, starts, ask_per_token, ys = zip(*self._waiting, strict=True)
        self._waiting.clear()
        arm = np.arange(len(self.arms))
        taught = (arm >= np.array(starts)[:, None]) & (arm < np.array(ask_per_token)[:, None])
        phi = self.net.phi(levels, np.array(xs))[taught]
        self.head.add(phi, np.array(ys)[taught], taught.sum(axis=1).tolist())

    def _values(self, level: str, x: np.ndarray) -> np.ndarray:
        """Reward of every arm under each sampled head, or the one optimistic or mean head, shape (samples, K)."""
        grid = self.net.scaled(level, x)
        tokens: np.ndarray = np.dot(self._heads, grid)
        if self.explore == "ucb":
            tokens += self.spread * np.sqrt(np.square(self.head.factor @ grid).sum(axis=0))
        # No arm accepts more than all; below zero need not be cut off, as gamma 0 is better than such an arm anyway.
        np.minimum(tokens, self._most, out=tokens)
        if self.timed:
            np.subtract(tokens, self._price(level), tokens)
        return tokens

    def _price(self, level: str) -> np.ndarray:
        """Price of every arm, repeated for each sampled head: numpy is slower with arrays of unequal shapes."""
        costs = self.costs.level(level)
        version, price = self._prices.get(level, (-1, self._most))
        if version != costs.version:
            price = np.tile(costs.arm_price, (len(self._most), 1))
            self._prices[level] = costs.version, price
        return price

    def decide(self, context: Context) -> Decision:
        features = self.features(context)
        legal = self.legal(context)
        best = self._values(context.level, features)[:, :legal].argmax(axis=1)
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
        legal = self.legal(context)
        best = self._values(context.level, self.features(context))[:, :legal].argmax(axis=1)
        return np.bincount(best, minlength=len(self.arms)) / len(best)

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        features = decision.features
        start, stop, y = self.labels(outcome, features.item(4))
        if start < stop:
            self._waiting.append((outcome.level, features, start, stop, y))
            if len(self._waiting) >= self._due:
                self._refresh()

    def forget(self) -> None:
        self._waiting.clear()
        self.head.forget()
        self._refresh()

    def state_dict(self) -> State:
        self._fold()
        own = {"online.format": np.array(STATE_FORMAT), "online.start": self._start}
        return own | self.head.state() | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "online.format", ())) != STATE_FORMAT:
            raise PolicyError(
                f"the state is not of format {STATE_FORMAT} of policy online: it was saved by another version"
            )
        check_start(state, "online.start", self._start)
        self._waiting.clear()
        self.head.load(state)
        super().load_state_dict(state)
        self._prices.clear()  # versions of costs begin anew
        self._draw()

    def take_delta(self) -> State:
        self._fold()
        return {"online.start": self._start} | self.head.take_delta() | super().take_delta()

    def merge(self, delta: State) -> None:
        check_start(delta, "online.start", self._start)
        self._fold()
        self.head.merge(delta)
        super().merge(delta)
        self._draw()

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
