"""A draft model that drafts several tokens in a row through graphs, without a word to the host in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from speckv_online.gpu_engine.graph_capture import GraphCapture
from speckv_online.gpu_engine.graphed_llama import GraphedLlama
from speckv_online.gpu_engine.static_cache import Room, StaticKVCache, bucket
from speckv_online.modeling.device_signals import device_signals


class GraphedDraft(GraphedLlama):
    """Reads a draft model through graphs, and drafts greedily in them.

    Parameters
    ----------
    model : PreTrainedModel
    rows : int
        Rows of its head that may be proposed.
    head_ids : Tensor, optional
        The token of each row.
    last_id : int, optional
        The largest token that the model can read; larger ones are read as it.
    capture : GraphCapture, optional
        As for :class:`GraphedLlama`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        head_ids: torch.Tensor | None,
        last_id: int | None,
        capture: GraphCapture | None = None,
    ) -> None:
        super().__init__(model, capture)
        self._rows, self._head_ids, self._last_id = rows, head_ids, last_id

    def follow(self, head_ids: torch.Tensor | None, last_id: int | None) -> None:
        """Take note of what may have changed with the model's weights; to be called before :meth:`cache`."""
        self._head_ids, self._last_id = head_ids, last_id

    @torch.inference_mode()
    def draft(self, ids: list[int], cache: StaticKVCache, count: int) -> torch.Tensor | None:
        """Read tokens, then draft; the cache then holds all of them but the last draft.

        Parameters
        ----------
        ids : list of int
            At least one.
        cache : StaticKVCache
            For which :meth:`takes` has said yes to all that is to be read.
        count : int
            From 1 to 16.

        Returns
        -------
        Tensor, shape (count, 5), on the device, or None
            As :func:`~speckv_online.modeling.device_signals.device_signals` has them. None where a graph cannot be
            recorded: then nothing was read.
        """
        room, width, end = cache.room, len(ids), len(cache) + len(ids) + count - 1
        window = bucket(end)
        self._send(ids, cache)
        graphs = []
        for n in (width, *[1] * (count - 1)):
            graph = self._graph(room, ("draft", n, window), partial(self._drafter, room, n, window))
            if graph is None:
                return None
            graphs.append(graph)
        for graph in graphs:
            graph()
        cache.advance(width + count - 1)
        return room.found[:count].clone()

    def _record(self, cache: StaticKVCache, ids: list[int]) -> None:
        """Record what reads these tokens and drafts in a step."""
        self.draft(ids, cache, 1)
        cache.truncate(len(cache) - len(ids))
        self.read(ids, cache, 1)

    def _drafter(self, room: Room, count: int, window: int) -> Callable[[], None]:
        """Return the function of a graph that reads the inputs' first tokens and drafts the next one.

        It leaves the inputs so that a graph of one token goes on from there.
        """
        forward, rows = self._forward(room, count, 1, window), self._rows
        head_ids, last_id = self._head_ids, self._last_id

        def body() -> None:
            token, found = device_signals(forward()[0, :rows].float(), head_ids)
            room.found.index_copy_(0, room.cursor, found[None])
            room.ids[:1].copy_(token if last_id is None else token.clamp(max=last_id))
            room.start.add_(count)
            room.cursor.add_(1)

        return body
