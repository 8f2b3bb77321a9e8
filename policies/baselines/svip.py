"""SVIP: stop where the draft's entropy says that acceptance is unlikely (Zhang et al., 2024, arXiv 2411.18462)."""

from __future__ import annotations

import math
from typing import ClassVar

from policies.base import ENTROPY, Context, Decision, Draft, Policy, PolicyError

LN2 = math.log(2.0)


class Svip(Policy):
    """Stop after token i once sqrt(c H(q_i)) > threshold, with the entropy H in nats.

    Parameters
    ----------
    threshold : float
        h; 0.3 in the paper.
    scale : float
        c, the paper's 0.15 for greedy decoding.
    cap : int
        Most tokens to draft; the paper's 40 is cut to what a step allows.
    """

    summary = "SVIP: stop when sqrt(0.15 * entropy) > 0.3 (nats)"
    positional: ClassVar[str] = "threshold"

    def __init__(
        self, *, threshold: float = 0.3, scale: float = 0.15, cap: int = 40, seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= threshold < math.inf or not 0 < scale < math.inf or cap < 1:
            raise PolicyError(f"need threshold >= 0, scale > 0 and cap >= 1, got {threshold}, {scale}, {cap}")
        self.cap = cap
        self._limit = threshold * threshold / (scale * LN2)  # the same rule on entropy in bits

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.cap, context.max_gamma), stops=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, ENTROPY) <= self._limit)
