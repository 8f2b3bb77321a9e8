"""Whether the CPU engine runs a model: the choice that users have, and what came of it. Nothing heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

from speckv_online.errors import UserError

#: What users may choose.
ENGINES = ("auto", "off")
#: Environment variable that holds the choice where none is given.
VARIABLE = "SPECKV_ENGINE"
#: Help of the command-line flag.
HELP = f"CPU engine: auto, or off for plain transformers modules (default: ${VARIABLE}, else auto)"


def choose_engine(name: str | None = None) -> str:
    """Return the choice: the name, else the environment's, else ``auto``; raises :class:`UserError` for other names."""
    chosen = name if name is not None else os.environ.get(VARIABLE) or ENGINES[0]
    if chosen not in ENGINES:
        where = "--engine" if name is not None else f"${VARIABLE}"
        raise UserError(f"{where} must be {' or '.join(ENGINES)}, got {chosen!r}")
    return chosen


@dataclass(frozen=True)
class EngineStatus:
    """Whether the CPU engine runs a model.

    Attributes
    ----------
    on : bool
        True if any part of the engine is in use.
    reason : str
        What is in use, and why the rest is not.
    """

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.reason})"
