"""How others call the engine: the backend of a model that the engine runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from speckv_online.cpu_engine.batched_forward import batch_of
from speckv_online.cpu_engine.kernels.team import TEAM
from speckv_online.cpu_engine.notes import notes_of
from speckv_online.cpu_engine.target_forward import compiled_at_beginning, look_ahead, try_compiled_forward
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
        if more is None and (logits := try_compiled_forward(self.model, tokens, cache, keep)) is not None:
            return logits
        return super().forward(tokens, cache, keep, more)

    @property
    def threads(self) -> int:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        return TEAM.now

    def begin(self) -> None:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        look_ahead(self.model)

    def batch(self, prompts: list[list[int]], capacity: int, last_id: int | None = None) -> BatchReader:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        compiled = compiled_at_beginning(self.model)
        program = None if compiled is None or compiled.whole_prompts else compiled.program
        return batch_of(self.model, prompts, capacity, program, last_id)
