"""A key-value cache that stays where it is, so that graphs can be recorded over it, and how a graph sees it.

A graph's attention reads a *window* of the cache, of a fixed length, behind a mask. Windows are powers of two times
128, so that a few graphs serve all lengths, and a short text does not pay for a long one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from policies.base import MAX_GAMMA
from speckv_online.modeling.kv_cache import KVCache

#: Most tokens that a graph reads: a verification of the longest draft.
MAX_WIDTH = MAX_GAMMA + 1
#: Shortest window, and shortest cache.
SHORTEST, LEAST_CAPACITY = 128, 1024
#: Numbers before the tokens in :attr:`Room.inputs`: where they begin in the text, and how many drafts there are.
HEAD = 2


def bucket(length: int) -> int:
    """Return the shortest window that holds so many tokens."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


class Room:
    """Memory on the device for one text at a time, and the graphs that were recorded over it.

    Parameters
    ----------
    layers, heads, size : int
        Attention layers of the model, heads of keys, and numbers per head.
    capacity : int
        Most tokens; it is rounded up to a window.
    outputs : int
        Rows of the model's head.
    dtype, device
        Of keys and values.

    Attributes
    ----------
    inputs : Tensor of int64, shape (HEAD + MAX_WIDTH,)
        The position of the first token to read, the number of drafts in ``found``, and the tokens.
    logits : Tensor of float32, shape (MAX_WIDTH, outputs)
        A graph's answer; the next graph overwrites it.
    found : Tensor of float32, shape (MAX_GAMMA, 5)
        Drafts and what is known of them, as :func:`~speckv_online.modeling.device_signals.device_signals` has it.
    version : int
        Of the model as the graphs know it; their owner's affair.
    """

    def __init__(
        self, layers: int, heads: int, size: int, capacity: int, outputs: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = max(LEAST_CAPACITY, bucket(capacity))
        shape = layers, 1, heads, self.capacity, size
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.inputs = torch.zeros(HEAD + MAX_WIDTH, dtype=torch.int64, device=device)
        self.start, self.cursor, self.ids = self.inputs[:1], self.inputs[1:HEAD], self.inputs[HEAD:]
        self.logits = torch.zeros(MAX_WIDTH, outputs, device=device)
        self.found = torch.zeros(MAX_GAMMA, 5, device=device)
        self.steps, self.slots = torch.arange(MAX_WIDTH, device=device), torch.arange(self.capacity, device=device)
        self.graphs: dict[tuple[Any, ...], Callable[[], None]] = {}
        self.version = 0

    def clear(self) -> None:
        """Forget what the cache holds: a mask hides numbers, but not those that are none."""
        self.keys.zero_()
        self.values.zero_()

    def mask(self, positions: torch.Tensor, window: int) -> torch.Tensor:
        """Return what is added to the scores of tokens at these positions: 0, or minus infinity for later tokens."""
        hidden = self.slots[None, :window] > positions[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=hidden.device)
        return zeros.masked_fill(hidden, float("-inf"))[None, None]


class StaticKVCache(KVCache):
    """The cache of one text in a room. Any forward may use it; one that grows out of its room has left it for good.

    Attributes
    ----------
    room : Room
    """

    def __init__(self, room: Room) -> None:
        super().__init__(len(room.keys), room.capacity)
        self.room = room
        for layer, keys, values in zip(self._own, room.keys, room.values, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device

    @property
    def left(self) -> bool:
        """True if the cache has outgrown its room, and is elsewhere."""
        return self._own[0].capacity != self.room.capacity

    def advance(self, count: int) -> None:
        """Count so many more tokens as read: a graph has written them."""
        for layer in self._own:
            layer.used += count


class _Window(CacheLayerMixin):
    """A layer's keys and values as a graph sees them: written at positions that the device knows, read as a window."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int) -> None:
        super().__init__()
        self.keys, self.values, self.window, self.is_initialized = keys, values, window, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do: the room has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys[:, :, : self.window], self.values[:, :, : self.window]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window, 0

    def get_seq_length(self) -> int:
        return 0  # on the device; positions and mask are given from outside

    def get_max_length(self) -> int:
        return self.window

    get_max_cache_shape = get_max_length  # what older versions of transformers call it


class WindowCache(Cache):
    """A room as a graph with a window of so many tokens sees it."""

    def __init__(self, room: Room, window: int) -> None:
        self._windows = [_Window(k, v, window) for k, v in zip(room.keys, room.values, strict=True)]
        super().__init__(layers=list(self._windows))

    def aim(self, positions: torch.Tensor) -> WindowCache:
        """Have the coming forward write at these positions."""
        for layer in self._windows:
            layer.positions = positions
        return self
