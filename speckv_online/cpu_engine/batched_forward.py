"""Several sequences at once through a :mod:`speckv_online.cpu_engine.llama_program`, each with a cache of its own.

It takes the place of :class:`~speckv_online.modeling.batched_model.BatchModel` on a CPU. Rows of one forward need not
be of one sequence, nor at the same place: nothing is padded, nothing masked, and each row has the same bits as in a
forward of its sequence alone.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from speckv_online.cpu_engine.llama_program import LlamaProgram
from speckv_online.cpu_engine.target_forward import MOST_PIECES, MOST_ROWS
from speckv_online.modeling.batched_model import BatchModel
from speckv_online.modeling.choices import likeliest
from speckv_online.modeling.kv_cache import KVCache


class CompiledBatch:
    """Sequences that a program reads.

    Parameters
    ----------
    program : LlamaProgram
    rows, capacity, last_id
        As :class:`~speckv_online.modeling.batched_model.BatchModel` has them, and so the attribute ``cached``.
    """

    pads = False

    def __init__(self, program: LlamaProgram, rows: int, capacity: int, last_id: int | None = None) -> None:
        self.program, self.last_id = program, last_id
        self._caches = [KVCache(program.layers, capacity) for _ in range(rows)]
        self.cached = [0] * rows

    def load(self, caches: list[KVCache]) -> None:
        """Go on from what these hold."""
        for own, cache in zip(self._caches, caches, strict=True):
            own.fill(cache.states())
        self.cached = [len(cache) for cache in caches]

    def store(self, row: int, cache: KVCache) -> None:
        """Let a cache hold what is known of a row."""
        self._caches[row].truncate(self.cached[row])
        cache.fill(self._caches[row].states())

    def feed(self, tokens: list[list[int]], last: bool = False) -> torch.Tensor:
        """Do what :meth:`speckv_online.modeling.batched_model.BatchModel.feed` does."""
        logits, lengths = self._read(tokens, last)
        if len(set(lengths)) == 1:
            return logits.view(len(tokens), -1, logits.shape[-1])
        return pad_sequence(list(logits.split(lengths)), batch_first=True)

    def choices(self, tokens: list[list[int]]) -> list[list[int]]:
        """Do what :meth:`speckv_online.modeling.batched_model.BatchModel.choices` does; nothing is copied."""
        logits, lengths = self._read(tokens, False)
        found, ends = likeliest(logits), [0, *accumulate(lengths)]
        return [found[start:end] for start, end in pairwise(ends)]

    def _read(self, tokens: list[list[int]], last: bool) -> tuple[torch.Tensor, list[int]]:
        """Return the logits of all rows below each other, and of how many tokens each row's are."""
        for cache, length in zip(self._caches, self.cached, strict=True):
            cache.truncate(length)
        if self.last_id is not None:
            tokens = [[min(token, self.last_id) for token in row] for row in tokens]
        lengths = [min(len(row), 1) if last else len(row) for row in tokens]
        logits = self.program.read_all(tokens, self._caches, max(lengths))
        self.cached = [len(cache) for cache in self._caches]
        return logits, lengths

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self._caches, self.cached = [self._caches[r] for r in rows], [self.cached[r] for r in rows]


def batch_of(
    model: PreTrainedModel,
    prompts: list[list[int]],
    capacity: int,
    program: LlamaProgram | None,
    last_id: int | None = None,
) -> BatchModel | CompiledBatch:
    """Return what reads sequences that begin with these prompts: the quick one, unless a prompt is too long for it."""
    if program is not None and max(map(len, prompts)) <= MOST_ROWS * MOST_PIECES and capacity <= program.most:
        return CompiledBatch(program, len(prompts), capacity, last_id)
    return BatchModel(model, len(prompts), capacity, last_id)
