"""A draft model that is read through graphs, several tokens in a row, with one transfer for all of them.

A policy that is asked after every token needs that token's signals on the host. Asking the device for each costs a
round trip per token. Here a chunk of tokens is drafted at once, and their signals come back together. The policy is
still asked token by token; what was drafted beyond its stop is dropped. In greedy decoding a draft depends on the
tokens before it alone, so the drafts that are kept are the same. A drawn token must not be dropped for what it is: in
sampled decoding there are no chunks.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import LOOKUP, MAX_GAMMA, NGRAM
from speckv_online.drafters.base import write_draft_signals
from speckv_online.drafters.model import ModelDrafter
from speckv_online.gpu_engine.graph_capture import GraphCapture
from speckv_online.gpu_engine.graphed_draft import GraphedDraft
from speckv_online.gpu_engine.static_cache import StaticKVCache
from speckv_online.modeling.sampling import Sampler

#: Tokens of a chunk.
CHUNK = 3


class ChunkedDrafter(ModelDrafter):
    """Drafts as :class:`~speckv_online.drafters.model.ModelDrafter` does, through graphs and by the chunk.

    Where the model cannot be read through graphs it is that drafter.

    Parameters
    ----------
    model, vocab_size, head_ids
        As there.
    capture : GraphCapture, optional
        As for :class:`~speckv_online.gpu_engine.graphed_llama.GraphedLlama`.
    chunk : int
        Tokens that are drafted at once where a policy is asked after each; 1 is a round trip per token.

    Attributes
    ----------
    graphs : GraphedDraft
    """

    pure = True

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        capture: GraphCapture | None = None,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(model, vocab_size, head_ids)
        if not 1 <= chunk <= MAX_GAMMA:
            raise ValueError(f"a chunk has from 1 to {MAX_GAMMA} tokens, got {chunk}")
        self.chunk = chunk
        self.graphs = GraphedDraft(model, self.rows, self._head_ids, self.last_id, capture)

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence; nothing is fed to the model before the first draft."""
        super().begin(tokens, capacity, sampler)  # which lets go of the last text's cache
        self.graphs.follow(self._head_ids, self.last_id)
        cache = self.graphs.cache(capacity + self.chunk)
        if cache is not None:
            self.cache = cache
        #: Drafted tokens that nobody has asked for yet, and what is known of them.
        self._waiting = deque[list[float]]()
        self._dropped, self._gamma = 0, MAX_GAMMA

    @property
    def unused(self) -> int:
        """Forwards of this step whose tokens nobody has asked for."""
        return self._dropped + len(self._waiting)

    def plan(self, gamma: int) -> None:
        """Draft no more than so many tokens in this step."""
        self._gamma = gamma

    def use(self, name: str) -> str:
        """Switch between the drafters of ``names`` until the step ends."""
        if super().use(name) == LOOKUP:
            self._drop()
        return self.kind

    def logits(self) -> torch.Tensor:
        """Feed what the cache lacks and return the next token's logits, shape (rows of the head,), in fp32."""
        unread = self.unread()
        if not self.graphs.takes(self.cache, len(unread)):
            return super().logits()
        return self.graphs.read(self._known(unread), self._static(), 1)[0, : self.rows].float()

    def draft_async(self, count: int) -> torch.Tensor:
        """See :meth:`~speckv_online.drafters.model.ModelDrafter.draft_async`."""
        found = self._draft_there(count)
        return super().draft_async(count) if found is None else found

    def draft(self, signals: np.ndarray) -> int:
        """Draft one token; its signals are entropy (bits), confidence, margin (logits) and n-gram agreement."""
        if self.kind == LOOKUP or self.sampler is not None:
            return super().draft(signals)
        if not self._waiting:
            found = self._draft_there(max(1, min(self.chunk, self._gamma - len(self.drafted))))
            if found is None:
                return super().draft(signals)
            self._waiting.extend(found.tolist())
        row, *looked = self._waiting.popleft()
        token = int(row)
        write_draft_signals(looked, signals)
        signals[NGRAM] = self.ngrams.signal(self.drafted, token)
        self.proposals.append(None)
        self.drafted.append(token)
        return token

    def end(self, accepted: int) -> None:
        """Drop the cache entries of rejected drafts, and of those that nobody asked for."""
        self._waiting.clear()
        self._dropped, self._gamma = 0, MAX_GAMMA
        super().end(accepted)

    def _drop(self) -> None:
        """Forget the drafts that nobody has asked for."""
        self._dropped += len(self._waiting)
        self._waiting.clear()
        self.cache.truncate(min(len(self.cache), len(self.context) + len(self.drafted)))

    def _draft_there(self, count: int) -> torch.Tensor | None:
        """Draft through graphs what follows all that is known; None where that cannot be done."""
        unread = self.unread()
        if count > MAX_GAMMA or not self.graphs.takes(self.cache, len(unread)):
            return None
        cache = self._static()
        if len(cache) + len(unread) + count - 1 > cache.room.capacity:
            return None
        return self.graphs.draft(self._known(unread), cache, count)

    def _static(self) -> StaticKVCache:
        assert isinstance(self.cache, StaticKVCache)
        return self.cache

    def _known(self, ids: list[int]) -> list[int]:
        return ids if self.last_id is None else [min(token, self.last_id) for token in ids]
