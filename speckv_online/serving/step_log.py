"""What each step of an engine read and took, as JSON lines: what a cost table is fitted to."""

from __future__ import annotations

import json
import time
from pathlib import Path

#: Seconds between writes.
EVERY = 1.0


class StepLog:
    """Appends steps to a file.

    Each is a list: tokens that the target read, requests, tokens of context that they had together, rounds of the
    draft model, tokens drafted by it, tokens that it read first, seconds.

    Parameters
    ----------
    path : str
        Empty for none.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._lines: list[str] = []
        self._written = time.monotonic()

    @property
    def wanted(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def add(self, *step: float) -> None:
        """Note a step; a file that cannot be written is given up."""
        self._lines.append(json.dumps(step))
        if time.monotonic() - self._written >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        lines, self._lines, self._written = self._lines, [], time.monotonic()
        if self._path is not None and lines:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in lines))
            except OSError:
                self._path = None
