"""Reports as text, Markdown, JSON, HTML and pictures, from the files of run directories alone.

Every figure comes from a clock and is labelled ``measured``, but for those of the cost model, which are labelled
``modelled``. Nothing of torch or Ray is imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from speckv_online.console import say
from speckv_online.io.files import write_atomically
from speckv_online.io.manifest import describe
from speckv_online.io.tables import finite
from speckv_online.reporting.data import Report, build_report
from speckv_online.reporting.html_page import runs_to_html, to_html
from speckv_online.reporting.plots import Chart, can_draw, charts
from speckv_online.reporting.table import HEAD, MODELLED_HEAD, cells, modelled_cells, p_value, side_by_side


def write_report(path: str | Path) -> Report:
    """Build a run's report and write ``report.html``, ``report.md``, ``report.json`` and ``plots/`` into it."""
    path, report = Path(path), build_report(path)
    if not can_draw():
        say("the report has no plots, as matplotlib is not installed: pip install matplotlib")
    pictures = charts(report)
    for chart in pictures:
        _write_bytes(path / "plots" / f"{chart.name}.png", chart.png)
    _write(path / "report.html", to_html(report))
    _write(path / "report.md", to_markdown(report, pictures))
    _write(path / "report.json", json.dumps(to_json(report), indent=2) + "\n")
    return report


def write_reports(paths: Sequence[str | Path], out: str | Path) -> list[Report]:
    """Build the reports of several runs and write them side by side, as ``report.html`` and ``report.md`` in ``out``.

    Runs are called by their directories; where two have one name, their parents are named too.
    """
    reports = [build_report(path) for path in paths]
    if len({report.name for report in reports}) < len(reports):
        parts = [Path(path).resolve().parts for path in paths]
        reports = [replace(r, name="/".join(p[-2:])) for r, p in zip(reports, parts, strict=True)]
    out = Path(out).expanduser()
    if not can_draw():
        say("the report has no plots, as matplotlib is not installed: pip install matplotlib")
    _write(out / "report.html", runs_to_html(reports))
    text = ["# Comparison of runs", "", *markdown_table(side_by_side(reports)), ""]
    for report in reports:
        text += [f"# {report.name}", "", *to_markdown(report).splitlines()[2:], ""]
    _write(out / "report.md", "\n".join(text))
    return reports


def to_text(report: Report) -> str:
    """Return the table, the notes, the verdict and the advice for a terminal."""
    lines = [f"{report.kind} on {describe(report.manifest)}", "", *text_table([HEAD, *map(cells, report.rows)])]
    return "\n".join(
        [*lines, "", *(f"Note: {note}" for note in report.notes), report.verdict, *report.advice, *report.learning]
    )


def text_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines for a terminal: two columns of text, then figures; a rule where the first one changes."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for i, row in enumerate(table):
        if i and row[0] != table[i - 1][0]:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        padded = [c.ljust(w) if j < 2 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return lines


def to_markdown(report: Report, pictures: Sequence[Chart] = ()) -> str:
    """Return the report as Markdown; ``pictures`` are those that were written to ``plots/`` beside it."""
    made_on = f"Figures are {report.kind}: {describe(report.manifest)}."
    lines = ["# Comparison of policies", "", *(f"- {text}" for text in (*report.advice, *report.learning)), ""]
    lines += [report.verdict, "", made_on, ""]
    rows = [list(cells(row)) for row in report.rows]
    for texts, row in zip(rows, report.rows, strict=True):
        if p := p_value(row):
            texts[6] += f", {p}"
    lines += markdown_table([HEAD, *rows])
    lines += ["", *(f"- {note}" for note in report.notes), ""]
    if report.modelled:
        lines += [
            "## Modelled against measured",
            "",
            "Tokens per second.",
            "",
            *markdown_table([MODELLED_HEAD, *modelled_cells(report)]),
            "",
        ]
    for chart in pictures:
        title = f"{chart.title} at {chart.level}" if chart.level else chart.title
        lines += [f"## {title}", "", f"![{title}](plots/{chart.name}.png)", "", f"{chart.caption}.", ""]
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as a dict for JSON; what is not a number there is null."""
    return finite(asdict(report))


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines in Markdown: two columns of text, then figures.

    >>> print("\\n".join(markdown_table([("level", "policy", "tokens/s"), ("nf4", "fixed:4", "200")])))
    | level | policy | tokens/s |
    |---|---|---:|
    | nf4 | fixed:4 | 200 |
    """
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return [lines[0], "|" + "---|" * 2 + "---:|" * (len(table[0]) - 2), *lines[1:]]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda f: f.write(text))


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomically(path, lambda f: f.write(data), binary=True)
