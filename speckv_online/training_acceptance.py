"""Training the acceptance weights that token-level policies start from: logistic regressions over drafted tokens.

Two heads, as :mod:`policies.hazard` defines them: ``before`` predicts the acceptance of the next token from what is
known before it is drafted, ``after`` knows its own signals too. Rows are the tested tokens of every step start (those
before the first rejection, and the rejected one), over replays of exact traces under several schedules of gamma.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.base import Context, Decision
from policies.goodput import Goodput
from policies.hazard import START, after_features, before_features, prior_means, token_features
from speckv_online.cost import RTX3090_RELEASE, CostTable
from speckv_online.errors import UserError
from speckv_online.simulate import Simulator
from speckv_online.step_table import Schedule, schedule_gammas
from speckv_online.traces import Trace

HEADS = ("before", "after")
#: Prior weight of a head's coefficients, in tokens: keeps what the data does not know near the untrained head.
RIDGE = 1.0


class _Starts(Schedule):
    """A schedule that notes how the goodput policy describes each step's start."""

    def __init__(self, gammas: Sequence[int], *, seed: int = 0) -> None:
        super().__init__(gammas, seed=seed)
        self.policy = Goodput()  # what it decides plays no part

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.policy.begin(context)
        self.starts: list[list[float]] = []

    def decide(self, context: Context) -> Decision:
        features = self.policy.decide(context).features
        assert features is not None
        self.starts.append(features[:START].tolist())
        return super().decide(context)


@dataclass(frozen=True)
class Tokens:
    """Rows to train on: features (N, 10) of each head, labels (N,) and the prompts that they come from (N,)."""

    before: np.ndarray
    after: np.ndarray
    y: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, mask: np.ndarray) -> Tokens:
        return Tokens(self.before[mask], self.after[mask], self.y[mask], self.prompt[mask])


def tokens_from_traces(traces: Iterable[Trace], seed: int = 0) -> Tokens:
    """Make one row per tested token of every step start."""
    before: list[list[float]] = []
    after: list[list[float]] = []
    y: list[bool] = []
    prompt: list[str] = []
    schedules = [_Starts(gammas, seed=seed + i) for i, gammas in enumerate(schedule_gammas().values())]
    for trace in traces:
        cost = CostTable("any", {trace.level: RTX3090_RELEASE.levels["fp16"]})  # seconds play no part here
        for schedule in schedules:
            replay = Simulator(schedule, cost).replay(trace)
            for t, start in zip(replay.position.tolist(), schedule.starts, strict=True):
                accepted = int(trace.accepted[t])
                # What the budget would have cut off is no label, and nothing follows an accepted end.
                tested = min(accepted + 1, trace.gamma, trace.budget - t - 1, len(trace) - t)
                previous = None
                for j in range(tested):
                    own = token_features(trace.signals[t, j].tolist())
                    before.append(before_features(start, previous, j))
                    after.append(after_features(start, own, previous, j))
                    y.append(j < accepted)
                    prompt.append(trace.prompt_id)
                    previous = own
    if not y:
        raise UserError("the traces hold no tested token to train on: profile with more new tokens")
    return Tokens(np.array(before), np.array(after), np.array(y, dtype=float), np.array(prompt))


def fit_logistic(
    x: np.ndarray, y: np.ndarray, prior: np.ndarray, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression by Newton's method.

    Parameters
    ----------
    x : ndarray, shape (N, D)
    y : ndarray, shape (N,)
        Labels, 0 or 1.
    prior : ndarray, shape (D,)
        Where the ridge penalty pulls the coefficients to.
    ridge : float

    Returns
    -------
    weights : ndarray, shape (D,)
    precision : ndarray, shape (D, D)
        Information of the data, sum of p (1 - p) x x^T.
    """
    weights, penalty = prior.copy(), ridge * np.eye(len(prior))

    def loss(w: np.ndarray) -> float:
        eta = x @ w
        return float(np.logaddexp(0.0, eta).sum() - y @ eta + 0.5 * ridge * np.square(w - prior).sum())

    current = loss(weights)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30.0, 30.0)))
        information = (x * (p * (1.0 - p))[:, None]).T @ x
        step = np.linalg.solve(information + penalty, x.T @ (y - p) - ridge * (weights - prior))
        # Newton can overshoot far from the optimum: halve the step until the loss falls.
        scale = 1.0
        while loss(weights + scale * step) > current and scale > 1e-6:
            scale /= 2
        weights = weights + scale * step
        previous, current = current, loss(weights)
        if previous - current <= 1e-9 * abs(previous):
            break
    p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30.0, 30.0)))
    return weights, (x * (p * (1.0 - p))[:, None]).T @ x


def train_acceptance(tokens: Tokens) -> dict[str, np.ndarray]:
    """Return the arrays of a file of acceptance weights, see :class:`policies.hazard.Hazard`."""
    arrays = {}
    for name, prior in zip(HEADS, prior_means(), strict=True):
        arrays[name], arrays[f"{name}_precision"] = fit_logistic(getattr(tokens, name), tokens.y, prior)
    return arrays


def evaluate_acceptance(arrays: dict[str, np.ndarray], tokens: Tokens) -> dict[str, Any]:
    """Return area under the ROC curve and log loss (nats) of both heads, and the loss of the mean rate alone."""
    rate = float(np.clip(tokens.y.mean(), 1e-6, 1 - 1e-6))
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "prompts": len(np.unique(tokens.prompt)),
        "accepted": rate,
        "log_loss_of_mean": float(-(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))),
    }
    for name in HEADS:
        eta = getattr(tokens, name) @ arrays[name]
        loss = float(np.mean(np.logaddexp(0.0, eta) - tokens.y * eta))
        found[name] = {"auc": auc(eta, tokens.y), "log_loss": loss}
    return found


def auc(score: np.ndarray, y: np.ndarray) -> float | None:
    """Area under the ROC curve, ties counted half; None where only one label occurs."""
    positive = int(y.sum())
    negative = len(y) - positive
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[y > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))
