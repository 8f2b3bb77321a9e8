"""Adaptive verification of vLLM 0.32.0 for one request: draft a fixed number of tokens, submit as many as pay.

Source: ``v1/worker/gpu/spec_decode/acceptance_estimator.py`` and ``adaptive_verification.py``.

Token k is accepted with probability p_k = sigmoid(w x + b_k). x is the log-odds of the draft's top token, m -
logsumexp(the others), clipped to +-40. The slope w starts at 0.5, every bias at -0.2, and pruning starts at once. Every
100 steps the graded drafts since then give one Newton step on all parameters, with a ridge of 1e-3. The slope's step is
damped by n / (n + 50) for all n graded tokens; where it would make the slope negative it is dropped. Each bias is then
solved for with the damped slope, and damped by its own n_k / (n_k + 50).

The budget of a step is argmax over k of (1 + sum_{j <= k} prod_{i <= j} p_i) / (draft + verify(1 + k)). Its p_i are
those of the step before, because vLLM copies them to the CPU while it works; they are 1 in the first step of a request.
The fresh ones only rank the drafts of several requests, so for one request the first tokens of the draft are kept.

Left open, or different here: log-odds come of the draft's confidence c as log(c / (1 - c)). Seconds are those of the
online cost model, made monotone as there; vLLM profiles them once, when it starts, and pads to captured sizes. In a
batch every sequence has a budget of its own, where vLLM shares one out. vLLM also counts prefills as steps.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from policies.base import CONFIDENCE, MAX_GAMMA, Context, Decision, Draft, Outcome, PolicyError, State
from policies.baselines.engines.engine_steps import EngineSteps
from policies.costs.cost_aware import CostAware
from policies.estimators.bayesian_linear import check_array

SLOPE, BIAS = 0.5, -0.2
INTERVAL, DAMPING, RIDGE, CLIP = 100, 50.0, 1e-3, 40.0
#: Where a sequence keeps the probabilities of its latest draft.
STALE = "vllm.stale"


def log_odds(confidence: np.ndarray) -> np.ndarray:
    """Return log(c / (1 - c)), clipped to +-40; what is no number counts as no confidence."""
    c = np.clip(np.nan_to_num(np.asarray(confidence, dtype=float), nan=0.0), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        odds: np.ndarray = np.clip(np.log(c) - np.log1p(-c), -CLIP, CLIP)
    return odds


class VllmAdaptive(CostAware):
    """Prune the verification of a fixed-length draft by learned acceptance.

    Parameters
    ----------
    gamma : int
        Tokens to draft in each step, vLLM's ``num_speculative_tokens``.
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
        self.weights = np.array([SLOPE] + [BIAS] * gamma)  # w, then b_1, b_2, ...; replaced by a refit, never changed
        self.steps = 0  # since the latest refit
        self._steps = EngineSteps()
        self._clear()

    def _clear(self) -> None:
        # By position, in columns: X'WX as a, b, c; X'(y - p) for the slope and for the bias; graded tokens.
        self._sums = np.zeros((self.gamma, 6))

    def probabilities(self, confidence: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """p_k of drafted tokens with these confidences, now or under other weights."""
        w, x = self.weights if weights is None else weights, log_odds(confidence)
        eta: np.ndarray = np.clip(w[0] * x + w[1 : len(x) + 1], -700.0, 700.0)  # beyond is an overflow
        found: np.ndarray = 1.0 / (1.0 + np.exp(-eta))
        return found

    def decide(self, context: Context) -> Decision:
        self._step(self._steps.take())
        costs = self.costs.level(context.level)
        seconds = np.maximum.accumulate(costs.verify)
        features = context.memory, self.weights, seconds, costs.first, costs.draft
        return Decision(self.new_id(), min(self.gamma, context.max_gamma), features=features, ask_per_token=True)

    def submit(self, decision: Decision, draft: Draft) -> int:
        memory, weights, verify, first, each = decision.features
        drafted = min(draft.drafted, self.gamma)
        stale = memory.get(STALE)
        if stale is None:
            stale = np.ones(self.gamma)
        survival = np.cumprod(stale[:drafted])
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(survival)))
        budget = int((tokens / (first + each * drafted + verify[: drafted + 1])).argmax())
        fresh = stale.copy()
        fresh[:drafted] = self.probabilities(draft.signals[:drafted, CONFIDENCE], weights)
        memory[STALE] = fresh
        return budget

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        self.costs.observe(outcome)
        self._step(self._steps.add(decision, outcome))

    def _step(self, step: list[tuple[Decision, Outcome]]) -> None:
        """Take in what one step of the engine graded, by the predictions made when it was drafted."""
        for decision, outcome in step:
            graded = min(outcome.labelled, self.gamma)
            confidence = outcome.signals[:graded, CONFIDENCE]
            x, p = log_odds(confidence), self.probabilities(confidence, decision.features and decision.features[1])
            weight = p * (1.0 - p)
            residual = (np.arange(graded) < outcome.accepted) - p
            rows = (weight * x * x, weight * x, weight, residual * x, residual, np.ones(graded))
            self._sums[:graded] += np.column_stack(rows)
        self.steps += bool(step)
        if self.steps >= INTERVAL:
            self.steps = 0
            self._refit()

    def _refit(self) -> None:
        """One damped Newton step: the system is an arrow of the slope and the biases."""
        a, b, c, slope, bias, n = self._sums.T
        c = c + RIDGE
        change = (slope.sum() - (b * bias / c).sum()) / (a.sum() + RIDGE - (b * b / c).sum())
        change *= n.sum() / (n.sum() + DAMPING)
        if not (math.isfinite(change) and self.weights[0] + change >= 0.0):
            change = 0.0
        biases = (bias - b * change) / c * n / (n + DAMPING)
        self.weights = self.weights + np.append(change, biases)
        self._clear()

    def state_dict(self) -> State:
        self._step(self._steps.take())
        own = {"weights": self.weights.copy(), "steps": np.array(float(self.steps)), "sums": self._sums.copy()}
        return super().state_dict() | own

    def load_state_dict(self, state: State) -> None:
        weights = check_array(state, "weights", self.weights.shape).copy()
        sums = check_array(state, "sums", self._sums.shape).copy()
        steps = int(check_array(state, "steps", ()))
        super().load_state_dict(state)
        self.weights, self._sums, self.steps = weights, sums, steps
        self._steps.take()
