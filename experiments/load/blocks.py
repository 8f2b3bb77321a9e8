"""Finished blocks of a load experiment, kept in a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.common.json_lines import append_line, read_lines
from speckv_online.errors import UserError

#: What a block is known by.
KEY = ("contender", "loop", "load", "repeat")


class Blocks:
    """Blocks in a file of JSON lines, the settings that they were played under in its first one.

    Parameters
    ----------
    path : Path
        Made where it is missing.
    settings : dict
        What the blocks depend on, ready for JSON.

    Attributes
    ----------
    found : list of dict
        All blocks, those of earlier runs too, each once.

    Raises
    ------
    UserError
        If the file was made under other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.found: list[dict[str, Any]] = []
        self._path, settings = path, json.loads(json.dumps(settings))
        try:
            before, *blocks = read_lines(path) or [None]
            if before is not None and not isinstance(before.get("settings"), dict):
                raise ValueError("its first line holds no settings")
            self.found += list({self._key(block): block for block in blocks}.values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"cannot go on from {path}: {error}") from error
        if before is None:
            append_line(path, {"settings": settings})
        elif other := sorted(k for k in settings | before["settings"] if settings.get(k) != before["settings"].get(k)):
            raise UserError(f"{path} was played with other settings ({', '.join(other)}): name another --out")

    def has(self, contender: str, loop: str, load: float, repeat: int) -> bool:
        """Return whether a block was played."""
        return any(self._key(block) == (contender, loop, load, repeat) for block in self.found)

    def add(self, block: dict[str, Any]) -> None:
        """Keep a block that is finished."""
        append_line(self._path, block)
        self.found.append(block)

    @staticmethod
    def _key(block: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(block[name] for name in KEY)
