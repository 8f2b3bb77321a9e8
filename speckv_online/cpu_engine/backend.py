"""How others call the engine: the backend of a model that the engine runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from speckv_online.cpu_engine.batched_forward import batch_of
from speckv_online.cpu_engine.notes import notes_of
from speckv_online.cpu_engine.target_forward import quick_of, read_on
from speckv_online.modeling.engine import EngineStatus
from speckv_online.modeling.forward_backend import BatchReader, PlainForward
from speckv_online.modeling.kv_cache import KVCache


class CompiledForward(PlainForward):
    """The backend of a model that the engine runs. What the engine does not know is the model's own forward."""

    @property
    def status(self) -> EngineStatus:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        return notes_of(self.model).status

    def forward(
        self, tokens: Sequence[int], cache: KVCache, keep: int, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        if more is None and (logits := read_on(self.model, tokens, cache, keep)) is not None:
            return logits
        return super().forward(tokens, cache, keep, more)

    def batch(self, prompts: list[list[int]], capacity: int, last_id: int | None = None) -> BatchReader:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        quick = quick_of(self.model)
        program = None if quick is None or quick.whole_prompts else quick.program
        return batch_of(self.model, prompts, capacity, program, last_id)
