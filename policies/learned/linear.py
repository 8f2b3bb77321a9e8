"""LinUCB (Li et al., 2010) and linear Thompson sampling (Agrawal & Goyal, 2013) on lagged features of the context.

Every step labels all arms (see :mod:`policies.estimators.arm_labels`), so the arms share one precision matrix: the
posterior is a multi-output ridge regression of an arm's accepted tokens, with exponential forgetting and sums that add
up over workers. MLP16 warm-starts it: the regression is on what MLP16's prediction leaves over.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from policies.acceptance.mlp16 import DEFAULT_WEIGHTS, Mlp16, Weights, resolve_weights
from policies.base import Context, Decision, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware
from policies.estimators.arm_labels import ArmLabels
from policies.estimators.bayesian_linear import check_array, check_start, fingerprint
from policies.level_features import N_LEVEL

#: A constant, lagged acceptance and signals, and the description of the level.
SIGNALS = 8
DIM = SIGNALS + N_LEVEL
SAMPLES = 64


class _Linear(CostAware):
    """Shared part of both policies.

    Parameters
    ----------
    alpha : float
        Scale of the standard deviations: how much is explored.
    weights : str or Weights
        MLP16 weights to start from; ``none`` starts cold, empty takes the shipped ones if there are any.
    ridge : float
        Prior precision, in steps.
    discount : float
        Forgetting per step, 0 < rho <= 1.
    refresh : int
        Steps between updates of the posterior that decisions use.
    levels : {'described', 'code'}
        ``described`` adds bits per weight, the cost of a drafted token relative to the target's and the growth of
        verify time with width to the features, so that what is learnt carries over to a level never met before;
        with ``code``, MLP16's 0, 1, 2 is all that tells levels apart.
    """

    learns = True
    guarded: ClassVar[bool] = True
    positional: ClassVar[str] = "alpha"
    delta_key: ClassVar[str] = "linear.sums"

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        weights: str = "",
        ridge: float = 20.0,
        discount: float = 0.999,
        refresh: int = 8,
        levels: Literal["described", "code"] = "described",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if levels not in ("described", "code"):
            raise PolicyError(f"levels must be described or code, got '{levels}'")
        self.described = levels == "described"
        if not 0 <= alpha < float("inf") or not 1e-6 <= ridge < float("inf") or not 0 < discount <= 1 or refresh < 1:
            got = f"{alpha}, {ridge}, {discount}, {refresh}"
            raise PolicyError(f"need alpha >= 0, ridge >= 1e-6, 0 < discount <= 1 and refresh >= 1, got {got}")
        self.alpha, self.discount, self.every = alpha, discount, refresh
        known = load_start(weights)
        self.net = None if known is None else Mlp16(known, self.arms)
        self.labels = ArmLabels(self.arms)
        k = len(self.arms)
        # Sums are by arm, and of what MLP16's prediction leaves over.
        self._start = fingerprint(self.gammas, *(() if known is None else (known.W1, known.b1, known.W2, known.b2)))
        self._none, self._prior = np.zeros(k), ridge * np.eye(DIM)
        self._fading: dict[int, np.ndarray] = {}  # by number of steps, the root of what each of them weighs
        # Columns: A, then one right-hand side per arm. Misc: steps, then squared residuals per arm.
        self._total, self._misc = np.zeros((DIM, DIM + k)), np.zeros(1 + k)
        self._delta = np.zeros((DIM, DIM + k)), np.zeros(1 + k), 0
        self._waiting: list[np.ndarray] = []
        self._solve()

    def features(self, context: Context) -> np.ndarray:
        """x (DIM,) and the tokens that MLP16 expects of every arm (K,), in one array."""
        c = context
        ratio = c.last_accepted / c.last_drafted if c.last_drafted else 0.5
        whole = 1.0 if 0 < c.last_drafted == c.last_accepted else 0.0
        described = self.costs.describe(c.level) if self.described else (0.0,) * N_LEVEL
        found = np.empty(DIM + len(self.arms))
        found[:DIM] = (
            1.0, 2 * c.acceptance - 1, ratio, whole, c.mean_confidence, c.min_confidence, c.mean_entropy / 4,
            c.max_entropy / 8, *described,
        )  # fmt: skip
        found[DIM:] = 0.0 if self.net is None else self.net.tokens(c.level, self.net.read(c))
        return found

    def _fold(self) -> None:
        steps = len(self._waiting)
        if not steps:
            return
        rows = np.array(self._waiting)
        self._waiting.clear()
        fading = self._fading.get(steps)
        if fading is None:
            fading = self._fading[steps] = np.sqrt(self.discount ** np.arange(steps - 1, -1, -1))[:, None]
        rows *= fading
        block = rows[:, :DIM].T @ rows
        squares = np.square(rows).sum(axis=0)
        misc = np.concatenate((squares[:1], squares[DIM:]))  # the constant feature is 1
        self._add(block, misc, steps)
        total, others, count = self._delta
        keep = self.discount**steps
        self._delta = total * keep + block, others * keep + misc, count + steps

    def _add(self, block: np.ndarray, misc: np.ndarray, steps: int) -> None:
        keep = self.discount**steps
        self._total = self._total * keep + block
        self._misc = self._misc * keep + misc

    def _solve(self) -> None:
        self._fold()
        A, B = self._total[:, :DIM], self._total[:, DIM:]
        precision = A + self._prior
        # Of the precision, as rounding leaves an inverse by a small ridge without any.
        self._root = np.linalg.inv(np.linalg.cholesky(precision)).T
        self.W = self._root @ (self._root.T @ B)  # (DIM, K)
        fitted = np.maximum(self._misc[1:] - (self.W * B).sum(axis=0), 0.0)
        # One accepted token of spread per arm, worth ten steps, until there is data.
        self.spread = np.sqrt((fitted + 10.0) / (self._misc[0] + 10.0)) * (self.gammas > 0)
        self.version += 1

    def _lines(self, features: np.ndarray, level: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean value of every arm in tokens, and its standard deviation."""
        x = features[:DIM]
        mean = np.dot(x, self.W)
        mean += features[DIM:]
        np.maximum(mean, self._none, out=mean)
        np.minimum(mean, self.gammas, out=mean)
        if self.timed:
            mean -= self.costs.level(level).arm_price
        root = np.dot(x, self._root)
        return mean, self.spread * (float(np.dot(root, root)) ** 0.5 * self.alpha)

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        start, stop, y = self.labels(outcome, 0.5 * (decision.features.item(1) + 1.0))
        if stop < len(self.arms):  # an end of sequence: the larger arms have no label
            return
        row = decision.features.copy()
        row[DIM + start :] = y[start:] * self.gammas[start:] - row[DIM + start :]
        row[DIM : DIM + start] = 0.0
        self._waiting.append(row)
        if len(self._waiting) >= self.every:
            self._solve()

    def forget(self) -> None:
        self._waiting.clear()
        self._total, self._misc = np.zeros_like(self._total), np.zeros_like(self._misc)
        self._delta = np.zeros_like(self._total), np.zeros_like(self._misc), 0
        self._solve()

    def state_dict(self) -> State:
        self._fold()
        own = {"linear.sums": self._total.copy(), "linear.misc": self._misc.copy(), "linear.start": self._start}
        return super().state_dict() | own

    def load_state_dict(self, state: State) -> None:
        total = check_array(state, "linear.sums", self._total.shape)
        misc = check_array(state, "linear.misc", self._misc.shape)
        check_start(state, "linear.start", self._start)
        self._waiting.clear()
        self._total, self._misc = total.copy(), misc.copy()
        self._delta = np.zeros_like(total), np.zeros_like(misc), 0
        super().load_state_dict(state)
        self._solve()

    def take_delta(self) -> State:
        self._fold()
        total, misc, count = self._delta
        self._delta = np.zeros_like(total), np.zeros_like(misc), 0
        own = {"linear.sums": total, "linear.misc": misc, "linear.count": np.array(float(count))}
        return own | {"linear.start": self._start} | super().take_delta()

    def merge(self, delta: State) -> None:
        if "linear.sums" in delta:
            check_start(delta, "linear.start", self._start)
            self._fold()
            total = check_array(delta, "linear.sums", self._total.shape)
            misc = check_array(delta, "linear.misc", self._misc.shape)
            self._add(total, misc, int(check_array(delta, "linear.count", ())))
            self._solve()
        super().merge(delta)


class LinUcb(_Linear):
    """The arm with the largest mean + alpha * standard deviation of its value."""

    summary = "LinUCB on lagged features, all arms labelled by every step (linucb:alpha)"

    def decide(self, context: Context) -> Decision:
        features = self.features(context)
        mean, deviation = self._lines(features, context.level)
        legal = self.legal(context)
        arm = int((mean + deviation)[:legal].argmax())
        gamma = min(self.arms[arm], context.max_gamma)
        return Decision(self.new_id(), gamma, False, 1.0, self.version, features)


class LinTs(_Linear):
    """Thompson sampling: the best arm under one draw, common to all arms, of how far they lie from their means.

    The draw is one of 64 equally likely normal quantiles, so the probability of each arm is exact.
    """

    summary = "linear Thompson sampling on lagged features, all arms labelled by every step (lints:alpha)"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from statistics import NormalDist

        self._z = np.array([NormalDist().inv_cdf((i + 0.5) / SAMPLES) for i in range(SAMPLES)])[:, None]
        self._picks: list[int] = []

    def _best(self, context: Context, features: np.ndarray) -> np.ndarray:
        """Best arm for each quantile, shape (SAMPLES,)."""
        mean, deviation = self._lines(features, context.level)
        legal = self.legal(context)
        values = self._z * deviation
        values += mean
        if legal < len(self.arms):
            values = values[:, :legal]
        best: np.ndarray = values.argmax(axis=1)
        return best

    def decide(self, context: Context) -> Decision:
        features = self.features(context)
        choices = self._best(context, features).tolist()
        if not self._picks:  # a draw at a time would take longer than all the rest
            self._picks = self.rng.integers(0, SAMPLES, 64).tolist()
        arm = choices[self._picks.pop()]
        gamma = min(self.arms[arm], context.max_gamma)
        return Decision(self.new_id(), gamma, False, choices.count(arm) / SAMPLES, self.version, features)

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._picks.clear()  # a state says nothing of chance

    def pmf(self, context: Context) -> np.ndarray:
        """Probability of each of ``arms``."""
        return np.bincount(self._best(context, self.features(context)), minlength=len(self.arms)) / SAMPLES


def load_start(weights: str | Weights) -> Weights | None:
    """Return MLP16 weights to start from; None for ``none``, or where nothing is named and nothing ships."""
    if isinstance(weights, str) and (weights == "none" or (not weights and not DEFAULT_WEIGHTS.is_file())):
        return None
    return resolve_weights(weights)
