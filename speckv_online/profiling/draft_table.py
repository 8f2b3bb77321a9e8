"""What a drafter proposes at every position of a known output, by the calls that the decoder makes.

Up to its first mismatch a draft is what the drafter says along the output, and beyond it depends only on where that
mismatch is, as a proposal depends on its prefix alone. So a whole draft is made only from each mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from policies.base import MAX_GAMMA, N_SIGNALS, NGRAM
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.model import is_pure
from speckv_online.errors import UserError
from speckv_online.lookup.ngram_index import NgramIndex

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
    length = len(tokens)
    first = np.empty(length + 1, dtype=np.int64)
    first_signals = np.zeros((length + 1, ROW))
    wrong, tails, tail_signals = [], [], []
    drafter.begin(list(prompt), start + length + gamma + 1)
    for t in range(length + 1):  # the end, too: drafts go on there past an accepted end
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
            tails.append(tail)
            tail_signals.append(signals)
        drafter.end(0)
        if t < length:
            drafter.extend([int(tokens[t])])
    drafts, table = _fill(np.array(wrong), first, first_signals, np.array(tails), np.array(tail_signals), gamma)
    if not is_pure(drafter):
        return drafts, table[:, :, :LOOKUP], table[:, :, LOOKUP]
    table[:, :, NGRAM] = _ngram_signals(prompt, tokens, drafts)
    return drafts, table[:, :, :LOOKUP], None


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


def _ngram_signals(prompt: Sequence[int], tokens: Sequence[int], drafts: np.ndarray) -> np.ndarray:
    """Return the n-gram signal of every drafted token, shape (L, G); a lookup knows its start's context only."""
    index, rows = NgramIndex(prompt), []
    for row, token in zip(drafts.tolist(), tokens, strict=True):
        rows.append([index.signal(row[:j], drafted) for j, drafted in enumerate(row)])
        index.extend([int(token)])
    return np.array(rows, dtype=np.float32)
