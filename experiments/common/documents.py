"""Tables in documents, between markers such as ``<!-- replays: begin -->`` and ``<!-- replays: end -->``."""

from __future__ import annotations

from pathlib import Path

from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically


def check_place(document: str, *names: str) -> None:
    """Raise :class:`UserError` unless a document, if one is named, has a place for all of these tables.

    Tables that have nowhere to go should show before hours of work.
    """
    for name in names if document else ():
        around(Path(document).expanduser(), name)


def insert(path: Path, text: str, name: str) -> None:
    """Replace what is between a document's markers of a name, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""
    path = path.expanduser()
    head, rest = around(path, name)
    write_atomically(path, lambda f: f.write(f"{head}\n\n{text}\n{rest}"))


def around(path: Path, name: str) -> tuple[str, str]:
    """Return a document up to and with the first marker of a name that starts a line, and from the second marker on.

    Raises
    ------
    UserError
        If there is no such document, or it lacks the markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no document {path}: make one with the lines {begin} and {end}") from None
    # Only at a line's start: a sentence about the markers is not the place.
    head, found, rest = ("\n" + old).partition("\n" + begin)
    _, closed, rest = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} lacks the lines {begin} and {end} that the tables go between")
    return f"{head}\n{begin}".removeprefix("\n"), end + rest
