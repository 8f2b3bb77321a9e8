"""The HTML report stands alone: no fetch, no unescaped text."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

from speckv_online.reporting.data import Report
from speckv_online.reporting.html_page import to_html
from speckv_online.reporting.rows import Row
from speckv_online.reporting.table import HEAD
from speckv_online.stats import Estimate


class Page(HTMLParser):
    """Collects tags, attributes and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.cells[-1] += data


def test_page_is_self_contained_and_escaped() -> None:
    estimate = Estimate(value=12.5, low=11.0, high=14.0, p_value=0.01, prompts=8)
    row = Row(
        level="nf4", policy="<script>alert(1)</script>", tokens_per_second=estimate, tokens_per_step=1.5,
        acceptance=math.nan, mean_gamma=1.2, speedup=estimate, decision_microseconds=17.0, prompts=8, tokens=99,
        steps=66, same_output=8, compared=8,
    )  # fmt: skip
    text = to_html(Report([row], "At nf4 a < b & so on.", ["a note <b>"], {"config": {}, "torch": "</pre><i>"}))
    page = Page(text)
    assert {"script", "i", "b", "link"}.isdisjoint(page.tags)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 1
    assert not re.search(r"https?:", text)
    assert set(HEAD[1:]) <= set(page.cells[: len(HEAD)])  # the level stands above its rows
    assert "12.50" in page.cells
    assert "a &lt; b &amp; so on." in text
