"""One step's drafts: token by token under the policy's eyes, or all at once where it need not look."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch

from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Policy
from speckv_online.decoding.sequence import matching
from speckv_online.decoding.timing import StepClock
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.drafters.model import ModelDrafter, is_pure


def draft_ahead(drafter: Drafter, decision: Decision, gamma: int, sampled: bool) -> torch.Tensor | None:
    """Draft ``gamma`` tokens on the drafter's device, if nothing has to be known of them before they are verified.

    Then a step needs one transfer to the host in all. Returns what :meth:`ModelDrafter.ahead` does, or None where the
    policy wants to see every token, tokens are drawn, or the drafter is no plain model; its quick form is on the host.
    """
    if not gamma or decision.stops or sampled or not is_pure(drafter) or drafter.quick is not None:
        return None
    return None if drafter.kind == LOOKUP else drafter.ahead(gamma)


def judge_ahead(
    logits: torch.Tensor,
    ahead: torch.Tensor,
    drafter: ModelDrafter,
    signals: np.ndarray,
    drafts: list[int],
    clock: StepClock,
) -> tuple[int, int]:
    """Fetch what :func:`draft_ahead` gave, fill ``drafts`` and ``signals``, and judge them by the target's ``logits``.

    Returns how many drafts agree, and the token that follows them.
    """
    found = torch.cat((logits.argmax(-1).float(), ahead.to(logits.device).flatten()))
    clock.launched()
    numbers, count = found.tolist(), len(ahead)  # the one transfer of the step
    rows = [numbers[i : i + 5] for i in range(count + 1, len(numbers), 5)]
    drafts += drafter.take_ahead(rows, signals)
    return matching(drafts, [int(c) for c in numbers[: count + 1]])


def draft(
    policy: Policy,
    drafter: Drafter,
    decision: Decision,
    context: Context,
    gamma: int,
    signals: np.ndarray,
    drafts: list[int],
    lookups: list[float],
    trim: bool,
) -> float:
    """Append up to ``gamma`` proposals to ``drafts``, their signals to ``signals``, asking the policy where it wants.

    ``lookups`` says how sure the drafter is of the next proposal if that is free; the ones after it are appended, so
    that it is one longer than what was drafted. It and ``drafts`` are what ``context`` shows the policy. ``trim`` lets
    the policy drop drafts after the fact. Returns the seconds spent in the policy.
    """
    asked, asks = 0.0, decision.stops
    if isinstance(drafter, ChunkedDrafter):
        drafter.plan(gamma)
    while len(drafts) < gamma:
        token = drafter.draft(signals[len(drafts)])
        if token == NO_PROPOSAL:
            break
        drafts.append(token)
        lookups.append(drafter.sure())
        if asks and len(drafts) < gamma:
            context.offer = drafter.offer()
            t = perf_counter()
            go_on = policy.proceed(decision, len(drafts), signals)
            asked += perf_counter() - t
            if not go_on:
                break
            if isinstance(go_on, str):
                asks = drafter.use(go_on) != LOOKUP or not trim
                lookups[-1], context.offer = drafter.sure(), drafter.offer()
    if (decision.stops or decision.trims) and drafts and trim:
        context.offer, t = 0.0, perf_counter()
        del drafts[policy.submit(decision, len(drafts), signals) :]
        asked += perf_counter() - t
    return asked


def is_exhausted(used: str, drafted: int, lookups: list[float]) -> bool:
    """Whether a drafter has nothing to propose after a step's drafts.

    Parameters
    ----------
    used : str
        Name of the drafter that the step began with.
    drafted : int
        Tokens that were sent to the target.
    lookups : list of float
        How sure the drafter was of each token that it drafted, and of the next one.
    """
    return used == LOOKUP and lookups[-1] == 0.0 and drafted == len(lookups) - 1 < MAX_GAMMA
