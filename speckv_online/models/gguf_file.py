"""Reads the header of a GGUF file and maps its tensors; nothing of a tensor is read before somebody looks at it.

Everything in a file may be wrong. Each number is checked before it is used, so a damaged file gives one line.
The long lists of a tokenizer are stepped over, which is what makes this quick.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speckv_online.errors import UserError
from speckv_online.modeling.gguf_types import TYPES, BlockType

MAGIC = b"GGUF"
#: By the number of a value's type: how it is packed. Strings and lists have types of their own.
_PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
#: A matrix has at most two dimensions; no file has more tensors or fields than this.
_MOST = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes
    ----------
    kind : BlockType
    shape : tuple of int
        As torch has it.
    data : Tensor of uint8, shape (rows, bytes)
        Mapped, not read; a vector has one row.
    """

    kind: BlockType
    shape: tuple[int, ...]
    data: torch.Tensor


class GgufFile:
    """A GGUF file.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    fields : dict
        Numbers and strings by name; of a list its length.
    tensors : dict of str to Tensor
    header : bytes
        All before the tensors.

    Raises
    ------
    UserError
        If it is no GGUF file that can be read here, in one line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path = self.path.expanduser()
            self._map = np.memmap(self.path, np.uint8, "c")
        except (OSError, RuntimeError) as e:  # the latter for the home of an unknown user
            raise self.wrong(getattr(e, "strerror", None) or str(e)) from e
        except ValueError as e:
            raise self.wrong("it is empty") from e
        self._bytes, self._at = memoryview(self._map.data), 0
        try:
            self._read()
        except struct.error:
            raise self.wrong("it ends within its header: fetch it again") from None

    def wrong(self, reason: str) -> UserError:
        """Return the error that says why the file is not read."""
        return UserError(f"cannot read {self.path}: {reason}")

    def forget(self) -> None:
        """Let the system take back the memory of what was read of the file; it is read again where it is needed."""
        self._map._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def _read(self) -> None:
        if bytes(self._bytes[:4]) != MAGIC:
            raise self.wrong("it is no GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise self.wrong(f"GGUF of version {version}, 2 and 3 are read")
        count, fields = self._number("Q"), self._number("Q")
        if max(count, fields) > _MOST:
            raise self.wrong("its header is damaged: fetch it again")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._number("I"))
        if self.fields.get("split.count", 1) not in (0, 1):
            raise self.wrong(
                f"it is one part of {self.fields['split.count']}: merge them with llama-gguf-split --merge"
            )
        found = [self._entry() for _ in range(count)]
        alignment = self.integer("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment
        self.header = bytes(self._bytes[: self._at])
        self.tensors = dict(self._tensor(*entry) for entry in found)
        if len(self.tensors) != count:
            raise self.wrong("it has two tensors of the same name")

    def _number(self, packed: str) -> Any:
        (found,) = struct.unpack_from(f"<{packed}", self._bytes, self._at)
        self._at += struct.calcsize(packed)
        return found

    def _skip(self, size: int) -> None:
        if size > len(self._bytes) - self._at:
            raise struct.error
        self._at += size

    def _string(self) -> str:
        start = self._at + 8
        self._skip(8 + self._number_ahead())
        try:
            return str(self._bytes[start : self._at], "utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a name or text in its header is not UTF-8: fetch it again") from None

    def _number_ahead(self) -> int:
        (found,) = struct.unpack_from("<Q", self._bytes, self._at)
        return int(found)

    def _value(self, kind: int) -> Any:
        if kind in _PACKED:
            return self._number(_PACKED[kind])
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            raise self.wrong(f"its header has a value of the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind in _PACKED:
            self._skip(count * struct.calcsize(_PACKED[kind]))
        elif kind == _STRING:
            for _ in range(count):  # ends at the file's end at the latest
                self._skip(8 + self._number_ahead())
        else:
            raise self.wrong(f"its header has a list of the type {kind}, which is not read")
        return count

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"{name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> tuple[str, Tensor]:
        kind = TYPES.get(number)
        if kind is None:
            known = ", ".join(t.name for t in TYPES.values())
            raise self.wrong(f"{name[:60]!r} has the type {type_name(number)}; {known} are read")
        if not all(shape) or shape[-1] % kind.size:
            raise self.wrong(f"{name[:60]!r} of shape {shape} does not fit its type {kind.name}")
        rows, width = math.prod(shape[:-1]), shape[-1] // kind.size * kind.bytes
        start = self._start + offset
        end = start + rows * width
        if end > len(self._bytes):
            raise self.wrong(
                f"it ends within {name[:60]!r}, at {len(self._bytes)} of at least {end} bytes: fetch it again"
            )
        if offset % 4:
            raise self.wrong(f"{name[:60]!r} is not aligned")
        return name, Tensor(kind, shape, torch.from_numpy(self._map[start:end]).view(rows, width))

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a whole number above zero; without a default it must be there."""
        found = self.fields.get(name, default)
        if type(found) is not int or not 0 < found < 1 << 32:
            raise self.wrong(f"{name} is missing" if found is None else f"{name} is {repr(found)[:40]}")
        return found

    def real(self, name: str, default: float | None = None) -> float:
        """Return a number above zero; without a default it must be there."""
        found = self.fields.get(name, default)
        if not isinstance(found, int | float) or not 0 < found < math.inf:
            raise self.wrong(f"{name} is missing" if found is None else f"{name} is {repr(found)[:40]}")
        return float(found)

    def text(self, name: str, default: str = "") -> str:
        """Return a text."""
        found = self.fields.get(name, default)
        if not isinstance(found, str):
            raise self.wrong(f"{name} is {repr(found)[:40]}")
        return found


def type_name(number: int) -> str:
    """Return the name of a tensor's type by its number, where the ``gguf`` package knows it."""
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(number).name)
    except (ImportError, ValueError):
        return str(number)


def is_gguf(source: str | Path) -> bool:
    """Return True for a file that says that it is GGUF, by its name or by its first bytes."""
    if str(source).lower().endswith(".gguf"):
        return True
    try:
        with Path(source).expanduser().open("rb") as f:
            return f.read(4) == MAGIC
    except (OSError, RuntimeError, ValueError):
        return False
