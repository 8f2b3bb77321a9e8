"""Step records: one per draft-then-verify round, the superset of the release's CSV columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 3


@dataclass(slots=True)
class StepRecord:
    """One step of one prompt. Times in seconds, entropies in bits.

    ``gamma`` is what the policy asked for, cut to what the step allowed, ``drafted`` what was drafted and submitted,
    ``accepted`` n, ``produced`` the tokens added to the output. The signal summaries are over the drafted tokens of
    this very step (zero where nothing was drafted), ``tested`` is the number of positions whose label is known.
    ``forwards`` counts the tokens that took a forward of the draft model, dropped ones included; where it is not known
    (schema 1), all of ``drafted``. ``decide_seconds`` is what the policy took to decide, to stop and to submit,
    ``learn_seconds`` what it took to learn from this step; up to schema 2 the former held both.
    """

    step: int
    gamma: int
    drafted: int
    accepted: int
    tested: int
    produced: int
    mean_draft_entropy: float
    mean_draft_confidence: float
    max_draft_entropy: float
    min_draft_confidence: float
    context_length: int
    propensity: float
    policy_version: int
    decision_id: int
    decide_seconds: float
    draft_seconds: float
    verify_seconds: float
    seconds: float
    forwards: int = -1
    learn_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.forwards < 0:
            self.forwards = self.drafted

    def as_dict(self) -> dict[str, Any]:
        """Return the record as a flat dict, ready for JSON."""
        return asdict(self)
