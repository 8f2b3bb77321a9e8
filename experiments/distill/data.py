"""Generated conversations as training batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speckv_online.errors import UserError

FORCED, USER, ANSWER = 0, 1, 2


@dataclass
class Conversations:
    """Conversations in flat arrays; conversation ``i`` is the slice ``offsets[i]:offsets[i + 1]``.

    Attributes
    ----------
    ids : ndarray of uint16, shape (tokens,)
    role : ndarray of uint8, shape (tokens,)
        0 forced, 1 sampled user turn, 2 greedy answer.
    hidden : ndarray of float16, shape (tokens, hidden)
        The target's final normed state that predicts ``ids[i]``; zero for forced tokens.
    offsets : ndarray of int64, shape (conversations + 1,)
    """

    ids: np.ndarray
    role: np.ndarray
    hidden: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens per conversation."""
        return np.diff(self.offsets)


def load_conversations(folder: Path, shards: int | None = None) -> Conversations:
    """Read the first ``shards`` shards of a folder (all by default)."""
    paths = sorted(folder.glob("shard-*.npz"))[:shards]
    if not paths:
        raise UserError(f"no conversations in {folder}: run the stage generate first")
    ids, role, hidden, offsets, base = [], [], [], [np.zeros(1, np.int64)], 0
    for path in paths:
        with np.load(path, allow_pickle=False) as z:
            ids.append(z["ids"])
            role.append(z["role"])
            hidden.append(z["hidden"])
            offsets.append(z["offsets"][1:] + base)
            base += int(z["offsets"][-1])
    return Conversations(*(np.concatenate(parts) for parts in (ids, role, hidden, offsets)))


def split(count: int, holdout_every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training and of held-out conversations; stable as conversations are added."""
    held = np.arange(count) % holdout_every == holdout_every - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def choose_head_ids(data: Conversations, vocabulary: int, size: int, always: Sequence[int]) -> np.ndarray:
    """Return, sorted, the ids that the draft may propose: ``always``, and the most frequent ones of the conversations.

    Answers count double. User turns count too because answers repeat words of the prompt: on unseen prompts this covers
    more of the tokens of the target than counting answers alone.
    """
    counts = 2 * np.bincount(data.ids[data.role == ANSWER], minlength=vocabulary).astype(np.int64)
    counts += np.bincount(data.ids[data.role == USER], minlength=vocabulary)
    counts[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


@dataclass
class Batch:
    """Rows of ``system turn + conversation``, padded on the right.

    Attributes
    ----------
    inputs : LongTensor, shape (rows, length)
    where : LongTensor, shape (positions,)
        Indices into the flattened outputs that have a teacher.
    teacher : FloatTensor, shape (positions, hidden)
    answer : BoolTensor, shape (positions,)
        True in an answer, False in a user turn.
    ids : LongTensor, shape (positions,)
        The ids that came next; in an answer they are the target's argmax.
    """

    inputs: torch.Tensor
    where: torch.Tensor
    teacher: torch.Tensor
    answer: torch.Tensor
    ids: torch.Tensor


def make_batch(data: Conversations, chosen: np.ndarray, prefix: Sequence[int]) -> Batch:
    """Pad some conversations to a batch. Causal attention never looks at padding on the right, so no mask is needed."""
    n, lead = len(chosen), len(prefix)
    width = lead + int(data.lengths()[chosen].max()) - 1
    inputs = np.zeros((n, width), np.int64)
    inputs[:, :lead] = prefix
    where, rows = [], []
    for r, c in enumerate(chosen):
        a, b = data.offsets[c], data.offsets[c + 1]
        inputs[r, lead : lead + b - a - 1] = data.ids[a : b - 1]
        taught = np.flatnonzero(data.role[a:b] != FORCED)
        where.append(r * width + lead - 1 + taught)
        rows.append(a + taught)
    flat = np.concatenate(rows)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(np.concatenate(where)),
        torch.from_numpy(data.hidden[flat].astype(np.float32)),
        torch.from_numpy(data.role[flat] == ANSWER),
        torch.from_numpy(data.ids[flat].astype(np.int64)),
    )


def plan_batches(lengths: np.ndarray, batch_tokens: int, lead: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut a shuffled epoch into batches of similar lengths; return positions into ``lengths``."""
    order = rng.permutation(len(lengths))
    plan: list[np.ndarray] = []
    for pool in np.array_split(order, max(1, len(order) // 1000)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        start = 0
        for end in range(1, len(pool) + 1):
            full = end == len(pool) or (end + 1 - start) * (lead + lengths[pool[end]]) > batch_tokens
            if full:
                plan.append(pool[start:end])
                start = end
    return [plan[i] for i in rng.permutation(len(plan))]


def epoch_batches(
    data: Conversations, chosen: np.ndarray, prefix: Sequence[int], batch_tokens: int, seed: Sequence[int]
) -> Iterator[Batch]:
    """Yield the batches of one epoch; the same seed gives the same batches."""
    plan = plan_batches(data.lengths()[chosen], batch_tokens, len(prefix), np.random.default_rng(list(seed)))
    for rows in plan:
        yield make_batch(data, chosen[rows], prefix)
