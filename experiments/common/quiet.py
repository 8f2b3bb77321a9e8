"""A file that is locked while a machine has to be quiet, so that what else runs there can wait."""

from __future__ import annotations

import fcntl
import time
from typing import IO

#: Seconds that the machine is kept for itself at most; then others get a turn.
TURN = 140.0


class Quiet:
    """Keeps others waiting while blocks are played.

    Parameters
    ----------
    path : str
        The file; empty to keep nobody waiting.
    """

    def __init__(self, path: str) -> None:
        self._file: IO[str] | None = open(path, "a") if path else None  # noqa: SIM115
        self._since, self._shares = 0.0, False

    def share(self) -> None:
        """Work whose seconds do not count comes next: others may work, too."""
        if not self._shares:
            self.release()
            self._lock(fcntl.LOCK_SH)
            self._shares = True

    def keep(self) -> None:
        """Seconds count from here on."""
        if not self._since or time.monotonic() - self._since > TURN:
            self.release()
            time.sleep(0.5)
            self._lock(fcntl.LOCK_EX)
            self._since = time.monotonic()

    def release(self) -> None:
        """Let everybody work."""
        self._lock(fcntl.LOCK_UN)
        self._since, self._shares = 0.0, False

    def _lock(self, how: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, how)
