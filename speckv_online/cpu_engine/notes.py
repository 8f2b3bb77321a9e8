"""What the engine could do for a model, and why it could not do the rest. Each reason is logged once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from speckv_online.modeling.engine import EngineStatus

log = logging.getLogger(__name__)


@dataclass
class EngineNotes:
    """Notes on one model.

    Attributes
    ----------
    model : str
        Name of the model, for the log.
    packed, patched : int
        How many linear layers are packed, and how many other layers may take a short way.
    compiled : bool
        True if the whole forward is one compiled program.
    missing : dict
        What is not in use, and why.
    failed : bool
        True if something failed that should work: it is logged as a warning.
    """

    model: str = "model"
    packed: int = 0
    patched: int = 0
    compiled: bool = False
    missing: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    logged: bool = False

    def lacks(self, part: str, reason: str, failed: bool = False) -> None:
        """Note why a part of the engine is not in use; what comes after :meth:`report` is logged at once."""
        known = self.missing.get(part) == reason
        self.missing[part] = reason
        self.failed |= failed
        if self.logged and not known:
            log.log(logging.WARNING if failed else logging.INFO, "%s: no %s: %s", self.model, part, reason)

    def report(self) -> None:
        """Log the status, once."""
        if not self.logged:
            self.logged = True
            level = logging.WARNING if self.failed else logging.INFO
            log.log(level, "%s: the CPU engine is %s", self.model, self.status)

    @property
    def status(self) -> EngineStatus:
        """What stands in ``decoder.engine``."""
        used = ["compiled forward"] if self.compiled else []
        used += [f"{self.packed} packed linear layers"] if self.packed else []
        used += [f"{self.patched} patched layers"] if self.patched else []
        missing = [f"no {part}: {reason}" for part, reason in self.missing.items()]
        return EngineStatus(bool(used), "; ".join([", ".join(used), *missing] if used else missing))


def describe(error: BaseException) -> str:
    """Return an error's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def notes_of(model: Any) -> EngineNotes:
    """Return the notes on a model, which are empty if it has none."""
    found = model.__dict__.get("_engine_notes")
    if not isinstance(found, EngineNotes):
        found = model._engine_notes = EngineNotes(type(model).__name__)
    return found
