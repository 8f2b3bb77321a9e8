"""The files: one for each key, in the user's cache. Reading never unpickles; writing is atomic and under a lock."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from policies.base import State
from speckv_online.errors import UserError
from speckv_online.io.files import UNREADABLE
from speckv_online.io.run_directory import load_arrays, save_arrays
from speckv_online.io.user_cache import cache_dir
from speckv_online.learned.key import FORMAT, Key

log = logging.getLogger(__name__)

#: Most files, and most bytes of all of them: where there is more, those that were written longest ago go.
MAX_FILES, MAX_BYTES = 64, 64 << 20
#: Seconds that a process waits for the lock. Others hold it for some milliseconds.
PATIENCE = 10.0
#: What a damaged file's name ends in.
DAMAGED = ".damaged"
#: Name of the array that holds the header.
_HEADER = "learned.header"
#: Seconds after which the temporary file of a killed process is removed.
_ABANDONED = 3600.0
#: What a header holds besides its key.
_FIELDS: dict[str, type] = {"write": str, "steps": int, "tokens": int, "created": str, "updated": str}


class Busy(UserError):
    """Another process held the lock for too long."""


class Damaged(Exception):
    """A file that cannot be used; the message says why."""


class Entry(NamedTuple):
    """A stored state.

    Attributes
    ----------
    header : dict
        ``key``, ``write`` (a name of this version of the state), ``steps``, ``tokens``, ``created``, ``updated``, and
        whatever its writer told of the run.
    state : State
        What :meth:`~policies.base.Policy.state_dict` gave.
    """

    header: dict[str, Any]
    state: State


def learned_dir() -> Path:
    """Folder of the states."""
    return cache_dir() / "learned"


class Store:
    """A folder of states.

    Parameters
    ----------
    folder : Path, optional
        By default ``learned`` in the cache (:func:`learned_dir`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = learned_dir() if folder is None else Path(folder)

    def path(self, name: str) -> Path:
        """File of a key's name."""
        return self.folder / f"{name}.npz"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the hold ends with the process, however it dies.

        Raises
        ------
        UserError
            If the folder cannot be written.
        Busy
            If another process holds it all the time.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = open(self.folder / ".lock", "a")  # noqa: SIM115  closed below
        except OSError as e:
            raise UserError(f"cannot write to {self.folder}: {e.strerror or e}") from e
        with file:
            _hold(file.fileno(), self.folder)
            yield

    def read(self, key: Key) -> Entry | None:
        """Return what is stored under a key; None if nothing is. Raises :class:`Damaged`."""
        path = self.path(key.name)
        if not path.exists():
            return None
        entry = read_file(path)
        if entry.header["key"] != asdict(key):
            raise Damaged("it holds the state of something else")
        return entry

    def write(self, key: Key, header: dict[str, Any], state: State) -> None:
        """Write a state; call it under :meth:`locked`. Raises :class:`UserError` if that cannot be done."""
        text = json.dumps({"format": FORMAT, "key": asdict(key)} | header)
        save_arrays(self.path(key.name), {**state, _HEADER: np.frombuffer(text.encode(), np.uint8)})
        self._trim(self.path(key.name))

    def set_aside(self, key: Key, reason: object) -> None:
        """Rename a key's file, so that the next run starts afresh, and say so in one line."""
        path = self.path(key.name)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, f"{path}{DAMAGED}")
        log.warning(
            "what was learnt cannot be used (%s): %s is set aside as %s", " ".join(str(reason).split())[:300], path,
            f"{path.name}{DAMAGED}",
        )  # fmt: skip

    def entries(self) -> dict[str, dict[str, Any] | None]:
        """Return the header of every state by its name, latest first; None for a file that cannot be read."""
        found: dict[str, dict[str, Any] | None] = {}
        for path in sorted(self.folder.glob("*.npz"), key=_written, reverse=True):
            try:
                found[path.stem] = read_file(path).header
            except Damaged:
                found[path.stem] = None
        return found

    def damaged(self) -> list[Path]:
        """Files that were set aside."""
        return sorted(self.folder.glob(f"*{DAMAGED}"))

    def forget(self, names: list[str]) -> None:
        """Delete states, and what was set aside under their names."""
        with self.locked():
            for name in names:
                for path in (self.path(name), Path(f"{self.path(name)}{DAMAGED}")):
                    path.unlink(missing_ok=True)

    def _trim(self, kept: Path) -> None:
        """Delete the oldest files where there are too many, and what killed processes left."""
        sizes = {path: _size(path) for pattern in ("*.npz", f"*{DAMAGED}") for path in self.folder.glob(pattern)}
        oldest = sorted((path for path in sizes if path != kept), key=_written)
        while oldest and (len(sizes) > MAX_FILES or sum(sizes.values()) > MAX_BYTES):
            sizes.pop(oldest[0])
            oldest.pop(0).unlink(missing_ok=True)
        for part in self.folder.glob(".*.part"):
            if time.time() - _written(part) > _ABANDONED:
                part.unlink(missing_ok=True)


def read_file(path: Path) -> Entry:
    """Return what a file holds; raises :class:`Damaged` for whatever is no whole file of this version."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Damaged("it is too large")
        arrays = load_arrays(path)
        header = json.loads(arrays.pop(_HEADER).tobytes().decode())
        if header["format"] != FORMAT:
            raise Damaged(f"it is of format {header['format']}, not {FORMAT}")
        Key(**header["key"])
        for field, kind in _FIELDS.items():
            if not isinstance(header[field], kind):
                raise Damaged(f"its header has no {field}")
    except (*UNREADABLE, UserError, MemoryError) as error:
        raise Damaged("it is no whole file of learnt statistics") from error
    return Entry(header, arrays)


def _hold(fd: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: then the last writer wins
        return
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
        if time.monotonic() > end:
            raise Busy(f"another process holds {folder}")
        time.sleep(0.005)


def _written(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
