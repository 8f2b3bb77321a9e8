"""Adaptive verification after vLLM, for one request: draft a fixed number of tokens, submit as many as pay.

Token k is accepted with probability p_k = sigmoid(w x_k + b_k), x the draft's margin (top-2 logit difference, clipped
at 40), w >= 0 shared and b_k per position. Every 100 steps one damped Newton step on the steps since, ridge 1e-3,
scaled by n / (n + 50) for n tested tokens. The first three intervals submit everything. Later
k = argmax (1 + sum_{j <= k} prod_{i <= j} p_i) / T(k), with the drafting already paid for in T.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import MARGIN, MAX_GAMMA, Context, Decision, Draft, Outcome, PolicyError, State
from policies.costs.cost_aware import CostAware
from policies.estimators.bayesian_linear import check_array

INTERVAL, UNPRUNED, RIDGE, CLIP = 100, 3, 1e-3, 40.0


class VllmAdaptive(CostAware):
    """Prune the verification of a fixed-length draft by learned acceptance.

    Parameters
    ----------
    gamma : int
        Tokens to draft in each step.
    """

    summary = "vLLM's adaptive verification: drafts gamma tokens, submits those that learned acceptance says pay"
    learns = True
    shares: ClassVar[bool] = False  # a Newton step per interval of one sequence of steps
    positional: ClassVar[str] = "gamma"

    def __init__(self, *, gamma: int = 4, **options: Any) -> None:
        super().__init__(**options)
        if not 1 <= gamma <= MAX_GAMMA:
            raise PolicyError(f"gamma must be from 1 to {MAX_GAMMA}, got {gamma}")
        self.gamma = gamma
        self.weights = np.zeros(gamma + 1)  # w, then b_1, b_2, ...
        self.steps = self.refits = 0
        self._rows: list[tuple[int, float, float]] = []  # position, margin, label

    def probabilities(self, margins: np.ndarray) -> np.ndarray:
        """p_k of drafted tokens with these margins."""
        x = np.clip(margins, 0.0, CLIP)
        found: np.ndarray = 1.0 / (1.0 + np.exp(-np.clip(self.weights[0] * x + self.weights[1 : len(x) + 1], -30, 30)))
        return found

    def decide(self, context: Context) -> Decision:
        decision = Decision(self.new_id(), min(self.gamma, context.max_gamma), stops=self.refits >= UNPRUNED)
        if decision.stops:
            costs = self.costs.level(context.level)
            decision.features = costs.verify + costs.overhead + costs.first, costs.draft
        return decision

    def submit(self, decision: Decision, draft: Draft) -> int:
        if decision.features is None:
            return draft.drafted
        survival = np.cumprod(self.probabilities(draft.signals[:, MARGIN]))
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(survival)))
        (seconds, each), drafted = decision.features, draft.drafted
        return int((tokens / (seconds[: drafted + 1] + each * drafted)).argmax())

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        for j, margin in enumerate(outcome.signals[: outcome.tested, MARGIN].tolist()):
            if j < self.gamma:
                self._rows.append((j, min(max(margin, 0.0), CLIP), float(j < outcome.accepted)))
        self.steps += 1
        if self.steps % INTERVAL == 0:
            self._newton()

    def _newton(self) -> None:
        """One damped Newton step of the ridge-penalised log-likelihood on the latest interval."""
        self.refits += 1
        if not self._rows:
            return
        j, x, y = (np.array(column) for column in zip(*self._rows, strict=True))
        self._rows.clear()
        phi = np.zeros((len(y), self.gamma + 1))
        phi[:, 0] = x
        phi[np.arange(len(y)), j + 1] = 1.0
        p = 1.0 / (1.0 + np.exp(-np.clip(phi @ self.weights, -30, 30)))
        hessian = (phi * (p * (1 - p))[:, None]).T @ phi + RIDGE * np.eye(len(self.weights))
        gradient = phi.T @ (y - p) - RIDGE * self.weights
        self.weights = self.weights + len(y) / (len(y) + 50.0) * np.linalg.solve(hessian, gradient)
        self.weights[0] = max(self.weights[0], 0.0)

    def state_dict(self) -> State:
        rows = np.array(self._rows).reshape(-1, 3)
        counts = np.array([self.steps, self.refits], dtype=float)
        return super().state_dict() | {"weights": self.weights.copy(), "counts": counts, "rows": rows}

    def load_state_dict(self, state: State) -> None:
        self.weights = check_array(state, "weights", self.weights.shape).copy()
        self.steps, self.refits = (int(v) for v in check_array(state, "counts", (2,)))
        rows = np.asarray(state.get("rows", np.empty((0, 3))))
        self._rows = [(int(j), x, y) for j, x, y in check_array({"rows": rows}, "rows", (len(rows), 3)).tolist()]
        super().load_state_dict(state)
