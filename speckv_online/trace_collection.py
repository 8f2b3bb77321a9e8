"""Collecting exact traces: one target generation, one teacher-forced draft pass, and batched rollouts of the draft.

Up to its first mismatch a draft is what teacher forcing over the output gives, and beyond it depends only on where that
mismatch is. So rollouts are needed only from the mismatches of the teacher-forced pass, and those run as one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, N_SIGNALS, NGRAM, Policy
from policies.fixed import Fixed
from speckv_online.decoding import SpeculativeDecoder
from speckv_online.drafters import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.kvcache import KVCache
from speckv_online.ngram import NgramIndex
from speckv_online.records import StepRecord
from speckv_online.traces import Trace, agreement, prompt_hash

#: Rollouts that share one batch of the draft.
BATCH = 48


def collect_trace(
    target: PreTrainedModel,
    drafter: ModelDrafter,
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
        The pair; the drafter is a draft model.
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
        budget=min(max_new_tokens, decoder.max_length - len(prompt)),
        finish=generation.finish,
        meta={"prompt_sha256": prompt_hash(prompt)} | dict(meta or {}),
    )
    return trace, generation.steps


def redraft(
    drafter: ModelDrafter,
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
        meta={"prompt_sha256": prompt_hash(trace.prompt.tolist())} | dict(meta or {}),
    )


def fingerprint(model: torch.nn.Module, sample: int = 4096) -> str:
    """Return a short hash of a model's tensors: names, types, shapes and an even sample of the bytes of each.

    A sample, since hashing all of a large model takes longer than tracing a prompt; retrained or requantized weights
    differ in every tensor.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{getattr(value, 'dtype', '')}:{tuple(getattr(value, 'shape', ()))};".encode())
        if isinstance(value, torch.Tensor) and value.numel():
            flat = value.detach().reshape(-1)
            flat = flat[:: max(1, flat.numel() // sample)].contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def draft_table(
    drafter: ModelDrafter, prompt: Sequence[int], tokens: Sequence[int], gamma: int = MAX_GAMMA
) -> tuple[np.ndarray, np.ndarray]:
    """Draft ``gamma`` tokens greedily from every position of an output.

    Parameters
    ----------
    drafter : ModelDrafter
        Its model must hold ``len(prompt) + len(tokens) + gamma`` tokens.
    prompt, tokens : sequence of int
        The context before the output, and the output, of L tokens.

    Returns
    -------
    drafts : ndarray of int32, shape (L, gamma)
    signals : ndarray of float32, shape (L, gamma, N_SIGNALS)
    """
    start, length = len(prompt), len(tokens)
    if start + length + gamma > drafter.max_length:
        raise UserError(
            f"a trace of {start} + {length} tokens and drafts of {gamma} does not fit into the draft's context of "
            f"{drafter.max_length}: shorten the prompt or the output"
        )
    layers = int(drafter.model.config.num_hidden_layers)
    cache = KVCache(layers, start + length)
    ids = torch.tensor([[*prompt, *tokens]], device=drafter.model.device)
    logits = drafter.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=length + 1).logits[0]
    first, first_signals = _choose(drafter, logits)
    # The table's last row, position L, has no output to agree with: it is where drafts go on past an accepted end.
    wrong = np.append(np.flatnonzero(first[:length] != np.asarray(tokens)), length)
    batches = np.array_split(wrong, -(-len(wrong) // BATCH))
    tails = [_roll_out(drafter, cache, start + w, first[w], gamma - 1) for w in batches]
    tail_tokens, tail_signals = (np.concatenate(part) for part in zip(*tails, strict=True))

    drafts = np.empty((length, gamma), dtype=np.int32)
    signals = np.empty((length, gamma, N_SIGNALS), dtype=np.float32)
    for t in range(length):
        stop = np.searchsorted(wrong, t)  # the first mismatch at or after t
        same = min(int(wrong[stop]) + 1 - t, gamma)
        drafts[t, :same], signals[t, :same] = first[t : t + same], first_signals[t : t + same]
        drafts[t, same:], signals[t, same:] = tail_tokens[stop, : gamma - same], tail_signals[stop, : gamma - same]
    signals[:, :, NGRAM] = _ngram_signals(prompt, tokens, drafts)
    return drafts, signals


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
    drafter: ModelDrafter, shared: KVCache, lengths: np.ndarray, seeds: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Continue several prefixes of one sequence, each with its own next token, as one left-padded batch.

    Parameters
    ----------
    shared : KVCache
        Keys and values of the whole sequence.
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
    # Keys carry their rotary position, so a prefix may sit anywhere in the cache: right-aligned, windows stay exact
    # too.
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
        tokens[:, j] = last
    return tokens, signals


def _ngram_signals(prompt: Sequence[int], tokens: Sequence[int], drafts: np.ndarray) -> np.ndarray:
    """Return the n-gram signal of every drafted token, shape (L, G); a lookup knows its start's context only."""
    index, rows = NgramIndex(prompt), []
    for row, token in zip(drafts.tolist(), tokens, strict=True):
        rows.append([index.signal(row[:j], drafted) for j, drafted in enumerate(row)])
        index.extend([int(token)])
    return np.array(rows, dtype=np.float32)
