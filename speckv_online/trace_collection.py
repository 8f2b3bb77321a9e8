"""Collecting exact traces: one target generation, one teacher-forced draft pass, and rollouts of the draft.

Up to its first mismatch a draft is what teacher forcing over the output gives, and beyond it depends only on where that
mismatch is. So rollouts are needed only from the mismatches of the teacher-forced pass. Those of drafters with a model
run as one batch; other drafters draft them one by one, through the calls that the decoder makes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, N_SIGNALS, NGRAM, Policy
from policies.fixed import Fixed
from speckv_online.decoding import SpeculativeDecoder
from speckv_online.drafters import NO_PROPOSAL, Drafter, ModelDrafter
from speckv_online.errors import UserError
from speckv_online.hybrid import HybridDrafter
from speckv_online.kvcache import KVCache
from speckv_online.ngram import NgramIndex
from speckv_online.records import StepRecord
from speckv_online.traces import Trace, agreement, prompt_hash

#: Rollouts that share one batch of the draft.
BATCH = 48


def collect_trace(
    target: PreTrainedModel,
    drafter: Drafter,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    level: str,
    policy: Policy | None = None,
    gamma: int = MAX_GAMMA,
    eos_ids: Collection[int] | None = None,
    task: str = "",
    prompt_id: str = "",
    split: str = "",
    meta: Mapping[str, Any] | None = None,
) -> tuple[Trace, list[StepRecord]]:
    """Generate greedily from a prompt and trace what the drafter would propose at every position.

    Parameters
    ----------
    target, drafter
        The pair. A drafter that learns cannot be traced: its drafts depend on what it has seen before.
    prompt : sequence of int
        Prompt tokens.
    max_new_tokens : int
        Budget of the generation.
    level : str
        Name of the target's compression level.
    policy : Policy, optional
        Decodes the output; it changes the time that this takes, not the output (but for near-ties of the target's
        logits that its kernels round differently at different widths). ``fixed:4`` by default.
    gamma : int
        Longest draft of the trace.
    eos_ids, task, prompt_id, split, meta
        As in :class:`~speckv_online.traces.Trace` and :meth:`~speckv_online.decoding.SpeculativeDecoder.generate`.

    Returns
    -------
    trace : Trace
    steps : list of StepRecord
        The timed steps of the generation, to fit a cost table to.
    """
    decoder = SpeculativeDecoder(drafter, policy=policy or Fixed(gamma=4), target=target, level=level)
    generation = decoder.generate(prompt, max_new_tokens, task=task, eos_ids=eos_ids)
    drafts, signals = draft_table(drafter, prompt, generation.tokens, gamma)
    tokens = np.array(generation.tokens, dtype=np.int32)
    trace = Trace(
        level=level,
        task=task,
        prompt_id=prompt_id,
        split=split,
        prompt=np.array(prompt, dtype=np.int32),
        tokens=tokens,
        drafts=drafts,
        accepted=agreement(drafts, tokens),
        signals=signals,
        budget=min(max_new_tokens, decoder.room(prompt)),
        finish=generation.finish,
        meta={"prompt_sha256": prompt_hash(prompt), "drafter": drafter.names[0]} | dict(meta or {}),
    )
    return trace, generation.steps


def redraft(
    drafter: Drafter,
    trace: Trace,
    *,
    task: str,
    prompt_id: str,
    split: str,
    meta: Mapping[str, Any] | None = None,
) -> Trace:
    """Return the trace of another drafter over the output of an earlier trace: no target is needed."""
    drafts, signals = draft_table(drafter, trace.prompt.tolist(), trace.tokens.tolist(), trace.gamma)
    return replace(
        trace,
        drafts=drafts,
        accepted=agreement(drafts, trace.tokens),
        signals=signals,
        task=task,
        prompt_id=prompt_id,
        split=split,
        meta={"prompt_sha256": prompt_hash(trace.prompt.tolist()), "drafter": drafter.names[0]} | dict(meta or {}),
    )


@torch.inference_mode()
def draft_table(
    drafter: Drafter, prompt: Sequence[int], tokens: Sequence[int], gamma: int = MAX_GAMMA
) -> tuple[np.ndarray, np.ndarray]:
    """Draft ``gamma`` tokens greedily from every position of an output.

    Parameters
    ----------
    drafter : Drafter
        It must hold ``len(prompt) + len(tokens) + gamma`` tokens.
    prompt, tokens : sequence of int
        The context before the output, and the output, of L tokens.

    Returns
    -------
    drafts : ndarray of int32, shape (L, gamma)
        -1 from where the drafter has nothing to propose.
    signals : ndarray of float32, shape (L, gamma, N_SIGNALS)
    """
    start, length = len(prompt), len(tokens)
    if start + length + gamma > drafter.max_length:
        raise UserError(
            f"a trace of {start} + {length} tokens and drafts of {gamma} does not fit into the draft's context of "
            f"{drafter.max_length}: shorten the prompt or the output"
        )
    if getattr(drafter, "online", False):
        raise UserError("a drafter that learns has no exact trace: freeze its gate")
    if not isinstance(drafter, ModelDrafter):
        return _one_by_one(drafter, prompt, tokens, gamma)
    cache = KVCache(drafter.layers, start + length)
    ids = torch.tensor([[*prompt, *tokens]], device=drafter.model.device)
    logits = drafter.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=length + 1).logits[0]
    first, first_signals = _choose(drafter, logits)
    if isinstance(drafter, HybridDrafter):
        index = NgramIndex(prompt)
        for t, follows in enumerate([*tokens, 0]):
            first[t] = drafter.choose(index.propose(), int(first[t]), first_signals[t])
            index.extend([int(follows)])
    # The table's last row, position L, has no output to agree with: it is where drafts go on past an accepted end.
    wrong = np.append(np.flatnonzero(first[:length] != np.asarray(tokens)), length)
    batches = np.array_split(wrong, -(-len(wrong) // BATCH))
    text = [*prompt, *tokens]
    tails = [_roll_out(drafter, cache, text, start + w, first[w], gamma - 1) for w in batches]
    tail_tokens, tail_signals = (np.concatenate(part) for part in zip(*tails, strict=True))

    drafts, signals = _fill(wrong, first, first_signals, tail_tokens, tail_signals, gamma)
    if not isinstance(drafter, HybridDrafter):
        signals[:, :, NGRAM] = _ngram_signals(prompt, tokens, drafts)
    return drafts, signals


def _fill(
    wrong: np.ndarray,
    first: np.ndarray,
    first_signals: np.ndarray,
    tail_tokens: np.ndarray,
    tail_signals: np.ndarray,
    gamma: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Put a table together from the first proposal at every position, and how drafts go on after a wrong one.

    Parameters
    ----------
    wrong : ndarray of int, shape (m,)
        Positions whose first proposal is not the output's token, the end L of the output among them.
    first, first_signals : ndarray, shape (L + 1,) and (L + 1, N_SIGNALS)
    tail_tokens, tail_signals : ndarray, shape (m, gamma - 1) and (m, gamma - 1, N_SIGNALS)
    gamma : int
        Longest draft.
    """
    length = len(first) - 1
    drafts = np.empty((length, gamma), dtype=np.int32)
    signals = np.empty((length, gamma, N_SIGNALS), dtype=np.float32)
    for t in range(length):
        stop = np.searchsorted(wrong, t)  # the first mismatch at or after t
        same = min(int(wrong[stop]) + 1 - t, gamma)
        drafts[t, :same], signals[t, :same] = first[t : t + same], first_signals[t : t + same]
        drafts[t, same:], signals[t, same:] = tail_tokens[stop, : gamma - same], tail_signals[stop, : gamma - same]
    return drafts, signals


def _one_by_one(
    drafter: Drafter, prompt: Sequence[int], tokens: Sequence[int], gamma: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the table from a drafter's own calls, relying on each proposal to depend on its prefix alone."""
    length = len(tokens)
    first = np.empty(length + 1, dtype=np.int64)
    first_signals = np.zeros((length + 1, N_SIGNALS))
    wrong, tails, tail_signals = [], [], []
    drafter.begin(list(prompt), len(prompt) + length + gamma + 1)
    for t in range(length + 1):
        drafter.use("")
        first[t] = drafter.draft(first_signals[t])
        if t == length or first[t] != tokens[t]:
            tail, signals = np.full(gamma - 1, NO_PROPOSAL), np.zeros((gamma - 1, N_SIGNALS))
            j, token = 0, first[t]
            while token != NO_PROPOSAL and j < gamma - 1:
                tail[j] = token = drafter.draft(signals[j])
                j += 1
            wrong.append(t)
            tails.append(tail)
            tail_signals.append(signals)
        drafter.end(0)
        if t < length:
            drafter.extend([int(tokens[t])])
    return _fill(np.array(wrong), first, first_signals, np.array(tails), np.array(tail_signals), gamma)


def _choose(drafter: ModelDrafter, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return greedy tokens (n,) and signals (n, N_SIGNALS) of logits (n, rows); the n-gram column stays zero."""
    logits = logits[:, : drafter.rows].float()
    top, rows = logits.topk(2)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1) / float(np.log(2))
    signals = np.zeros((len(logits), N_SIGNALS), dtype=np.float32)
    signals[:, ENTROPY] = entropy.cpu()
    signals[:, CONFIDENCE] = log_p.gather(-1, rows[:, :1]).exp()[:, 0].cpu()
    signals[:, MARGIN] = (top[:, 0] - top[:, 1]).cpu()
    tokens = rows[:, 0].cpu().numpy()
    return tokens if drafter.head_ids is None else np.asarray(drafter.head_ids)[tokens], signals


def _roll_out(
    drafter: ModelDrafter, shared: KVCache, text: list[int], lengths: np.ndarray, seeds: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Continue several prefixes of one sequence, each with its own next token, as one left-padded batch.

    Parameters
    ----------
    shared : KVCache
        Keys and values of the whole sequence, ``text``.
    lengths, seeds : ndarray of int, shape (m,)
        Tokens of each prefix, and the token that follows it.
    steps : int
        Tokens to add after the seeds.

    Returns
    -------
    tokens : ndarray of int, shape (m, steps)
    signals : ndarray of float32, shape (m, steps, N_SIGNALS)
    """
    rows, longest, device = len(lengths), int(lengths.max()), drafter.model.device
    # Keys carry their rotary position, so a prefix may sit anywhere; right-aligned, sliding windows stay exact too.
    source = np.arange(longest) - (longest - lengths[:, None])
    index = torch.from_numpy(source.clip(min=0)).to(device)
    cache = KVCache(len(shared.layers), longest + steps)
    pairs: list[tuple[Any, Any]] = list(zip(cache.layers, shared.layers, strict=True))
    for own, layer in pairs:
        keys, values = (t[0, :, : layer.used] for t in (layer.keys, layer.values))
        own.update(keys[:, index].transpose(0, 1), values[:, index].transpose(0, 1))
    mask = torch.from_numpy((source >= 0).astype(np.int64)).to(device)
    tokens = np.empty((rows, steps), dtype=np.int64)
    signals = np.empty((rows, steps, N_SIGNALS), dtype=np.float32)
    prefixes = zip(lengths, seeds, strict=True) if isinstance(drafter, HybridDrafter) else ()
    indexes = [NgramIndex([*text[:n], int(seed)]) for n, seed in prefixes]
    last = seeds
    for j in range(steps):
        mask = torch.cat([mask, mask.new_ones((rows, 1))], dim=1)
        logits = drafter.model(
            input_ids=torch.as_tensor(last, device=device)[:, None],
            attention_mask=mask,
            position_ids=torch.as_tensor(lengths + j, device=device)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        last, signals[:, j] = _choose(drafter, logits)
        for i, lookup in enumerate(indexes):  # of a hybrid drafter
            last[i] = drafter.choose(lookup.propose(), int(last[i]), signals[i, j])  # type: ignore[attr-defined]
            lookup.extend([int(last[i])])
        tokens[:, j] = last
    return tokens, signals


def _ngram_signals(prompt: Sequence[int], tokens: Sequence[int], drafts: np.ndarray) -> np.ndarray:
    """Return the n-gram signal of every drafted token, shape (L, G); a lookup knows its start's context only."""
    index, rows = NgramIndex(prompt), []
    for row, token in zip(drafts.tolist(), tokens, strict=True):
        rows.append([index.signal(row[:j], drafted) for j, drafted in enumerate(row)])
        index.extend([int(token)])
    return np.array(rows, dtype=np.float32)
