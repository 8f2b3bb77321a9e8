"""Files of JSON lines that runs append to and go on with: a line that a kill has cut off is as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[Any]:
    """Return what the whole lines of a file hold, nothing if there is no file.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, or a line is no JSON.
    """
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def append_line(path: Path, item: Any) -> None:
    """Write one more line; it takes the place of one that was cut off."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.seek(whole)
        file.write(json.dumps(item).encode() + b"\n")
