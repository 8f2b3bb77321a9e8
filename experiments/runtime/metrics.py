"""Counters and histograms of decoding for Ray's metrics port, in the names of vLLM's where it has them.

A worker adds the steps of each finished prompt in one go: nothing is called per token or per step while decoding. Ray
passes the sums on to the metrics port of its node (``ray start --metrics-export-port``), in Prometheus' format and with
the tags ``level`` and ``policy``:

======================================  ==========================================================
``ray_speckv_drafts_total``             steps that drafted anything
``ray_speckv_steps_total``              steps
``ray_speckv_drafted_tokens_total``     tokens drafted and submitted
``ray_speckv_accepted_tokens_total``    of those, accepted
``ray_speckv_accepted_at_total``        accepted at each ``position`` of the draft, from 1
``ray_speckv_produced_tokens_total``    tokens of output
``ray_speckv_decoding_seconds_total``   seconds of all steps
``ray_speckv_fallbacks_total``          times that a policy raised, stalled or answered nonsense
``ray_speckv_decide_seconds``           histogram over steps: the policy's own time
``ray_speckv_goodput``                  histogram over prompts: tokens per second of decoding
======================================  ==========================================================

Ray keeps a histogram's buckets only and makes its sum up from them: the exact goodput is the rate of
``produced_tokens`` over that of ``decoding_seconds``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from speckv_online.io.step_records import StepRecord

TAGS = ("level", "policy")
COUNTERS = {
    "drafts": "Steps that drafted anything",
    "steps": "Draft-then-verify steps",
    "drafted_tokens": "Tokens drafted and submitted",
    "accepted_tokens": "Drafted tokens that the target accepted",
    "produced_tokens": "Tokens of output",
    "decoding_seconds": "Seconds of all steps",
    "fallbacks": "Times that a policy raised, stalled or answered nonsense",
}
DECIDE_BOUNDS = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
GOODPUT_BOUNDS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]


class Meter:
    """Metrics of one worker; without a running Ray it does nothing, and does not import it.

    Parameters
    ----------
    level : str
        Compression level of the worker's target.
    """

    def __init__(self, level: str) -> None:
        self.level = level
        self._metrics: dict[str, Any] = {}
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Counter, Histogram

        for name, text in COUNTERS.items():
            self._metrics[name] = Counter(f"speckv_{name}", text, TAGS)
        text = "Tokens accepted at a position of the draft"
        self._metrics["accepted_at"] = Counter("speckv_accepted_at", text, (*TAGS, "position"))
        text = "Seconds per step that the policy took to decide and to learn"
        self._metrics["decide_seconds"] = Histogram("speckv_decide_seconds", text, DECIDE_BOUNDS, TAGS)
        text = "Tokens per second of decoding, by prompt"
        self._metrics["goodput"] = Histogram("speckv_goodput", text, GOODPUT_BOUNDS, TAGS)

    def add(self, policy: str, steps: Sequence[StepRecord], fallbacks: int = 0) -> None:
        """Count the steps of a finished prompt, and how often its policy failed in them."""
        if not self._metrics or not steps:
            return
        tags = {"level": self.level, "policy": policy}
        sums = totals(steps, fallbacks)
        for name, value in sums.items():
            if value:
                self._metrics[name].inc(value, tags)
        for i, count in enumerate(accepted_at(steps), start=1):
            self._metrics["accepted_at"].inc(count, tags | {"position": str(i)})
        for step in steps:
            self._metrics["decide_seconds"].observe(step.decide_seconds, tags)
        if sums["decoding_seconds"] > 0:
            self._metrics["goodput"].observe(sums["produced_tokens"] / sums["decoding_seconds"], tags)


def totals(steps: Sequence[StepRecord], fallbacks: int = 0) -> dict[str, float]:
    """Return the value of every counter of :data:`COUNTERS` over some steps."""
    return {
        "drafts": sum(s.drafted > 0 for s in steps),
        "steps": len(steps),
        "drafted_tokens": sum(s.drafted for s in steps),
        "accepted_tokens": sum(s.accepted for s in steps),
        "produced_tokens": sum(s.produced for s in steps),
        "decoding_seconds": sum(s.seconds for s in steps),
        "fallbacks": fallbacks,
    }


def accepted_at(steps: Sequence[StepRecord]) -> list[int]:
    """Return how many steps accepted the first drafted token, the second, and so on to the longest."""
    longest = max((s.accepted for s in steps), default=0)
    return [sum(s.accepted >= i for s in steps) for i in range(1, longest + 1)]
