"""Reports as one self-contained HTML page: inline style and pictures, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape

from speckv_online.io.manifest import describe
from speckv_online.reporting.data import Report
from speckv_online.reporting.plots import Chart, charts
from speckv_online.reporting.table import HEAD, MODELLED_HEAD, cells, modelled_cells, p_value, side_by_side

_STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; color: #222;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; }
.advice { padding: 0; list-style: none; }
.advice li { border-left: 4px solid #1f63a8; background: #f3f7fb; margin: .5rem 0; padding: .5rem .75rem; }
.facts { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.group th { background: #f3f3f3; padding-top: .5rem; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; } figure h3 { font-size: 1rem; margin: 0 0 .25rem; }
figcaption { color: #555; font-size: .85rem; }
img { width: 100%; height: auto; display: block; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem; }
summary { cursor: pointer; margin: 1rem 0; }
@media (max-width: 600px) { th, td { padding: .3rem .4rem; }
  td:first-child { max-width: 9.5rem; white-space: normal; } }
"""


def to_html(report: Report) -> str:
    """Return one run's report as an HTML page: advice, table, charts, modelled against measured, notes, manifest."""
    return _page("Comparison of policies", f"<h1>Comparison of policies</h1>\n{_run(report)}")


def runs_to_html(reports: list[Report]) -> str:
    """Return several runs' reports as one page: a table side by side, then each report."""
    head, *rows = side_by_side(reports)
    parts = ["<h1>Comparison of runs</h1>"]
    parts.append("<p>Tokens per second with 95 % intervals over prompts, and × the ratio to autoregressive decoding of "
                 "the same run. All measured; runs on different machines or prompts do not compare.</p>")  # fmt: skip
    parts.append(_table(head, rows))
    for report in reports:
        parts.append(f"<h1>{escape(report.name)}</h1>\n{_run(report)}")
    return _page("Comparison of runs", "\n".join(parts))


def _run(report: Report) -> str:
    advice = "\n".join(f"<li>{escape(text)}</li>" for text in (*report.advice, *report.learning))
    table = [_narrow_first(row) for row in ((*HEAD, ""), *((*cells(row), p_value(row)) for row in report.rows))]
    pictures = charts(report)
    parts = [
        f'<ul class="advice">\n{advice}\n</ul>' if advice else "",
        f'<p class="verdict">{escape(report.verdict)}</p>',
        f'<p class="facts">Figures are {escape(report.kind)}: {escape(describe(report.manifest))}.</p>',
        _table(table[0], table[1:]),
        *(_figures(level, [c for c in pictures if c.level == level]) for level in ("", *report.levels)),
    ]
    if report.modelled:
        parts.append(
            "<h2>Modelled against measured</h2>\n<p>Tokens per second by the clock, and by the times that the "
            "calibration before the run gave for drafting and verifying. Far from 1: the machine was not the same "
            "during calibration and run, or steps cost more than their parts.</p>\n"
            + _table(MODELLED_HEAD, modelled_cells(report))
        )
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    parts.append(f"<h2>Notes</h2>\n<ul>\n{notes}\n</ul>")
    manifest = escape(json.dumps(report.manifest, indent=1, default=str))
    parts.append(f"<details><summary>Manifest</summary><pre>{manifest}</pre></details>")
    return "\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column, the level, becomes a heading above its rows: this saves width on a phone."""
    lines = [f"<thead>{_cells(head[1:], 'th')}</thead>", "<tbody>"]
    level = None
    for row in rows:
        if row[0] != level:
            level = row[0]
            lines.append(f'<tr class="group"><th colspan="{len(head) - 1}">{escape(level)}</th></tr>')
        lines.append(_cells(row[1:], "td"))
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</tbody>\n</table></div>"


def _narrow_first(row: Sequence[str]) -> tuple[str, ...]:
    """Put the columns that matter most (speed and speed-up) where a phone shows them without scrolling."""
    level, policy, speed, *rest, ratio, decision, p = row
    return level, policy, speed, ratio, p, *rest, decision


def _figures(level: str, pictures: Sequence[Chart]) -> str:
    if not pictures:
        return ""
    title = f"Over time at {level}" if level else "Overview"
    return f'<h2>{escape(title)}</h2>\n<div class="charts">' + "\n".join(map(_figure, pictures)) + "</div>"


def _figure(chart: Chart) -> str:
    source = base64.b64encode(chart.png).decode("ascii")
    title = escape(chart.title, quote=True)
    return (
        f'<figure><h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{source}">'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _cells(texts: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"
