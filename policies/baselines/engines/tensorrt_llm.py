"""TensorRT-LLM's gate: it stops speculating for good once too few drafted tokens are accepted.

Source: ``SpeculationGate`` (``tensorrt_llm/_torch/speculative/speculation_gate.py``) as of NVIDIA/TensorRT-LLM#12905,
merged in April 2026. That request says what changed from the older gate, which averaged accepted lengths over requests;
the file itself was read only as it was before.

Every step of the engine adds one sample to a rolling window: accepted over drafted tokens of the whole batch, without
requests that drafted nothing. Once the window is full, a mean below the threshold turns speculation off permanently.

Left open: ``acceptance_rate_window_size`` and ``acceptance_rate_threshold`` have no default, and neither has
``max_draft_len``. Here they are 100 steps, 0.2, and the 3 tokens of the documentation's examples.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.baselines.engines.engine_steps import EngineSteps
from policies.estimators.bayesian_linear import check_array


class TensorRtGate(Policy):
    """A fixed gamma until the rolling acceptance rate falls below a threshold, then 0 for ever.

    Parameters
    ----------
    gamma : int
        ``max_draft_len``.
    window : int
        ``acceptance_rate_window_size``, in steps.
    threshold : float
        ``acceptance_rate_threshold``.
    """

    summary = "TensorRT-LLM's gate: fixed gamma, off for good once the rolling acceptance rate is too low"
    learns = True
    positional: ClassVar[str] = "gamma"

    def __init__(
        self, *, gamma: int = 3, window: int = 100, threshold: float = 0.2, seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 1 <= gamma <= MAX_GAMMA:
            raise PolicyError(f"gamma must be from 1 to {MAX_GAMMA}, got {gamma}")
        if not 1 <= window <= 1_000_000 or not 0 <= threshold <= 1:
            raise PolicyError(f"need window from 1 to 1000000 and threshold from 0 to 1, got {window} and {threshold}")
        self.gamma, self.window, self.threshold = gamma, window, threshold
        self.rates: deque[float] = deque()
        self.total, self.closed = 0.0, False
        self._steps = EngineSteps()

    def decide(self, context: Context) -> Decision:
        self._step(self._steps.take())
        return Decision(self.new_id(), 0 if self.closed else min(self.gamma, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id):
            self._step(self._steps.add(decision, outcome))

    def _step(self, step: list[tuple[Decision, Outcome]]) -> None:
        drafted = sum(outcome.drafted for _, outcome in step)
        if self.closed or not drafted:
            return
        rate = sum(outcome.accepted for _, outcome in step) / drafted
        self.rates.append(rate)
        self.total += rate
        if len(self.rates) > self.window:
            self.total -= self.rates.popleft()
        if len(self.rates) == self.window:
            self.closed = self.total / self.window < self.threshold

    def state_dict(self) -> State:
        self._step(self._steps.take())
        return {"rates": np.array(self.rates), "gate": np.array([self.total, self.closed], dtype=float)}

    def load_state_dict(self, state: State) -> None:
        count = len(np.atleast_1d(state.get("rates", np.empty(0))))
        if count > self.window:
            raise PolicyError(f"the state's window holds {count} steps: load it with the window it was saved with")
        rates = check_array(state, "rates", (count,))
        total, closed = check_array(state, "gate", (2,)).tolist()
        self.rates, self.total, self.closed = deque(rates.tolist()), total, bool(closed)
        self._steps.take()

    def info(self) -> dict[str, Any]:
        return {"closed": self.closed}
