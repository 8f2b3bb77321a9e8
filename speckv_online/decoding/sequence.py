"""A sequence that is being decoded: how its tokens are judged, how it ends, and what is recorded of each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from policies.base import Context, Decision, Outcome
from speckv_online.context import summarise
from speckv_online.io.step_records import StepRecord
from speckv_online.modeling.sampling import Sampler


@dataclass(slots=True)
class TokenSequence:
    """All tokens of a sequence, the prompt's included, how new ones are drawn, and what ends it.

    Attributes
    ----------
    eos : collection of int
        Tokens that end it.
    sampler : Sampler or None
        None is greedy decoding.
    should_stop : callable or None
        Called with all tokens after each new one; True ends the sequence there.
    finish : str
        Why it ended; empty while it goes on.
    """

    tokens: list[int]
    eos: Collection[int]
    sampler: Sampler | None = None
    should_stop: Callable[[list[int]], bool] | None = None
    finish: str = ""

    def verify(
        self, logits: torch.Tensor, drafts: list[int], proposals: Sequence[torch.Tensor | None]
    ) -> tuple[int, int]:
        """Return how many drafts the target accepts, and the token that follows them.

        ``logits`` are the target's, shape (k + 1, vocab), row i after the first i of the k drafts.
        """
        if self.sampler is not None:
            return self.sampler.verify(self.sampler.probabilities(logits, self.tokens, drafts), drafts, proposals)
        return matching(drafts, likeliest(logits))

    def append(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first that ends the sequence, and return those."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if token in self.eos:
                self.finish = "eos"
            elif self.should_stop is not None and self.should_stop(self.tokens):
                self.finish = "stop"
            if self.finish:
                return tokens[: i + 1]
        return tokens


def likeliest(logits: torch.Tensor) -> list[Any]:
    """Return each row's likeliest token, the first of equals; nested like the logits, shape (..., vocab)."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # A tenth of the time that torch takes, which for one row is 1 % of a small model's forward.
        return logits.detach().numpy().argmax(-1).tolist()
    return logits.argmax(-1).tolist()


def matching(drafts: list[int], choices: list[int]) -> tuple[int, int]:
    """Return the number of leading drafts that are the target's choices too, and the choice after them."""
    n = 0
    while n < len(drafts) and drafts[n] == choices[n]:
        n += 1
    return n, choices[n]


def untimed(outcome: Outcome, draft: bool = True) -> Outcome:
    """Return an outcome of which the draft's time alone is known, or without ``draft`` none."""
    draft_seconds = outcome.draft_seconds if draft else 0.0
    return replace(outcome, seconds=0.0, verify_seconds=0.0, draft_seconds=draft_seconds)


def record_of(
    context: Context, decision: Decision, outcome: Outcome, decide_seconds: float, seconds: float
) -> StepRecord:
    """Return the record of a step that took ``seconds``, ``decide_seconds`` of them in the policy.

    ``context`` is still the one that was decided in.
    """
    mean_h, max_h, mean_c, min_c = summarise(outcome.signals)
    return StepRecord(
        step=context.step, gamma=decision.gamma, drafted=outcome.drafted, accepted=outcome.accepted,
        tested=outcome.tested, produced=outcome.produced, mean_draft_entropy=mean_h, mean_draft_confidence=mean_c,
        max_draft_entropy=max_h, min_draft_confidence=min_c, context_length=outcome.context_length,
        propensity=decision.propensity, policy_version=decision.policy_version, decision_id=decision.id,
        decide_seconds=decide_seconds, draft_seconds=outcome.draft_seconds, verify_seconds=outcome.verify_seconds,
        seconds=seconds, forwards=outcome.forwards,
    )  # fmt: skip
