"""One step's drafts: token by token under the policy's eyes, or all at once where it need not look."""

from __future__ import annotations

import torch

from policies.base import LOOKUP
from speckv_online.decoding.sequence import matching
from speckv_online.decoding.timing import StepClock
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.drafters.model import ModelDrafter, is_pure
from speckv_online.speculation import Speculation


def draft_async(step: Speculation, drafter: Drafter) -> torch.Tensor | None:
    """Draft the step's ``gamma`` tokens on the drafter's device, if nothing has to be known of them beforehand.

    Then a step needs one transfer to the host in all. Returns what :meth:`ModelDrafter.draft_async` does, or None where
    the policy wants to see every token, tokens are drawn, or the drafter is no plain model; its quick form is on the
    host."""
    if not step.gamma or step.asks or not step.may_drop or not is_pure(drafter) or drafter.compiled is not None:
        return None
    return None if drafter.kind == LOOKUP else drafter.draft_async(step.gamma)


def judge_async(
    step: Speculation, logits: torch.Tensor, pending: torch.Tensor, drafter: ModelDrafter, clock: StepClock
) -> tuple[int, int]:
    """Fetch what :func:`draft_async` gave into the step, and judge it by the target's ``logits``.

    Drafts after an end of sequence are dropped here. Returns how many of the others agree, and the token that follows
    them.
    """
    found = torch.cat((logits.argmax(-1).float(), pending.to(logits.device).flatten()))
    clock.launched()
    numbers, count = found.tolist(), len(pending)  # the one transfer of the step
    rows = [numbers[i : i + 5] for i in range(count + 1, len(numbers), 5)]
    kept = step.extend(drafter.take_async(rows, step.signals), [0.0] * count)
    return matching(step.tokens, [int(c) for c in numbers[: kept + 1]])


def draft(step: Speculation, drafter: Drafter) -> None:
    """Draft one token after another, as many as the policy wants, and drop those that it does not submit."""
    if isinstance(drafter, ChunkedDrafter):
        drafter.plan(step.gamma)
    while len(step.tokens) < step.gamma:
        token = drafter.draft(step.signals[len(step.tokens)])
        if token == NO_PROPOSAL or not step.add(token):
            break
    step.submit(drafter.proposals)
