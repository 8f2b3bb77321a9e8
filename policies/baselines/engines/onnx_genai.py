"""ONNX Runtime GenAI's adaptive K, and its cooldown (0.16.0-dev, August 2026).

Source: ``AdaptiveKController`` and ``SpeculativeCooldownController`` in ``src/speculative_decoding_strategy.h``.

For every K there are exponentially weighted means (a new round counts a quarter) of tokens, time and acceptance, the
latter accepted over evaluated tokens; tokens over time is the throughput. A K that was seen twice and whose acceptance
is below 0.5 makes K - 1 be probed, one of 0.75 or more, twice since the latest probe, K + 1. A probe ends at once where
its throughput is below 0.8 of where it came from; after two rounds it is kept where that is 0.97 or more, and a probe
upwards needs an acceptance of 0.75 too. The next probe waits one round after one that was kept, and six after one that
was not. Only rounds that drafted K tokens count.

With ``cooldown``, three rounds in a row at the least K that accepted nothing make the next step draft nothing.

Left open: adaptation is off by default (``min_adaptive_k`` 0). Here the least K is the 2 of the documentation's
example. ONNX Runtime GenAI decodes one sequence at a time and starts anew with each; so does this, in batches too.
"""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError

ALPHA = 0.25
HIGH, LOW = 0.75, 0.5
KEEP, SEVERE = 0.97, 0.8
SAMPLES = 2
KEPT_WAIT, REJECTED_WAIT = 1, 6
FAILURES = 3
#: Where a sequence keeps its controller.
CONTROLLER = "onnx_genai"


class _Estimate:
    """Tokens, seconds and acceptance of one K."""

    def __init__(self) -> None:
        self.means = [0.0, 0.0, 0.0]
        self.samples = 0

    def update(self, *values: float) -> None:
        weight = ALPHA if self.samples else 1.0
        self.means = [mean + weight * (value - mean) for mean, value in zip(self.means, values, strict=True)]
        self.samples += 1

    @property
    def throughput(self) -> float:
        return self.means[0] / self.means[1] if self.means[1] > 0.0 else 0.0

    @property
    def acceptance(self) -> float:
        return self.means[2]


class Controller:
    """K of one sequence: probes its neighbours, and keeps those that are not slower."""

    def __init__(self, least: int) -> None:
        self.least = self.k = least
        self.estimates = [_Estimate() for _ in range(MAX_GAMMA + 1)]
        self.origin = self.probed = self.stable = self.wait = 0
        self.failures = self.rest = 0

    def cool(self, k: int, outcome: Outcome) -> None:
        """Count rounds that accepted nothing."""
        self.failures = 0 if outcome.accepted or k != self.least else self.failures + 1
        if self.failures == FAILURES:
            self.failures, self.rest = 0, 1

    def record(self, k: int, outcome: Outcome) -> None:
        """Take in a round that drafted k tokens, as many as were wanted."""
        seconds = outcome.draft_seconds + outcome.verify_seconds
        if k != self.k or not (isfinite(seconds) and seconds > 0.0 and outcome.produced > 0):
            return
        here = self.estimates[k]
        here.update(outcome.produced, seconds, outcome.accepted / outcome.labelled)
        if self.origin:
            self.probed += 1
            before = self.estimates[self.origin].throughput
            if before > 0.0 and here.throughput < before * SEVERE:
                self._finish(False)
            elif self.probed >= SAMPLES:
                as_fast = before <= 0.0 or here.throughput >= before * KEEP
                self._finish(as_fast and (k < self.origin or here.acceptance >= HIGH))
            return
        self.stable += 1
        if self.wait:
            self.wait -= 1
        elif here.samples >= SAMPLES:
            if here.acceptance < LOW and k > self.least:
                self._probe(k - 1)
            elif here.acceptance >= HIGH and k < MAX_GAMMA and self.stable >= SAMPLES:
                self._probe(k + 1)

    def _probe(self, k: int) -> None:
        self.origin, self.k = self.k, k
        self.probed = self.stable = 0

    def _finish(self, keep: bool) -> None:
        if not keep:
            self.k = self.origin
        self.origin = self.probed = self.stable = 0
        self.wait = KEPT_WAIT if keep else REJECTED_WAIT


class OnnxGenAi(Policy):
    """ONNX Runtime GenAI's K, which climbs while acceptance is high and throughput holds.

    Parameters
    ----------
    least : int
        ``min_adaptive_k``, where every sequence starts.
    cooldown : bool
        Whether a step is left undrafted after three rounds that accepted nothing; off by default there too.
    """

    summary = "ONNX Runtime GenAI's adaptive K: probes K - 1 and K + 1 by acceptance, keeps what is no slower"
    learns = True
    positional: ClassVar[str] = "least"

    def __init__(self, *, least: int = 2, cooldown: bool = False, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 1 <= least <= MAX_GAMMA:
            raise PolicyError(f"least must be from 1 to {MAX_GAMMA}, got {least}")
        self.least, self.cooldown = least, cooldown

    def decide(self, context: Context) -> Decision:
        controller = context.memory.get(CONTROLLER)
        if controller is None:
            controller = context.memory[CONTROLLER] = Controller(self.least)
        k = controller.k
        if controller.rest:
            controller.rest -= 1
            return Decision(self.new_id(), 0)
        return Decision(self.new_id(), min(k, context.max_gamma), features=(controller, k))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or decision.features is None or not outcome.labelled:
            return
        controller, k = decision.features
        if self.cooldown:
            controller.cool(outcome.drafted, outcome)
        if outcome.drafted == k:
            controller.record(k, outcome)
