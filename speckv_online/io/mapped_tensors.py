"""Tensors in the user's cache that are mapped, not read: memory holds what is looked at, once for all processes.

A file has a head in JSON, the tensors, and a SHA-256 of all of it. The hash is compared once for a file as it is: whose
size, times and inode are those of a file that was right is the same file. A mapping is private. What a process writes
into a tensor is its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.io.user_cache import CachedFiles, SmallFiles, is_ours_alone, key_of

log = logging.getLogger(__name__)
_MAGIC, _ALIGNMENT, _HASH = b"SPECKVT1", 64, 32
_RIGHT = b"right\n"
#: Files that were right.
_CHECKED = SmallFiles("checked", 1_000_000)
#: What a head that is damaged, or of another version, may raise.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error)


class MappedFiles(CachedFiles):
    """Files of tensors, each mapped. No file larger than the folder may be is kept."""

    def get(self, key: str) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """Return the facts and tensors under a key; None if nothing, or a file that others may write.

        A damaged file is set aside, with one line in the log.
        """
        path = self.folder / key
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if not is_ours_alone(found):
                    return None
                if _CHECKED.get(mark := _mark(path, found)) != _RIGHT:
                    _compare(file, found.st_size)
                    _CHECKED.put(mark, _RIGHT)
                return _tensors(file)
        except FileNotFoundError:
            return None
        except _UNREADABLE as e:
            aside = path.with_name("damaged")
            log.warning("%s is set aside as %s, and made anew: %s", path, aside.name, " ".join(str(e).split())[:100])
            with contextlib.suppress(OSError):
                path.replace(aside)
            return None

    def put(self, key: str, facts: Any, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Keep tensors under a key, whole or not at all; return whether they are kept."""
        size = sum(t.nbytes + _ALIGNMENT for t in tensors.values()) + (1 << 20)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > self._most or size > shutil.disk_usage(self.folder).free:
                log.info("%.0f MB of weights are not kept: there is no room", size / 1e6)
                return False
            path = write_atomically(self.folder / key, lambda file: _write(file, facts, tensors), binary=True)
            path.chmod(0o600)
            _CHECKED.put(_mark(path, path.stat()), _RIGHT)
            self._trim(path)
        except (OSError, UserError) as e:
            log.info("weights are not kept: %s", " ".join(str(e).split())[:200])
            return False
        return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process makes a file."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                file = stack.enter_context((self.folder / ".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _trim(self, newest: Path) -> None:
        files = [f for f in self.folder.iterdir() if f.is_file() and f != newest and f.name != ".lock"]
        used = sorted(((found := f.stat()).st_atime, found.st_size, f) for f in files)
        total = newest.stat().st_size + sum(size for _, size, _ in used)
        for _, size, file in used:
            if total <= self._most:
                break
            file.unlink(missing_ok=True)
            total -= size


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors one behind the other; those that lie so in a mapped file are not copied."""
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or not part.numel() or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return torch.cat(list(parts))
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.dtype != first.dtype:
            return torch.cat(list(parts))
        at += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _mark(path: Path, found: os.stat_result) -> str:
    return key_of(str(path), *map(str, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)))


def _compare(file: IO[bytes], size: int) -> None:
    """Compare a file with its hash; raises ValueError."""
    digest, left = hashlib.sha256(), size - _HASH
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    if left or digest.digest() != file.read(_HASH):
        raise ValueError("its hash is wrong")


def _tensors(file: IO[bytes]) -> tuple[Any, dict[str, torch.Tensor]]:
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("another format")
    (length,) = struct.unpack("<Q", file.read(8))
    head = json.loads(file.read(length))
    data, tensors = torch.from_numpy(np.memmap(file, np.uint8, "c")), dict[str, torch.Tensor]()
    for name, (kind, shape, start, end) in head["tensors"].items():
        tensors[name] = data[start:end].view(getattr(torch, kind)).view(shape)
    return head["facts"], tensors


def _write(file: IO[bytes], facts: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write facts and tensors; tensors whose sizes are multiples of 64 bytes lie side by side."""
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors.values()]

    def head(start: int) -> bytes:
        listed = {}
        for (name, t), size in zip(tensors.items(), sizes, strict=True):
            listed[name] = [str(t.dtype).removeprefix("torch."), list(t.shape), start, start + t.nbytes]
            start += size
        return json.dumps({"facts": facts, "tensors": listed}).encode()

    start = -(-(len(_MAGIC) + 8 + len(head(1 << 40))) // _ALIGNMENT) * _ALIGNMENT  # no head is longer than this one
    text = head(start)
    text += b" " * (start - len(_MAGIC) - 8 - len(text))
    digest = hashlib.sha256()
    for piece in (_MAGIC, struct.pack("<Q", len(text)), text, *_pieces(tensors, sizes)):
        file.write(piece)
        digest.update(piece)
    file.write(digest.digest())


def _pieces(tensors: Mapping[str, torch.Tensor], sizes: list[int]) -> Iterator[Any]:
    for t, size in zip(tensors.values(), sizes, strict=True):
        yield t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        yield bytes(size - t.nbytes)
