"""A run's report as one self-contained HTML page: inline style and picture, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from io import BytesIO

from speckv_online.manifest import describe
from speckv_online.report import HEAD, Report, cells, plot

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
img { max-width: 100%; height: auto; }
.verdict { font-size: 1.1rem; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem; }
"""


def to_html(report: Report) -> str:
    """Return the report as an HTML page: verdict, plot, table, notes and the manifest."""
    picture = BytesIO()
    plot(report, picture)
    source = base64.b64encode(picture.getvalue()).decode("ascii")
    rows = "\n".join(_row(cells(row), "td") for row in report.rows)
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    manifest = escape(json.dumps(report.manifest, indent=1, default=str))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of policies</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Comparison of policies</h1>
<p class="verdict">{escape(report.verdict)}</p>
<p>Figures are {escape(report.kind)}: {escape(describe(report.manifest))}.</p>
<img alt="tokens per second by level and policy" src="data:image/png;base64,{source}">
<div class="scroll"><table>
<thead>{_row(HEAD, "th")}</thead>
<tbody>
{rows}
</tbody>
</table></div>
<ul>
{notes}
</ul>
<details><summary>Manifest</summary><pre>{manifest}</pre></details>
</body>
</html>
"""


def _row(texts: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"
