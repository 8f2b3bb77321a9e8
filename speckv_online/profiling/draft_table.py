"""What a drafter proposes at every position of a known output: one teacher-forced pass of the draft, and rollouts.

Up to its first mismatch a draft is what teacher forcing over the output gives, and beyond it depends only on where that
mismatch is. So rollouts are needed only from the mismatches of the teacher-forced pass. Those of drafters with a model
run as one batch; other drafters, and models with a quick form, draft them one by one, through the decoder's calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, N_SIGNALS, NGRAM
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter, is_pure
from speckv_online.errors import UserError
from speckv_online.lookup.ngram_index import NgramIndex
from speckv_online.modeling.kv_cache import KVCache

#: Rollouts that share one batch of the draft.
BATCH = 48
#: A row of a table under way: the signals, and how sure the drafter was beforehand where it made no forward.
LOOKUP, ROW = N_SIGNALS, N_SIGNALS + 1


@torch.inference_mode()
def draft_table(
    drafter: Drafter, prompt: Sequence[int], tokens: Sequence[int], gamma: int = MAX_GAMMA
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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
    lookups : ndarray of float32, shape (L, gamma), or None
        As in :class:`~speckv_online.traces.Trace`.
    """
    start, length = len(prompt), len(tokens)
    if start + length + gamma > drafter.max_length:
        raise UserError(
            f"a trace of {start} + {length} tokens and drafts of {gamma} does not fit into the draft's context of "
            f"{drafter.max_length}: shorten the prompt or the output"
        )
    if getattr(drafter, "online", False):
        raise UserError("a drafter that learns has no exact trace: freeze its gate")
    if not isinstance(drafter, ModelDrafter) or drafter.compiled is not None:
        drafts, table = _one_by_one(drafter, prompt, tokens, gamma)
        if not is_pure(drafter):
            return drafts, table[:, :, :LOOKUP], table[:, :, LOOKUP]
        table[:, :, NGRAM] = _ngram_signals(prompt, tokens, drafts)
        return drafts, table[:, :, :LOOKUP], None
    cache = KVCache(drafter.layers, start + length)
    ids = drafter.known(torch.tensor([[*prompt, *tokens]], device=drafter.model.device))
    logits = drafter.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=length + 1).logits[0]
    first, first_signals = _choose(drafter, logits)
    if isinstance(drafter, HybridDrafter):
        index = NgramIndex(prompt)
        for t, follows in enumerate([*tokens, 0]):
            first[t] = _look_up(drafter, index, int(first[t]), first_signals[t])
            index.extend([int(follows)])
    # The table's last row, position L, has no output to agree with: it is where drafts go on past an accepted end.
    wrong = np.append(np.flatnonzero(first[:length] != np.asarray(tokens)), length)
    batches = np.array_split(wrong, -(-len(wrong) // BATCH))
    text = [*prompt, *tokens]
    switch = [_roll_out(drafter, cache, text, start + w, first[w], gamma - 1) for w in batches]
    tail_tokens, tail_signals = (np.concatenate(part) for part in zip(*switch, strict=True))

    drafts, table = _fill(wrong, first, first_signals, tail_tokens, tail_signals, gamma)
    if isinstance(drafter, HybridDrafter):
        return drafts, table[:, :, :LOOKUP], table[:, :, LOOKUP]
    table[:, :, NGRAM] = _ngram_signals(prompt, tokens, drafts)
    return drafts, table[:, :, :LOOKUP], None


def _look_up(drafter: HybridDrafter, index: NgramIndex, token: int, row: np.ndarray) -> int:
    """Return what the drafter proposes where its model's likeliest token is this, and complete the (ROW,) row."""
    found = index.propose()
    row[LOOKUP] = drafter.skips(found)
    return drafter.choose(found, token, row)


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
    first, first_signals : ndarray, shape (L + 1,) and (L + 1, ROW)
    tail_tokens, tail_signals : ndarray, shape (m, gamma - 1) and (m, gamma - 1, ROW)
    gamma : int
        Longest draft.
    """
    length = len(first) - 1
    drafts = np.empty((length, gamma), dtype=np.int32)
    signals = np.empty((length, gamma, ROW), dtype=np.float32)
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
    first_signals = np.zeros((length + 1, ROW))
    wrong, switch, tail_signals = [], [], []
    drafter.begin(list(prompt), len(prompt) + length + gamma + 1)
    for t in range(length + 1):
        drafter.use("")
        first_signals[t, LOOKUP] = drafter.lookup_confidence()
        first[t] = drafter.draft(first_signals[t])
        if t == length or first[t] != tokens[t]:
            tail, signals = np.full(gamma - 1, NO_PROPOSAL), np.zeros((gamma - 1, ROW))
            j, token = 0, first[t]
            while token != NO_PROPOSAL and j < gamma - 1:
                signals[j, LOOKUP] = drafter.lookup_confidence()
                tail[j] = token = drafter.draft(signals[j])
                j += 1
            wrong.append(t)
            switch.append(tail)
            tail_signals.append(signals)
        drafter.end(0)
        if t < length:
            drafter.extend([int(tokens[t])])
    return _fill(np.array(wrong), first, first_signals, np.array(switch), np.array(tail_signals), gamma)


def _choose(drafter: ModelDrafter, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return greedy tokens (n,) and rows (n, ROW) of logits (n, rows of the head); what lookups tell stays zero."""
    logits = logits[:, : drafter.rows].float()
    top, rows = logits.topk(2).values, logits.argmax(-1, keepdim=True)  # the first of equals, as the decoder's
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1) / float(np.log(2))
    signals = np.zeros((len(logits), ROW), dtype=np.float32)
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
    signals : ndarray of float32, shape (m, steps, ROW)
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
    signals = np.empty((rows, steps, ROW), dtype=np.float32)
    prefixes = zip(lengths, seeds, strict=True) if isinstance(drafter, HybridDrafter) else ()
    indexes = [NgramIndex([*text[:n], int(seed)]) for n, seed in prefixes]
    last = seeds
    for j in range(steps):
        mask = torch.cat([mask, mask.new_ones((rows, 1))], dim=1)
        logits = drafter.model(
            input_ids=drafter.known(torch.as_tensor(last, device=device)[:, None]),
            attention_mask=mask,
            position_ids=torch.as_tensor(lengths + j, device=device)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        last, signals[:, j] = _choose(drafter, logits)
        for i, lookup in enumerate(indexes):  # of a hybrid drafter
            last[i] = _look_up(drafter, lookup, int(last[i]), signals[i, j])  # type: ignore[arg-type]
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
