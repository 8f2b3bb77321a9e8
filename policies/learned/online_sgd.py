"""`online-sgd`: MLP16 with all of its weights trained on, by Adam on the squared error of every step's labels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware
from policies.estimators.arm_labels import ArmLabels
from policies.estimators.bayesian_linear import check_array
from policies.learned.mlp16 import HIDDEN, INPUTS, Mlp16, level_code, resolve_weights
from policies.level_features import N_LEVEL

#: MLP16's inputs, and behind them the rest of a level's description, with weights that start at zero.
_INPUTS = INPUTS + N_LEVEL
#: Where W1, b1, W2, b2 lie in the flat parameter vector.
_SIZES = (_INPUTS * HIDDEN, HIDDEN, HIDDEN, 1)
#: What Adam keeps of a gradient's running mean and of its square's, and what it takes of the new ones.
_KEPT = np.array([[0.9], [0.999]])
_NEW = 1.0 - _KEPT
_ONES = np.ones(MAX_GAMMA + 1)


class OnlineSgd(CostAware):
    """Greedy in MLP16's prediction but for a share epsilon of uniformly random arms; every step is a training step.

    Parameters
    ----------
    weights : str or Weights
        Pretrained weights; the shipped ones by default.
    rate : float
        Adam's step size.
    epsilon : float
        Share of random arms; it falls as 1 / sqrt(1 + steps / 200).
    """

    summary = "MLP16 with all weights trained online by Adam, epsilon-greedy"
    learns = True
    shares: ClassVar[bool] = False  # gradient steps do not add up
    guarded: ClassVar[bool] = True
    positional: ClassVar[str] = "rate"

    def __init__(self, *, weights: str = "", rate: float = 0.001, epsilon: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < rate < 1 or not 0 <= epsilon <= 1:
            raise PolicyError(f"rate must be between 0 and 1 and epsilon from 0 to 1, got {rate} and {epsilon}")
        self.rate, self.epsilon, self.steps = rate, epsilon, 0
        # Reads contexts, with their fading while nothing is drafted; its weights are what training starts from.
        self._reader = Mlp16(resolve_weights(weights), self.arms)
        self._flat = self._start()
        # The gradient and its square; running means of both.
        self._gradients, self._moments = np.zeros((2, len(self._flat))), np.zeros((2, len(self._flat)))
        self._W1, self._b1, self._W2, self._b2 = _views(self._flat)
        self._views = _views(self._gradients[0])
        self.labels = ArmLabels(self.arms)
        self._inputs, self._zeros = np.zeros((len(self.arms), _INPUTS)), np.zeros((len(self.arms), HIDDEN))
        # Features, version of the weights, and what _forward found.
        self._latest: tuple[Any, int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # copies of views are no views
        self._W1, self._b1, self._W2, self._b2 = _views(self._flat)
        self._views = _views(self._gradients[0])

    def _start(self) -> np.ndarray:
        w = self._reader.weights
        return np.concatenate([w.W1.ravel(), np.zeros(N_LEVEL * HIDDEN), w.b1, w.W2.ravel(), w.b2])

    def _read(self, context: Context) -> np.ndarray:
        """Inputs without the arm, and behind them the acceptance, shape (10,)."""
        level = context.level
        found = self._reader.read(context, (*self.costs.describe(level), 0.0))
        found[_INPUTS], found[4] = found.item(4), level_code(level)
        return found

    def _forward(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return inputs (K, 9), hidden units (K, 16) and rates (K,), not clipped: the latest ones where asked again."""
        latest = self._latest
        if latest is not None and latest[0] is features and latest[1] == self.version:
            return latest[2]
        x = self._inputs
        x[:] = features[:_INPUTS]
        x[:, 5] = self.gammas
        hidden = np.dot(x, self._W1)
        hidden += self._b1
        np.maximum(hidden, self._zeros, out=hidden)
        rates = np.dot(hidden, self._W2)
        rates += self._b2
        found = x, hidden, rates
        self._latest = features, self.version, found
        return found

    def _greedy(self, level: str, features: np.ndarray, legal: int) -> int:
        value = self._forward(features)[2] * self.gammas
        np.minimum(np.maximum(value, self._zeros[:, 0], out=value), self.gammas, out=value)
        if self.timed:
            value -= self.costs.level(level).arm_price
        return int(value[:legal].argmax())

    @property
    def _share(self) -> float:
        share: float = self.epsilon / (1.0 + self.steps / 200.0) ** 0.5
        return share

    def decide(self, context: Context) -> Decision:
        features = self._read(context)
        legal = self.legal(context)
        best = arm = self._greedy(context.level, features, legal)
        share = self._share
        if self.rng.random() < share:
            arm = int(self.rng.integers(legal))
        propensity = share / legal + (1.0 - share) * (arm == best)
        gamma = min(self.arms[arm], context.max_gamma)
        return Decision(self.new_id(), gamma, False, propensity, self.version, features)

    def pmf(self, context: Context) -> np.ndarray:
        """Probability of each of ``arms``."""
        legal = self.legal(context)
        p = np.zeros(len(self.arms))
        p[:legal] = self._share / legal
        p[self._greedy(context.level, self._read(context), legal)] += 1.0 - self._share
        return p

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        start, stop, y = self.labels(outcome, decision.features.item(_INPUTS))
        if start < stop:
            self._train(decision.features, start, stop, y)

    def _train(self, features: np.ndarray, start: int, stop: int, y: np.ndarray) -> None:
        """One Adam step (Kingma & Ba, 2015) on the mean squared error of the labelled arms."""
        x, hidden, error = self._forward(features)
        error = error - y
        error[:start] = error[stop:] = 0.0
        error *= 1.0 / (stop - start)
        back = error[:, None] * self._W2
        back *= np.sign(hidden)  # of units that are not negative
        W1, b1, W2, b2 = self._views
        np.dot(x.T, back, W1)
        np.dot(_ONES[: len(back)], back, b1)
        np.dot(error, hidden, W2)
        b2[0] = sum(error.tolist())
        self.steps += 1
        self.version += 1
        gradients, moments = self._gradients, self._moments
        np.square(gradients[0], gradients[1])
        moments *= _KEPT
        gradients *= _NEW
        moments += gradients
        size = self.rate * (1.0 - 0.999**self.steps) ** 0.5 / (1.0 - 0.9**self.steps)
        change = np.sqrt(moments[1])
        change += 1e-8
        np.divide(moments[0], change, change)
        change *= size
        self._flat -= change

    def forget(self) -> None:
        self._flat[:] = self._start()
        self._moments[:], self.steps = 0.0, 0
        self.version += 1

    def state_dict(self) -> State:
        arrays = np.stack([self._flat, *self._moments])
        return super().state_dict() | {"sgd": arrays, "sgd.steps": np.array(self.steps)}

    def load_state_dict(self, state: State) -> None:
        arrays = check_array(state, "sgd", (3, len(self._flat)))
        self.steps = int(check_array(state, "sgd.steps", ()))
        self._flat[:], self._moments[:] = arrays[0], arrays[1:]
        super().load_state_dict(state)
        self.version += 1


def _views(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W1 (9, 16), b1 (16,), W2 (16,), b2 (1,) as views of one vector."""
    parts = np.split(flat, np.cumsum(_SIZES)[:-1])
    return parts[0].reshape(_INPUTS, HIDDEN), parts[1], parts[2], parts[3]
