"""Reading CSV files so that whatever is wrong with one is said in a line that names file, line and column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speckv_online.errors import UserError

#: Beyond this a count is a mistake, and would overflow numpy's integers.
LARGEST = 10**9
_NAMES = {int: "a whole number", float: "a number", str: "text"}


def read_csv(
    path: str | Path, kinds: Mapping[str, type], required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, values by column) for every row of a CSV file with a header.

    A byte-order mark, CRLF line ends, blank lines, columns in another order and unknown columns are accepted.

    Parameters
    ----------
    path : str or Path
    kinds : mapping of str to type
        Columns to take, each ``int``, ``float`` or ``str``; numbers must be finite.
    required : sequence of str
        Columns that must be there.

    Raises
    ------
    UserError
        If the file cannot be read, is no CSV, lacks a column, or a cell is not what its column holds.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8 text; save the file as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error})") from error
        if not cells:
            continue
        if not header:
            header = _header([c.strip() for c in cells], path, reader.line_num, required)
            continue
        where = f"{path} line {reader.line_num}"
        if len(cells) < len(header):
            raise UserError(f"{where}, column {header[len(cells)]}: missing, the line ends before it")
        if len(cells) > len(header):
            raise UserError(f"{where}, column {len(header) + 1}: one cell more than the header has columns")
        pairs = ((name, cell) for name, cell in zip(header, cells, strict=True) if name in kinds)
        yield reader.line_num, {n: _value(c, kinds[n], f"{where}, column {n}") for n, c in pairs}
    if not header:
        raise UserError(f"{path} line 1: the file is empty; it needs the columns {','.join(required)}")


def _header(names: list[str], path: Path, line: int, required: Sequence[str]) -> list[str]:
    missing = [name for name in required if name not in names]
    if missing:
        raise UserError(f"{path} line {line} lacks the columns {', '.join(missing)}: it needs {','.join(required)}")
    twice = [name for name in required if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} line {line}, column {twice[0]}: named twice in the header")
    return names


def _value(cell: str, kind: type, where: str) -> Any:
    cell = cell.strip()
    if kind is str:
        return cell
    shown = cell if len(cell) <= 40 else f"{cell[:37]}..."
    try:
        value = kind(cell)
    except ValueError:
        raise UserError(f"{where}: expected {_NAMES[kind]}, got {shown!r}") from None
    if not -LARGEST <= value <= LARGEST:  # false for NaN too
        raise UserError(f"{where}: expected a finite number of ordinary size, got {shown!r}")
    return value
