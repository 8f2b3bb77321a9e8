"""A key-value cache for one sequence whose growth and cropping copy nothing.

transformers' ``DynamicCache`` concatenates, and so copies, the whole cache at every forward. Here a layer writes into
a buffer that doubles when it is full, attention reads a view of its used part, and cropping lowers a counter. Every
layer keeps all positions: the models' own masks implement sliding windows, so cropping is exact for them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, shape (1, heads, used, head_dim)."""

    is_sliding = False
    is_croppable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], self.capacity, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], self.capacity, value_states.shape[-1]))
        self.is_initialized = True

    def claim(self, count: int) -> int:
        """Count so many more tokens as used, with room for them; return where they begin."""
        start, self.used = self.used, self.used + count
        if self.used > self.capacity:
            self.capacity = max(2 * self.capacity, self.used)
            keys, values = self.keys, self.values
            self.lazy_initialization(keys, values)
            self.keys[..., :start, :], self.values[..., :start, :] = keys[..., :start, :], values[..., :start, :]
        return start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.claim(key_states.shape[-2])
        self.keys[..., start : self.used, :] = key_states
        self.values[..., start : self.used, :] = value_states
        return self.keys[..., : self.used, :], self.values[..., : self.used, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # what older versions of transformers call it

    def reset(self) -> None:
        self.used = 0


class KVCache(Cache):
    """Cache of one sequence for a decoder-only model with ``layers`` attention layers.

    Parameters
    ----------
    layers : int
        Number of layers of the model.
    capacity : int
        Tokens to make room for at first; the buffers grow when they have to.

    Attributes
    ----------
    given : int
        Tokens that it held before the decoder read anything, see :meth:`fill`.
    unseen : int
        How many of those, the first, are no part of the prompt's ids.
    before : list of int
        Ids of the unseen tokens where they are known, else empty: a drafter may read them.
    """

    def __init__(self, layers: int, capacity: int = 256) -> None:
        self._own = [_Layer(capacity) for _ in range(layers)]
        # Addresses of all layers' keys and values; where the first one's keys were then, and their capacity: layers
        # move at the same time, and grow when they do.
        self._addresses, self._there = np.empty((0, 2), np.int64), (0, 0)
        super().__init__(layers=list(self._own))
        self.given = self.unseen = 0
        self.before: list[int] = []

    @property
    def at_start(self) -> bool:
        """Whether the text's first forward is still to come."""
        return self._own[0].used == self.given

    def states(self, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Return views of each layer's keys and values from a token on; None for layers that keep none."""
        return [
            (x.keys[..., start : x.used, :], x.values[..., start : x.used, :]) if x.is_initialized else None
            for x in self._own
        ]

    def fill(self, states: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        """Hold these keys and values, each of shape (1, heads, tokens, size), in place of what it held."""
        for layer, found in zip(self._own, states, strict=True):
            layer.used = 0
            if found is not None:
                layer.update(*found)

    def __len__(self) -> int:
        return self._own[0].used

    def claim(self, count: int, heads: int, size: int) -> tuple[np.ndarray, int]:
        """Count so many more tokens as read, in fp32 on the CPU; return where the caller is to write them.

        Returns
        -------
        addresses : ndarray of int64, shape (layers, 2)
            Of each layer's keys and values, both contiguous, shape (1, heads, capacity, size). The same object until
            they move.
        capacity : int
        """
        first = self._own[0]
        fits = first.is_initialized and first.used + count <= first.capacity
        if fits and (first.keys.data_ptr(), first.capacity) == self._there:
            for layer in self._own:
                layer.used += count
            return self._addresses, first.capacity
        for layer in self._own:
            if not layer.is_initialized:
                one = torch.empty(1, heads, 1, size)
                layer.lazy_initialization(one, one)
            layer.claim(count)
        self._addresses = np.array([(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in self._own])
        self._there = first.keys.data_ptr(), first.capacity
        return self._addresses, first.capacity

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a longer length than the cache's own is an error."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate a cache of {len(self)} tokens to {length}")
        for layer in self._own:
            layer.used = length
        self.given = min(self.given, length)
