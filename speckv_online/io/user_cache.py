"""The user's cache directory, and small files in it that can be made again: each carries a hash of itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically

_HASH = 32


def cache_dir() -> Path:
    """Folder of everything that can be made again: ``$SPECKV_CACHE``, else ``speckv_online`` in the user's cache."""
    if explicit := os.environ.get("SPECKV_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "speckv_online"


def key_of(*parts: str) -> str:
    """Return a key for what is made of these parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:40]


def is_ours_alone(found: os.stat_result) -> bool:
    """Whether a file is this user's, and nobody else may write to it."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class CachedFiles:
    """Files of one kind in the user's cache, by key.

    What cannot be read or written is as if it were not there: a cache must not be in the way.

    Parameters
    ----------
    kind : str
        Name of the folder.
    most_bytes : int
        Size of the folder above which the files used longest ago are removed.
    """

    def __init__(self, kind: str, most_bytes: int) -> None:
        self._kind, self._most = kind, most_bytes

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return cache_dir() / self._kind


class SmallFiles(CachedFiles):
    """Small files, each read as a whole."""

    def get(self, key: str) -> bytes | None:
        """Return what was kept under a key; None if nothing, a damaged file, or one that others may write."""
        path = self.folder / key
        try:
            with path.open("rb") as file:
                if not is_ours_alone(os.fstat(file.fileno())):
                    return None
                data = file.read()
            if hashlib.sha256(data[_HASH:]).digest() != data[:_HASH]:
                return None
            os.utime(path)
        except OSError:
            return None
        return data[_HASH:]

    def put(self, key: str, data: bytes) -> None:
        """Keep something under a key, whole or not at all."""
        with contextlib.suppress(OSError, UserError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole = hashlib.sha256(data).digest() + data
            path = write_atomically(self.folder / key, lambda file: file.write(whole), binary=True)
            path.chmod(0o600)
            self._trim()

    def _trim(self) -> None:
        files = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in self.folder.iterdir() if f.is_file())
        total = sum(size for _, size, _ in files)
        for _, size, file in files[:-1]:
            if total <= self._most:
                break
            file.unlink(missing_ok=True)
            total -= size
