"""What a process has in memory."""

from __future__ import annotations

from pathlib import Path

#: What is told, and what the system calls it: now, at the peak, and without what files map.
_NAMES = {"resident": "VmRSS", "peak": "VmHWM", "own": "RssAnon"}


def memory_of(process: int) -> dict[str, int]:
    """Return a process's bytes in memory: ``resident``, ``peak`` and ``own``; nothing once it has ended.

    What the system says of an ended child (``ru_maxrss``) may be its parent's: it counts from before the program began.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return {name: 1024 * int(found[theirs].split()[0]) for name, theirs in _NAMES.items() if theirs in found}
