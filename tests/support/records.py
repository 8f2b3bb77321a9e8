"""Step records and units to write."""

from __future__ import annotations

from dataclasses import replace

from speckv_online.io.run_directory import Unit
from speckv_online.io.step_records import StepRecord

STEP = StepRecord(
    step=0, gamma=4, drafted=4, accepted=2, labelled=3, produced=3, mean_draft_entropy=1.5, mean_draft_confidence=0.5,
    max_draft_entropy=2.0, min_draft_confidence=0.25, context_length=30, propensity=1.0, policy_version=0,
    decision_id=1, decide_seconds=1e-5, draft_seconds=0.02, verify_seconds=0.05, seconds=0.071,
)  # fmt: skip


def unit(prompt: str = "p1", policy: str = "fixed:4", seed: int = 0) -> Unit:
    return Unit("nf4", policy, prompt, "chat", seed)


def steps(count: int, start: int = 0) -> list[StepRecord]:
    return [replace(STEP, step=start + i, decision_id=100 * start + i) for i in range(count)]
