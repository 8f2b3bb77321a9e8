"""Decoding several prompts at once: every step drafts for each row as much as the policy wants for that row.

One forward of the target verifies all rows, as wide as the longest draft. Rows accept different numbers of tokens, see
:mod:`speckv_online.modeling.batched_model` for how they stay apart; each row's output is what decoding it alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch

from policies.base import LOOKUP, N_SIGNALS, Decision, Outcome, Policy
from policies.costs.level_costs import CAUGHT
from speckv_online.context import History
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.loop import DecodingLoop
from speckv_online.decoding.propose import is_exhausted
from speckv_online.decoding.sequence import (
    TokenSequence,
    likeliest,
    matching,
    record_of,
    untimed,
)
from speckv_online.drafters.base import NO_PROPOSAL
from speckv_online.drafters.batched import ModelRows, RowDrafter, row_drafter
from speckv_online.errors import UserError
from speckv_online.modeling.forward_backend import BatchReader, backend_of
from speckv_online.modeling.sampling import Sampler

#: Most prompts at once.
MAX_BATCH = 16


def level_name(level: str, rows: int) -> str:
    """Return the level's name as policies see it: ``nf4@8`` for 5 to 8 sequences at once, ``nf4`` for one.

    Costs are learned per level, and so per size of the batch, which is rounded up to a power of two.
    """
    return level if rows == 1 else f"{level}@{1 << (rows - 1).bit_length()}"


@dataclass(slots=True)
class _Row:
    """A prompt of the batch, and what is known of its current step."""

    number: int
    sequence: TokenSequence
    history: History
    budget: int
    signals: np.ndarray
    out: Generation = field(default_factory=Generation)
    decision: Decision = field(default_factory=lambda: Decision(0, 0))
    drafts: list[int] = field(default_factory=list)
    lookups: list[float] = field(default_factory=list)
    asks: bool = False  # whether the policy is asked after each drafted token
    lag: int = 0
    used: str = ""
    policy_seconds: float = 0.0
    draft_seconds: float = 0.0
    learning: float = 0.0


@torch.inference_mode()
def decode_batch(
    decoder: DecodingLoop,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    tasks: Sequence[str] | None = None,
    eos_ids: Collection[int] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    samplers: Sequence[Sampler | None] | None = None,
    should_stop: Sequence[Callable[[list[int]], bool]] | None = None,
) -> list[Generation]:
    """Continue up to 16 prompts at once, each by at most ``max_new_tokens`` tokens.

    The policy decides, and learns, for each row by itself. Shared time is split: that of a forward evenly among the
    rows that took part, so that tokens over seconds, summed over rows, are those of the whole batch.

    Parameters
    ----------
    decoder : DecodingLoop
        Whose target, drafter and policy decode, and whose counts grow.
    prompts : sequence of sequence of int
        At least one token each.
    tasks : sequence of str, optional
        Task label of each prompt.
    on_tokens : callable, optional
        Called with a prompt's number and its new tokens after each step.
    samplers : sequence of (Sampler or None), optional
        How each row's tokens are drawn; greedy decoding without them. Rows may share one.
    should_stop : sequence of callables, optional
        As for :meth:`~speckv_online.decoding.DecodingLoop.generate`, one for each prompt.
    max_new_tokens, eos_ids
        As there.

    Returns
    -------
    list of Generation
        In the order of the prompts; their seconds are shares of the batch's.

    Raises
    ------
    UserError
        If there are too many prompts, or one is empty or too long.
    """
    if len(prompts) > MAX_BATCH:
        raise UserError(f"a batch holds at most {MAX_BATCH} prompts, got {len(prompts)}: split them")
    checked = [decoder.check_prompt(p) for p in prompts]
    if not checked:
        return []
    n = len(checked)
    eos = decoder.eos_ids if eos_ids is None else frozenset(eos_ids)
    rows = []
    for i, prompt in enumerate(checked):
        sequence = TokenSequence(
            prompt, eos, samplers[i] if samplers else None, should_stop[i] if should_stop else None
        )
        history = History(level_name(decoder.level, n), tasks[i] if tasks else "", len(prompt))
        history.context.tokens = sequence.tokens
        history.context.drafters = decoder.drafter.names if decoder.drafter is not None else ()
        budget = min(max_new_tokens, decoder.room(prompt))
        rows.append(_Row(i, sequence, history, budget, np.zeros((max(decoder.max_gamma, 1), N_SIGNALS))))
    if max(len(row.sequence.tokens) + row.budget for row in rows) > decoder.rope.at:
        raise UserError(f"past {decoder.rope.at} tokens this model decodes one prompt at a time")
    answers = [row.out for row in rows]
    if rows := [row for row in rows if row.budget > 0]:
        _run(decoder, rows, on_tokens)
    for answer in answers:
        decoder.totals.add(answer)
    decoder.last = answers
    return answers


def _run(decoder: DecodingLoop, rows: list[_Row], on_tokens: Callable[[int, list[int]], None] | None) -> None:
    started = perf_counter()
    prompts = [row.sequence.tokens for row in rows]
    capacity = max(len(p) + row.budget for p, row in zip(prompts, rows, strict=True)) + decoder.max_gamma + 1
    target = backend_of(decoder.target).batch(prompts, capacity)
    drafter = None
    if decoder.drafter is not None:
        drafter = row_drafter(decoder.drafter, prompts, capacity, [row.sequence.sampler for row in rows])
    if any(len(p) > 1 for p in prompts):
        target.feed([p[:-1] for p in prompts], last=True)
    for row in rows:
        decoder.policy.begin(row.history.context)
    prefill = (perf_counter() - started) / len(rows)
    for row in rows:
        row.out.prefill_seconds = prefill

    while rows:
        for row in rows:
            context = row.history.context
            context.level = level_name(decoder.level, len(rows))
            context.remaining = row.budget - len(row.out.tokens)
            context.max_gamma = decoder.limit(context.remaining, context.context_length)
        produced = _step(decoder.policy, target, drafter, rows)
        for row, tokens in zip(rows, produced, strict=True):
            if on_tokens is not None:
                on_tokens(row.number, tokens)
        going = [i for i, row in enumerate(rows) if not row.sequence.finish and len(row.out.tokens) < row.budget]
        if len(going) < len(rows):
            for row in rows:
                row.out.finish = row.sequence.finish or "length"
                row.out.seconds = row.out.prefill_seconds + row.out.decode_seconds
            rows = [rows[i] for i in going]
            target.keep(going)
            if drafter is not None:
                drafter.keep(going)


def _step(policy: Policy, target: BatchReader, drafter: RowDrafter | None, rows: list[_Row]) -> list[list[int]]:
    """Draft, verify and learn once for every row; return the rows' new tokens."""
    started = perf_counter()
    _draft(policy, drafter, rows)
    t = perf_counter()
    logits = target.feed([[row.sequence.tokens[-1], *row.drafts] for row in rows])
    choices = [] if all(row.sequence.sampler for row in rows) else likeliest(logits)
    found = []
    for i, row in enumerate(rows):
        if row.sequence.sampler is None:
            found.append(matching(row.drafts, choices[i]))
        else:
            proposals = drafter.proposals(i)[: len(row.drafts)] if drafter is not None else []
            found.append(row.sequence.verify(logits[i, : len(row.drafts) + 1], row.drafts, proposals))
    verify_seconds = (perf_counter() - t) / len(rows)

    produced, outcomes = [], []
    for i, (row, (n, following)) in enumerate(zip(rows, found, strict=True)):
        context, k = row.history.context, len(row.drafts)
        tokens = row.sequence.append([*row.drafts[:n], following])
        tested = min(n + 1, k)
        if len(tokens) <= n:  # the end came inside the draft: nothing is known of what follows it
            n = tested = len(tokens)
        target.cached[i] = context.context_length + n
        if drafter is not None:
            drafter.end(i, n, tokens)
        row.out.tokens += tokens
        produced.append(tokens)
        outcome = Outcome(
            drafted=k, accepted=n, tested=tested, produced=len(tokens), draft_seconds=row.draft_seconds,
            verify_seconds=verify_seconds, level=context.level, context_length=context.context_length,
            signals=row.signals[:k].copy(), drafter=row.used, forwards=row.lookups[:-1].count(0.0),
            exhausted=is_exhausted(row.used, k, row.lookups),
        )  # fmt: skip
        outcome.caught_up = max(row.lag - 1, 0) if outcome.forwards else 0
        outcomes.append(outcome)
    # Forwards in which a row had much to read take the others long too, which says nothing of what theirs take.
    reading = isinstance(drafter, ModelRows) and max(outcome.caught_up for outcome in outcomes) >= CAUGHT
    own = [row.policy_seconds + row.draft_seconds + verify_seconds for row in rows]
    rest = max(perf_counter() - started - sum(own), 0.0) / len(rows)
    for row, outcome, seconds in zip(rows, outcomes, own, strict=True):
        outcome.seconds = seconds + rest + row.learning
        outcome.policy_seconds = row.policy_seconds + row.learning
        t = perf_counter()
        # A step whose draft read the prompt first says nothing of what a step takes.
        first = row.history.context.step == 0 and outcome.caught_up > 1
        untypical = first or (reading and outcome.caught_up < CAUGHT)
        policy.learn(row.decision, untimed(outcome) if untypical else outcome)
        row.learning = perf_counter() - t
        record = record_of(
            row.history.context, row.decision, outcome, row.policy_seconds + row.learning, seconds + rest + row.learning
        )
        row.out.steps.append(record)
        row.history.update(outcome)
    return produced


def _draft(policy: Policy, drafter: RowDrafter | None, rows: list[_Row]) -> None:
    """Decide and draft for every row, one token for each row that still wants one at a time."""
    wanted: list[int] = []
    for i, row in enumerate(rows):
        context = row.history.context
        row.drafts = []
        context.drafts = row.drafts
        row.draft_seconds = 0.0
        row.lookups = context.lookups = [] if drafter is None else [drafter.sure(i)]
        context.offer = 0.0 if drafter is None else drafter.offer(i)
        t = perf_counter()
        row.decision = policy.decide(context)
        row.policy_seconds = perf_counter() - t
        row.asks = row.decision.stops
        if drafter is not None:
            row.lag, row.used = drafter.lag(i), drafter.use(i, row.decision.drafter)
            if row.decision.drafter:
                row.lookups = context.lookups = [drafter.sure(i)]
                context.offer = drafter.offer(i)
            if min(row.decision.gamma, context.max_gamma) > 0:
                wanted.append(i)
    while wanted and drafter is not None:
        found = drafter.draft(wanted, [rows[i].signals[len(rows[i].drafts)] for i in wanted])
        going = []
        for i, (token, spent) in zip(wanted, found, strict=True):
            row = rows[i]
            row.draft_seconds += spent
            if token == NO_PROPOSAL:
                continue
            row.drafts.append(token)
            row.lookups.append(drafter.sure(i))
            if len(row.drafts) >= min(row.decision.gamma, row.history.context.max_gamma):
                continue
            if row.asks:
                row.history.context.offer = drafter.offer(i)
                t = perf_counter()
                go_on = policy.proceed(row.decision, len(row.drafts), row.signals)
                row.policy_seconds += perf_counter() - t
                if not go_on:
                    continue
                if isinstance(go_on, str):
                    row.asks = drafter.use(i, go_on) != LOOKUP or row.sequence.sampler is not None
                    row.lookups[-1], row.history.context.offer = drafter.sure(i), drafter.offer(i)
            going.append(i)
        wanted = going
    for row in rows:
        if (row.decision.stops or row.decision.trims) and row.drafts and row.sequence.sampler is None:
            row.history.context.offer, t = 0.0, perf_counter()
            del row.drafts[policy.submit(row.decision, len(row.drafts), row.signals) :]
            row.policy_seconds += perf_counter() - t
