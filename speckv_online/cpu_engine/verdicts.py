"""What the engine has found right before. To check a large model takes seconds, and finds the same each time."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from transformers import PreTrainedModel

from speckv_online.io.user_cache import SmallFiles, key_of
from speckv_online.modeling.fingerprint import fingerprint, remember_fingerprint

#: Verdicts that were kept.
KEPT = SmallFiles("checked", 1_000_000)
#: Smaller models are checked each time.
LARGE_BYTES = 20_000_000
_RIGHT = b"right\n"


class Verdicts:
    """Which parts of the engine were right for a model, on this processor, with these versions.

    Parameters
    ----------
    model : Module
        As it was loaded, before its first forward.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._about: tuple[str, ...] = ()
        try:
            taken = remember_fingerprint(model)
        except RuntimeError:  # a 4-bit model after its first forward has no fingerprint any more
            return
        if not isinstance(model, PreTrainedModel) or sum(p.nbytes for p in model.parameters()) < LARGE_BYTES:
            return
        kinds = " ".join(f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules())
        try:
            self._about = taken or fingerprint(model), kinds, str(model.config.to_json_string()), *environment()
        except RuntimeError:  # a 4-bit model after its first forward has no fingerprint any more
            return

    def known(self, part: str) -> bool:
        """Whether a part was found right before."""
        return bool(self._about) and KEPT.get(key_of(part, *self._about)) == _RIGHT

    def keep(self, part: str) -> None:
        """Keep that a part was found right now."""
        if self._about:
            KEPT.put(key_of(part, *self._about), _RIGHT)


@cache
def environment() -> tuple[str, ...]:
    """What else a verdict holds for: the engine's source, the processor, and the libraries."""
    import llvmlite.binding as llvm

    source = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "bitsandbytes", "llvmlite")]
    return key_of(*source), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), *versions
