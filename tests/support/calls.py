"""Calls of contenders."""

from __future__ import annotations

from speckv_online.io.run_directory import Unit, UnitResult
from speckv_online.io.step_records import StepRecord


def step(index: int, drafted: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=index, gamma=drafted, drafted=drafted, accepted=0, labelled=min(1, drafted), produced=1,
        mean_draft_entropy=1.0, mean_draft_confidence=0.5, max_draft_entropy=1.0, min_draft_confidence=0.5,
        context_length=100, propensity=1.0, policy_version=0, decision_id=index, decide_seconds=0.0,
        draft_seconds=0.01 * drafted, verify_seconds=seconds - 0.01 * drafted, seconds=seconds,
    )  # fmt: skip


def call(policy: str, prompt: str, tokens: int, seconds: float, drafted: int = 0) -> UnitResult:
    steps = [] if policy.startswith("transformers") else [step(i, drafted, seconds / tokens) for i in range(tokens)]
    unit = Unit("fp16", policy, prompt, "chat", 0)
    return UnitResult(unit, steps, {"output": list(range(tokens)), "call_seconds": seconds})
