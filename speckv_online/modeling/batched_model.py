"""A model that decodes several sequences at once, each of its own length, over one key-value cache.

The cache's slot of a token is the token's position in its own sequence. A forward writes each row's keys where that row
goes on, and a mask lets a query see the slots up to its own: rows of any lengths share a forward without padding on the
left, a rejected draft is forgotten by moving its row's counter back, and whatever lies past a counter is overwritten
before anything may look at it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from speckv_online.errors import UserError
from speckv_online.modeling.choices import likeliest
from speckv_online.modeling.grouped_attention import GROUPED
from speckv_online.modeling.introspection import forward_arguments, longest_of, text_config
from speckv_online.modeling.kv_cache import KVCache

#: Longest piece of a prompt that is read in one forward: all rows are as wide as the widest.
CHUNK = 512


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, shape (batch, capacity, heads, head_dim)."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, owner: BatchCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, capacity = self.owner.rows, self.owner.capacity
        # Zeros, since a mask does not keep a NaN of uninitialised memory from spreading.
        self.keys = key_states.new_zeros((rows, capacity, key_states.shape[1], key_states.shape[3]))
        self.values = value_states.new_zeros((rows, capacity, value_states.shape[1], value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index, extent = self.owner.index, self.owner.extent
        self.keys[index] = key_states.transpose(1, 2)
        self.values[index] = value_states.transpose(1, 2)
        return self.keys[:, :extent].transpose(1, 2), self.values[:, :extent].transpose(1, 2)

    def put(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write a row's first tokens, shape (1, heads, tokens, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[row, : keys.shape[2]] = keys[0].transpose(0, 1)
        self.values[row, : keys.shape[2]] = values[0].transpose(0, 1)

    def get(self, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a row's first tokens, as :meth:`put` takes them."""
        if not self.is_initialized:
            return None
        return self.keys[row, :count].transpose(0, 1)[None], self.values[row, :count].transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.extent, 0

    def get_seq_length(self) -> int:
        return 0  # read for default positions only, and every forward is given its own

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # what older versions of transformers call it


class BatchCache(Cache):
    """Cache of ``rows`` sequences of at most ``capacity`` tokens."""

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.rows, self.capacity, self.extent = rows, capacity, 0
        self.index: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self.own = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self.own))

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.rows = len(rows)
        for layer in self.own:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class BatchModel:
    """A model and the cache of the sequences that it reads.

    Parameters
    ----------
    model : PreTrainedModel
        Decoder-only, with ``sdpa`` or ``eager`` attention.
    rows, capacity : int
        Number of sequences, and most tokens of any.
    last_id : int, optional
        Ids beyond it are read as it.

    Attributes
    ----------
    cached : list of int
        Tokens of each sequence that the cache holds.

    Raises
    ------
    UserError
        If the model's attention takes no mask.
    """

    pads = True

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, last_id: int | None = None) -> None:
        config = text_config(model)
        attention = config._attn_implementation
        if attention not in ("sdpa", "eager", GROUPED):
            raise UserError(f"batches need a mask, which {attention} attention does not take: load with sdpa or eager")
        self.model, self.device, self.additive = model, model.device, attention == "eager"
        # With room for what rows that wait write past their end.
        self.cache = BatchCache(int(config.num_hidden_layers), rows, capacity + min(CHUNK, capacity))
        self.last_id = last_id
        self.cached = [0] * rows
        self._last_position = longest_of(model) - 1
        self._arguments = forward_arguments(type(model))
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        # Models with two kinds of layers take a mask for each by name.
        self._by_name = "sliding_attention" in kinds
        self._window = window if self._by_name or not kinds else None

    def load(self, caches: list[KVCache]) -> None:
        """Go on from what these hold."""
        for row, cache in enumerate(caches):
            for layer, found in zip(self.cache.own, cache.states(), strict=True):
                if found is not None:
                    layer.put(row, *found)
        self.cached = [len(cache) for cache in caches]

    def store(self, row: int, cache: KVCache) -> None:
        """Let a cache hold what is known of a row."""
        cache.fill([layer.get(row, self.cached[row]) for layer in self.cache.own])

    def feed(self, tokens: list[list[int]], last: bool = False) -> torch.Tensor:
        """Read each row's next tokens; a row may have none.

        Returns
        -------
        Tensor, shape (rows, width, vocab)
            Logits after each token; entries past a row's own tokens mean nothing. With ``last`` width is 1: the logits
            after each row's last token.
        """
        longest = max(map(len, tokens))
        while longest > CHUNK:  # all rows end in the last piece
            pieces = [t[:CHUNK] if len(t) > CHUNK else [] for t in tokens]
            self._forward(pieces, 1)
            tokens = [t[len(p) :] for t, p in zip(tokens, pieces, strict=True)]
            longest = max(map(len, tokens))
        if not last:
            return self._forward(tokens, 0)
        ends = [max(len(t) - 1, 0) for t in tokens]
        places = sorted(set(ends))
        logits = self._forward(tokens, torch.tensor(places, device=self.device))
        if len(places) == 1:
            return logits
        which = torch.tensor([places.index(e) for e in ends], device=self.device)
        return logits[torch.arange(len(ends), device=self.device), which][:, None]

    def choices(self, tokens: list[list[int]]) -> list[list[int]]:
        """Read each row's next tokens; return the likeliest one after each of them."""
        found = likeliest(self.feed(tokens))
        return [row[: len(own)] for row, own in zip(found, tokens, strict=True)]

    def _forward(self, tokens: list[list[int]], keep: int | torch.Tensor) -> torch.Tensor:
        width = max(map(len, tokens))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in tokens], device=self.device)
        if self.last_id is not None:
            ids.clamp_(max=self.last_id)
        starts = torch.tensor(self.cached, device=self.device)
        slots = starts[:, None] + torch.arange(width, device=self.device)
        cache = self.cache
        cache.extent = max(self.cached) + width
        cache.index = (torch.arange(len(tokens), device=self.device)[:, None], slots)
        more = {"position_ids": slots.clamp(max=self._last_position), "logits_to_keep": keep}
        logits: torch.Tensor = self.model(
            input_ids=ids, attention_mask=self._masks(slots, cache.extent), past_key_values=cache, use_cache=True,
            **{name: value for name, value in more.items() if name in self._arguments},
        ).logits  # fmt: skip
        if "logits_to_keep" not in self._arguments:
            logits = logits[:, keep] if isinstance(keep, torch.Tensor) else logits[:, -keep:]
        self.cached = [c + len(t) for c, t in zip(self.cached, tokens, strict=True)]
        return logits

    def _masks(self, slots: torch.Tensor, extent: int) -> Any:
        """Return what each query may see: shape (rows, 1, width, extent), by kind of layer where there are two."""
        keys = torch.arange(extent, device=self.device)
        seen = keys <= slots[:, None, :, None]
        if self._window is None:
            return self._finish(seen)
        near = self._finish(seen & (keys > slots[:, None, :, None] - self._window))
        return {"full_attention": self._finish(seen), "sliding_attention": near} if self._by_name else near

    def _finish(self, seen: torch.Tensor) -> torch.Tensor:
        if not self.additive:
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.cache.keep(rows)
        self.cached = [self.cached[r] for r in rows]
