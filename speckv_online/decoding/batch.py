"""Decoding several prompts at once: every step drafts for each row as much as the policy wants for that row.

One forward of the target verifies all rows, as wide as the longest draft. Rows accept different numbers of tokens, see
:mod:`speckv_online.modeling.batched_model` for how they stay apart; each row's output is what decoding it alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import perf_counter
from typing import Protocol

import torch

from policies.batches import MOST_ROWS, Forward
from policies.costs.reading import CAUGHT
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.inputs import token_ids, whole_number
from speckv_online.decoding.loop import DecodingLoop
from speckv_online.decoding.row import Row
from speckv_online.decoding.rows_policy import RowsPolicy
from speckv_online.decoding.sequence import TokenSequence, matching
from speckv_online.drafters.base import NO_PROPOSAL
from speckv_online.drafters.batched import ModelRows, RowDrafter, row_drafter
from speckv_online.errors import UserError
from speckv_online.modeling.forward_backend import BatchReader, backend_of
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.modeling.sampling import Sampler
from speckv_online.speculation import is_exhausted


class Together(Protocol):
    """Settles the tokens of all rows of a batch position by position, so that all rows stay equally long."""

    def settle(
        self, rows: list[Row], logits: torch.Tensor, proposals: list[list[torch.Tensor | None]]
    ) -> list[tuple[int, list[int]]]:
        """Return for each row how many drafts were accepted, and its new tokens, which it appends to the row.

        ``logits`` are the target's, shape (rows, width, vocab); ``proposals`` what each row's drafts were drawn from.
        """


#: Most prompts at once.
MAX_BATCH = MOST_ROWS


def level_name(level: str, rows: int) -> str:
    """Return the level's name as policies see it: ``nf4@8`` for 5 to 8 sequences at once, ``nf4`` for one.

    Costs are learned per level, and so per size of the batch, which is rounded up to a power of two.
    """
    return level if rows == 1 else f"{level}@{1 << (rows - 1).bit_length()}"


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
    caches: Sequence[KVCache] | None = None,
    together: Together | None = None,
) -> list[Generation]:
    """Continue up to 16 prompts at once, each by at most ``max_new_tokens`` tokens.

    A policy decides for all rows together (:class:`~policies.batches.JointPolicy`), or for each row by itself. Shared
    time is split: that of the target's forward by the tokens that it read of each row, so that tokens over seconds,
    summed over rows, are those of the whole batch.

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
    caches : sequence of KVCache, optional
        As ``cache`` there, one for each prompt.
    together : Together, optional
        Settles the tokens of all rows at once; each row then has a sampler, and no ``should_stop``.
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
    longest = max((len(token_ids(p)) + (caches[i].unseen if caches else 0) for i, p in enumerate(prompts)), default=0)
    decoder.begin(longest + whole_number(max_new_tokens), batch=True)
    checked = [decoder.check_prompt(p, caches[i] if caches else None) for i, p in enumerate(prompts)]
    if not checked:
        return []
    n, most = len(checked), whole_number(max_new_tokens)
    eos = decoder.eos_ids if eos_ids is None else frozenset(eos_ids)
    rows = []
    for i, prompt in enumerate(checked):
        sampler, unseen = samplers[i] if samplers else None, caches[i].unseen if caches else 0
        sequence = TokenSequence(prompt, eos, sampler, should_stop[i] if should_stop else None)
        row = Row(
            decoder.policy, sequence, level=level_name(decoder.level, n), task=tasks[i] if tasks else "",
            drafters=decoder.drafter.names if decoder.drafter is not None else (),
            budget=min(most, decoder.room(unseen + len(prompt))), max_gamma=decoder.max_gamma,
            sampled=sampler is not None, number=i, unseen=unseen,
        )  # fmt: skip
        rows.append(row)
    if max(row.history.context_length + row.budget for row in rows) > decoder.rope.at:
        raise UserError(f"past {decoder.rope.at} tokens this model decodes one prompt at a time")
    if decoder.memory is not None:
        decoder.memory.begin(decoder.target, decoder.drafter, decoder.level, n)
    answers = [row.out for row in rows]
    if rows := [row for row in rows if row.budget > 0]:
        _run(decoder, rows, on_tokens, caches, together)
    for answer in answers:
        decoder.totals.add(answer)
    decoder.last = answers
    if decoder.memory is not None:
        decoder.memory.end(answers)
    return answers


def _run(
    decoder: DecodingLoop,
    rows: list[Row],
    on_tokens: Callable[[int, list[int]], None] | None,
    caches: Sequence[KVCache] | None,
    together: Together | None,
) -> None:
    started = perf_counter()
    prompts = [row.sequence.tokens for row in rows]
    capacity = max(row.history.context_length + row.budget for row in rows) + decoder.max_gamma + 1
    whole, unread = prompts, prompts
    target = backend_of(decoder.target).batch(prompts, capacity)
    if caches is not None:
        own = [caches[row.number] for row in rows]
        target.load(own)
        whole = [cache.before + p for cache, p in zip(own, prompts, strict=True)]
        unread = [p[len(cache) - cache.unseen :] for cache, p in zip(own, prompts, strict=True)]
    drafter = None
    if decoder.drafter is not None:
        drafter = row_drafter(decoder.drafter, whole, capacity, [row.sequence.sampler for row in rows])
    if any(len(p) > 1 for p in unread):
        target.feed([p[:-1] for p in unread], last=True)
    for row in rows:
        row.begin()
    prefill = (perf_counter() - started) / len(rows)
    for row in rows:
        row.out.prefill_seconds = prefill

    asks = RowsPolicy(decoder.policy)
    while rows:
        for row in rows:
            row.history.level = level_name(decoder.level, len(rows))
        produced = _step(decoder, asks, target, drafter, rows, together)
        for row, tokens in zip(rows, produced, strict=True):
            if on_tokens is not None:
                on_tokens(row.number, tokens)
        going = [i for i, row in enumerate(rows) if not row.sequence.finish and row.remaining > 0]
        if len(going) < len(rows):
            for i, row in enumerate(rows):
                if caches is not None and i not in going:
                    target.store(i, caches[row.number])
                row.out.finish = row.sequence.finish or "length"
                row.out.seconds = row.out.prefill_seconds + row.out.decode_seconds
            rows = [rows[i] for i in going]
            target.keep(going)
            if drafter is not None:
                drafter.keep(going)


def _step(
    decoder: DecodingLoop,
    asks: RowsPolicy,
    target: BatchReader,
    drafter: RowDrafter | None,
    rows: list[Row],
    together: Together | None,
) -> list[list[int]]:
    """Draft, verify and commit once for every row; return the rows' new tokens."""
    started, count = perf_counter(), len(rows)
    lags = [1 if drafter is None else drafter.lag(i) for i in range(count)]
    draft_seconds, rounds = _draft(decoder, asks, drafter, rows, target.pads)
    t = perf_counter()
    found = _verify(target, drafter, rows, together)
    verify_seconds = perf_counter() - t
    widths = [1 + len(row.step.tokens) for row in rows]
    tokens_read = count * max(widths) if target.pads else sum(widths)

    produced, outcomes, own = [], [], []
    for i, (row, (n, tokens)) in enumerate(zip(rows, found, strict=True)):
        step = row.step
        target.cached[i] = row.history.context_length + len(tokens) - 1
        if drafter is not None:
            drafter.end(i, min(n, len(tokens) - 1), tokens)
        # A row pays for what the forward read of it.
        share = verify_seconds * (1.0 / count if target.pads else widths[i] / tokens_read)
        outcome = row.commit(
            tokens, n, forwards=step.lookups[:-1].count(0.0), lag=lags[i],
            exhausted=is_exhausted(step.drafter, len(step.tokens), step.lookups), draft_seconds=draft_seconds[i],
            verify_seconds=share,
        )  # fmt: skip
        outcomes.append(outcome)
        produced.append(tokens)
        own.append(row.policy.deciding + draft_seconds[i] + share)
    # Forwards in which a row had much to read take the others long too, which says nothing of what theirs take.
    reading = isinstance(drafter, ModelRows) and max(outcome.caught_up for outcome in outcomes) >= CAUGHT
    rest = max(perf_counter() - started - sum(own), 0.0) / count
    # A step whose draft read the prompt first says nothing of what a step takes.
    typical = [
        not ((row.history.step == 1 and o.caught_up > 1) or (reading and o.caught_up < CAUGHT))
        for row, o in zip(rows, outcomes, strict=True)
    ]
    forward = Forward(
        rows[0].history.level, count, tokens_read, rounds, sum(o.forwards for o in outcomes),
        sum(o.caught_up for o in outcomes), sum(own) + rest * count, sum(draft_seconds), verify_seconds,
    )  # fmt: skip
    asks.learn(rows, outcomes, [seconds + rest for seconds in own], typical, forward)
    return produced


def _draft(
    decoder: DecodingLoop, asks: RowsPolicy, drafter: RowDrafter | None, rows: list[Row], pads: bool
) -> tuple[list[float], int]:
    """Decide and draft for every row, one token for each row that still wants one at a time.

    Returns their seconds, and how many times a forward drafted.
    """
    seconds, rounds = [0.0] * len(rows), 0
    limits = [decoder.limit(row.remaining, row.history.context_length) for row in rows]
    wanted = asks.decide(rows, drafter, limits, pads)
    while wanted and drafter is not None:
        steps = [rows[i].step for i in wanted]
        rounds += any(step.lookups[-1] == 0.0 for step in steps)
        found = drafter.draft(wanted, [step.signals[len(step.tokens)] for step in steps])
        for i, (_, spent) in zip(wanted, found, strict=True):
            seconds[i] += spent
        there = [(i, token) for i, (token, _) in zip(wanted, found, strict=True) if token != NO_PROPOSAL]
        going = asks.add([rows[i] for i, _ in there], [token for _, token in there])
        wanted = [i for (i, _), goes in zip(there, going, strict=True) if goes]
    asks.submit(rows, drafter)
    return seconds, rounds


def _verify(
    target: BatchReader, drafter: RowDrafter | None, rows: list[Row], together: Together | None
) -> list[tuple[int, list[int]]]:
    """Read all drafts with the target: return for each row how many it agrees with, and the row's new tokens."""
    ids = [[row.sequence.tokens[-1], *row.step.tokens] for row in rows]
    if together is None and not any(row.sampled for row in rows):
        found = []
        for row, choices in zip(rows, target.choices(ids), strict=True):
            n, following = matching(row.step.tokens, choices)
            found.append((n, row.sequence.append([*row.step.tokens[:n], following])))
        return found
    logits = target.feed(ids)
    if together is not None:
        return together.settle(
            rows, logits, [[] if drafter is None else drafter.proposals(i) for i in range(len(rows))]
        )
    found = []
    for i, row in enumerate(rows):
        drafts = row.step.tokens
        proposals = drafter.proposals(i)[: len(drafts)] if row.sampled and drafter is not None else []
        found.append(row.sequence.settle(logits[i, : len(drafts) + 1], drafts, proposals))
    return found
