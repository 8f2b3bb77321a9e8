"""How decoding and drafters run a model: one interface, over plain transformers modules or the CPU engine.

:func:`backend_of` finds the backend of a model. The engine in ``speckv_online/cpu_engine/`` leaves its own on the
models that it runs. All other models have :class:`PlainForward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from speckv_online.modeling.batched_model import BatchModel
from speckv_online.modeling.engine import EngineStatus
from speckv_online.modeling.introspection import forward_arguments, is_known
from speckv_online.modeling.kv_cache import KVCache

#: Status of a model that nobody gave to the engine.
UNTOUCHED = EngineStatus(False, "plain transformers modules: not loaded with the engine")


class BatchReader(Protocol):
    """Reads several sequences at once. :class:`~speckv_online.modeling.batched_model.BatchModel` says how."""

    #: Whether all rows of a forward are as wide as the widest.
    pads: bool
    #: Tokens of each sequence that are read.
    cached: list[int]

    def feed(self, tokens: list[list[int]], last: bool = False) -> torch.Tensor:
        """Read each row's next tokens; return logits, shape (rows, width, vocab)."""

    def choices(self, tokens: list[list[int]]) -> list[list[int]]:
        """Read each row's next tokens; return the likeliest one after each of them."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""

    def load(self, caches: list[KVCache]) -> None:
        """Go on from what these caches hold, one for each row."""

    def store(self, row: int, cache: KVCache) -> None:
        """Write a row into a cache."""


class ForwardBackend(Protocol):
    """Runs one model: a sequence with a cache, or several sequences at once."""

    @property
    def status(self) -> EngineStatus:
        """Whether the CPU engine runs the model."""

    def forward(
        self, tokens: Sequence[int], cache: KVCache, keep: int, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read tokens into a cache.

        Parameters
        ----------
        tokens : sequence of int
        cache : KVCache
        keep : int
            How many of the last tokens' logits are wanted.
        more : Tensor, shape (n,), optional
            Tokens behind those, which may still be on a device.

        Returns
        -------
        Tensor, shape (keep, rows of the head)
        """

    @property
    def threads(self) -> int:
        """How many threads forwards run on now, where their number may change by itself; else 0."""

    def begin(self) -> None:
        """Look at the model before a text is decoded: somebody may have changed it since the one before."""

    def batch(self, prompts: list[list[int]], capacity: int, last_id: int | None = None) -> BatchReader:
        """Return what reads sequences that begin with these prompts and hold up to ``capacity`` tokens.

        Token ids beyond ``last_id`` are read as it.
        """


class CompiledForward(ForwardBackend, Protocol):
    """A draft in another form than its model's, on the host. It finds what signals are made of by itself."""

    def draft_signals(self, logits: torch.Tensor) -> tuple[int, float, float, float, float]:
        """Return what :func:`speckv_online.drafters.base.draft_signals` finds in one row of logits."""


class PlainForward:
    """The backend of plain transformers modules.

    Parameters
    ----------
    model : PreTrainedModel
    status : EngineStatus
        Why the engine does not run the model.
    """

    def __init__(self, model: PreTrainedModel, status: EngineStatus = UNTOUCHED) -> None:
        self.model, self._status = model, status

    @property
    def status(self) -> EngineStatus:
        """See :class:`ForwardBackend`."""
        return self._status

    def forward(
        self, tokens: Sequence[int], cache: KVCache, keep: int, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`ForwardBackend`."""
        parts = [torch.tensor([list(tokens)], device=self.model.device)] if tokens or more is None else []
        if more is not None:
            parts.append(more[None].to(self.model.device, torch.long))
        ids = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        kind, more_arguments = type(self.model), dict[str, object]()
        if is_known(kind) or "logits_to_keep" in (arguments := forward_arguments(kind)):
            more_arguments["logits_to_keep"] = keep
        if (
            not is_known(kind) and "position_ids" in arguments
        ):  # where generate gives them, families may count otherwise
            start = len(cache)
            more_arguments["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more_arguments)
        logits: torch.Tensor = out.logits[0, -keep:]
        return logits

    @property
    def threads(self) -> int:
        """See :class:`ForwardBackend`."""
        return 0

    def begin(self) -> None:
        """See :class:`ForwardBackend`."""

    def batch(self, prompts: list[list[int]], capacity: int, last_id: int | None = None) -> BatchReader:
        """See :class:`ForwardBackend`."""
        return BatchModel(self.model, len(prompts), capacity, last_id)


def backend_of(model: PreTrainedModel) -> ForwardBackend:
    """Return what runs a model."""
    found = model.__dict__.get("_forward_backend")
    # A shallow copy of a model holds the backend of the model that it was copied from.
    if isinstance(found, PlainForward) and found.model is model:
        return found
    return PlainForward(model)
