"""Which models, on what: the parts of a key."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from speckv_online.cpu_engine.weight_version import state_of
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.fingerprint import drafter_fingerprint
from speckv_online.drafters.model import ModelDrafter
from speckv_online.gpu_engine.graphed_llama import graphs_of
from speckv_online.io.manifest import hardware
from speckv_online.learned.key import Key, rounded
from speckv_online.modeling.fingerprint import fingerprint, remember_fingerprint
from speckv_online.modeling.forward_backend import backend_of

#: What runs the target inside transformers' own assisted generation.
ASSISTED = "transformers' assisted generation"


class Identity:
    """Makes keys; fingerprints are taken again only where weights were changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, str]] = {}

    def key(
        self,
        policy: str,
        target: PreTrainedModel,
        draft: Drafter | PreTrainedModel | None,
        level: str,
        rows: int = 1,
        engine: str = "",
    ) -> Key:
        """Return the key of a call that decodes so many rows at once."""
        return Key(
            policy, self._model("target", target), self._draft(draft), level, rounded(rows),
            device_name(target.device), engine or engine_of(target),
        )  # fmt: skip

    def _draft(self, draft: Drafter | PreTrainedModel | None) -> str:
        if draft is None:
            return "none"
        if isinstance(draft, PreTrainedModel):
            return self._model("draft", draft)
        if not isinstance(draft, ModelDrafter):
            return drafter_fingerprint(draft)
        remember_fingerprint(draft.model)
        marks = (draft, draft.compiled is None, state_of(draft.model, ())[0])
        return self._found("draft", marks, lambda: drafter_fingerprint(draft))

    def _model(self, role: str, model: PreTrainedModel) -> str:
        if "_fingerprint" not in vars(model):
            remember_fingerprint(model)
        return self._found(role, (model, state_of(model, ())[0]), lambda: fingerprint(model))

    def _found(self, role: str, marks: Any, take: Callable[[], str]) -> str:
        known = self._known.get(role)
        if known is None or known[0] != marks:
            known = self._known[role] = marks, take()
        return known[1]


def engine_of(target: PreTrainedModel) -> str:
    """Return what runs a target."""
    if graphs_of(target) is not None:
        return "CUDA graphs"
    return "CPU engine" if backend_of(target).status.on else "plain modules"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


@cache
def _processor() -> str:
    return str(hardware()["processor"])
