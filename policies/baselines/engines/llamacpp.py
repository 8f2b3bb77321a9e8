"""llama.cpp's draft rule: stop at the first token below ``p-min``.

Source: ``common/speculative.cpp`` (``draft-simple``) as of mid-2026, after ggml-org/llama.cpp#22397. The flags are now
``--spec-draft-p-min`` (default 0.00, was 0.75), ``--spec-draft-n-max`` (default 3, was 16; ``--draft-max`` is gone) and
``--spec-draft-n-min`` (default 0; ``--draft-min`` is gone).

Different here: llama.cpp takes the token's probability among the draft's ten likeliest tokens; a policy is told that
among all tokens, which is a little lower.
"""

from __future__ import annotations

from typing import ClassVar

from policies.base import CONFIDENCE, MAX_GAMMA, Context, Decision, Draft, Policy, PolicyError


class LlamaCpp(Policy):
    """Draft until the draft's confidence falls below p-min; that token is thrown away, and so are too short drafts.

    Parameters
    ----------
    p_min : float
        ``--spec-draft-p-min``.
    n_min, n_max : int
        ``--spec-draft-n-min`` and ``--spec-draft-n-max``: a draft shorter than the former is not verified at all.
    """

    summary = "llama.cpp: stop at the first token with confidence below p_min, which is not submitted"
    positional: ClassVar[str] = "p_min"

    def __init__(self, *, p_min: float = 0.0, n_min: int = 0, n_max: int = 3, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= p_min <= 1:
            raise PolicyError(f"p_min must be from 0 to 1, got {p_min}")
        if not 0 <= n_min <= n_max <= MAX_GAMMA:
            raise PolicyError(f"need 0 <= n_min <= n_max <= {MAX_GAMMA}, got {n_min} and {n_max}")
        self.p_min, self.n_min, self.n_max = p_min, n_min, n_max

    def decide(self, context: Context) -> Decision:
        gamma = min(self.n_max, context.max_gamma)
        if gamma < self.n_min:  # too short whatever is drafted, as near a budget's end
            gamma = 0
        return Decision(self.new_id(), gamma, ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, CONFIDENCE) >= self.p_min)

    def submit(self, decision: Decision, draft: Draft) -> int:
        kept = draft.drafted - (draft.signals.item(draft.drafted - 1, CONFIDENCE) < self.p_min)
        return kept if kept >= self.n_min else 0
