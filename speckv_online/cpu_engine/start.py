"""The door to the engine: what lets it run a target or a draft."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from speckv_online.cpu_engine.int8_draft import Int8Draft, int8_form
from speckv_online.cpu_engine.notes import notes_of
from speckv_online.cpu_engine.pack import pack
from speckv_online.modeling.engine import EngineStatus, choose_engine
from speckv_online.modeling.forward_backend import PlainForward

log = logging.getLogger(__name__)
OFF = EngineStatus(False, "switched off")


def start_engine(
    model: PreTrainedModel, engine: str | None = None, kept: Mapping[str, Sequence[torch.Tensor]] | None = None
) -> EngineStatus:
    """Let the engine run a model where it can, and log once whether it does.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode; it is changed in place.
    engine : str, optional
        ``auto`` or ``off``; by default that of ``$SPECKV_ENGINE``.
    kept : mapping, optional
        As :func:`speckv_online.cpu_engine.pack.pack` takes it.
    """
    if choose_engine(engine) == "off":
        model._forward_backend = PlainForward(model, OFF)  # type: ignore[assignment]
        log.info("%s: the CPU engine is %s", type(model).__name__, OFF)
        return OFF
    pack(model, kept)
    return notes_of(model).status


def int8_draft(
    model: PreTrainedModel, engine: str | None = None, kept: Sequence[torch.Tensor] | None = None
) -> Int8Draft | None:
    """Return the int8 form of a draft, None where there is none or the engine is off; log once why.

    ``kept`` are the :attr:`~speckv_online.cpu_engine.int8_draft.Int8Draft.weights` that it once had.
    """
    if choose_engine(engine) == "off":
        return None
    compiled, reason = int8_form(model, kept)
    if compiled is None:
        # On other devices than a CPU nothing is missing.
        level = logging.WARNING if model.device.type == "cpu" else logging.INFO
        log.log(level, "%s: the draft has no int8 form: %s", type(model).__name__, reason)
    return compiled
