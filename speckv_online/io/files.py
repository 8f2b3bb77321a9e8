"""Files: atomic writing (a reader sees the old file or the whole new one, never a part), locks, and settings."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from speckv_online.errors import UserError

#: What reading a damaged or foreign ``.npz`` file with a JSON head may raise.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    zlib.error,
    zipfile.BadZipFile,
)


def write_atomically(path: str | Path, write: Callable[[IO[Any]], Any], *, binary: bool = False) -> Path:
    """Write a file next to its destination, flush it to disk and move it into place.

    Parameters
    ----------
    path : str or Path
        Destination; missing parent directories are made.
    write : callable
        Called with the open temporary file.
    binary : bool
        Open for bytes instead of UTF-8 text.

    Raises
    ------
    UserError
        If the destination cannot be written (no permission, no free disk, ...); nothing half-written stays behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():  # a rename would put a file in its place
            raise UserError(f"cannot write {path}: it is a device or a pipe; choose another place")
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(fd, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the mode that a plain open() would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; choose another place or free some disk") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a directory for this process alone; the hold ends with the process, however it dies.

    Where the file system or the operating system has no locks, nothing is held.

    Raises
    ------
    UserError
        If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(Path(folder) / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {folder}: wait for it, or choose another --out") from error
        except OSError:
            pass
        yield


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, empty for an empty file.

    Raises
    ------
    UserError
        If the file cannot be read, is not YAML, or holds anything but a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror or e}") from e
    except (yaml.YAMLError, ValueError) as e:  # the latter for other encodings, and days that no calendar has
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping of settings to values")
    return values
