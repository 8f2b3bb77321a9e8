"""llama.cpp's draft rule: stop at the first token below ``p-min`` (``common/speculative.cpp``)."""

from __future__ import annotations

from typing import ClassVar

from policies.base import CONFIDENCE, MAX_GAMMA, Context, Decision, Draft, Policy, PolicyError


class LlamaCpp(Policy):
    """Draft until the draft's confidence falls below p-min; that token is thrown away, and so are too short drafts.

    Parameters
    ----------
    p_min : float
        ``--draft-p-min``.
    draft_min, draft_max : int
        ``--draft-min`` and ``--draft-max``: a draft shorter than the former is not verified at all.
    """

    summary = "llama.cpp: stop at the first token with confidence below p_min, which is not submitted"
    positional: ClassVar[str] = "p_min"

    def __init__(
        self, *, p_min: float = 0.75, draft_min: int = 0, draft_max: int = MAX_GAMMA, seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= p_min <= 1:
            raise PolicyError(f"p_min must be from 0 to 1, got {p_min}")
        if not 0 <= draft_min <= draft_max <= MAX_GAMMA:
            raise PolicyError(f"need 0 <= draft_min <= draft_max <= {MAX_GAMMA}, got {draft_min} and {draft_max}")
        self.p_min, self.draft_min, self.draft_max = p_min, draft_min, draft_max

    def decide(self, context: Context) -> Decision:
        gamma = min(self.draft_max, context.max_gamma)
        if gamma < self.draft_min:  # too short whatever is drafted, as near a budget's end
            gamma = 0
        return Decision(self.new_id(), gamma, stops=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, CONFIDENCE) >= self.p_min)

    def submit(self, decision: Decision, draft: Draft) -> int:
        kept = draft.drafted - (draft.signals.item(draft.drafted - 1, CONFIDENCE) < self.p_min)
        return kept if kept >= self.draft_min else 0
