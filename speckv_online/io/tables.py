"""Small tables of results, written as CSV for machines and as Markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speckv_online.io.files import write_atomically


@dataclass
class Table:
    """A named table.

    Attributes
    ----------
    name : str
        File name without ending.
    title : str
        One line above the table: what it shows, and whether it is published, measured or modelled.
    columns : sequence of str
    rows : list of list
        Cells are text, whole numbers, floats (NaN for none) or None.
    digits : int
        Decimal places of floats in Markdown; the CSV has them in full.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    digits: int = 3

    def add(self, *cells: Any) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"table {self.name} has {len(self.columns)} columns, got {len(cells)} cells")
        self.rows.append(list(cells))

    def column(self, name: str) -> list[Any]:
        """Return the cells of one column."""
        i = list(self.columns).index(name)
        return [row[i] for row in self.rows]

    def markdown(self) -> str:
        """Return the table as Markdown, its title above it."""
        numbers = [any(isinstance(r[i], int | float) for r in self.rows) for i in range(len(self.columns))]
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join("---:" if n else "---" for n in numbers) + "|")
        lines += ["| " + " | ".join(self._cell(c) for c in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV; an empty cell stands for none."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if _none(c) else c for c in row] for row in self.rows])
        return out.getvalue()

    def _cell(self, cell: Any) -> str:
        if _none(cell):
            return "–"
        return f"{cell:.{self.digits}f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def write_tables(folder: str | Path, tables: Sequence[Table], heading: str, notes: Sequence[str] = ()) -> Path:
    """Write every table as ``NAME.csv`` and all of them as ``report.md``; returns the path of the latter."""
    folder = Path(folder)
    for table in tables:
        text = table.csv()
        write_atomically(folder / f"{table.name}.csv", lambda f, text=text: f.write(text))  # type: ignore[misc]
    document = "\n".join([f"# {heading}", "", *(f"{note}\n" for note in notes), *(t.markdown() for t in tables)])
    return write_atomically(folder / "report.md", lambda f: f.write(document))


def _none(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def finite(value: Any) -> Any:
    """Return nested lists and dicts ready for JSON, which has neither NaN nor infinity: null stands for them.

    >>> finite({"rate": (1.5, float("nan"))})
    {'rate': [1.5, None]}
    """
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
