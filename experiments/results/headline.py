"""The short table of a run of :mod:`experiments.results` for the README: what users have today, and what this gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.common.documents import insert
from experiments.results.model_check import PLAIN
from experiments.results.tables import Level, levels_of
from speckv_online.io.manifest import describe
from speckv_online.io.run_directory import read_manifest

MARKER = "headline"
BEST = "online"
#: A family of contenders, and what its plain member is called: the row has its best, picked in hindsight.
FAMILIES = {"transformers": "no draft", "fixed": "0"}
#: Label, contender or family, whether to add the ratio to our decoding without a draft. At most six rows.
ROWS: tuple[tuple[str, str, bool], ...] = (
    ("transformers as it is, its best setting", "transformers", False),
    ("ours, no draft", PLAIN, False),
    ("ours, best fixed γ", "fixed", False),
    ("ours, frozen MLP16", "mlp16", True),
    ("**ours, `online`**", BEST, True),
)


def headline(levels: Sequence[Level], manifest: dict[str, Any]) -> str:
    """Return a caption and the table as Markdown; contenders that are not in the run are left out."""
    shown = {name for _, name, _ in ROWS}
    prompts = [decoded_by_most(level, shown) for level in levels]
    count = min(len(found) for found in prompts)
    tokens = manifest.get("settings", {}).get("max_new_tokens", "?")
    lines = [
        f"Tokens per second, `measured`: {count} held-out prompt{'s' * (count != 1)}, {tokens} new tokens each, "
        "greedy, whole calls, all contenders in turns. "
        "In brackets: the ratio to ours without a draft, with its 95 % interval. "
        f"Machine: {describe(manifest)}.",
        "",
        f"| | {' | '.join(level.name for level in levels)} |",
        "|---" + "|---:" * len(levels) + "|",
    ]
    for label, name, compare in ROWS:
        family = name in FAMILIES
        try:
            chosen = [level.best(name) if family else name for level in levels]
            own = [decoded(*given) for given in zip(levels, chosen, prompts, strict=True)]
            cells = [cell(*given, compare) for given in zip(levels, chosen, own, strict=True)]
        except KeyError:
            continue
        if family:
            picked = [n.partition(":")[2] or FAMILIES[name] for n in chosen]
            label += f" (*hindsight*: {', '.join(picked if len(set(picked)) > 1 else picked[:1])})"
        if own != prompts:
            label += f" ({min(map(len, own))} of them)"
        if name == BEST:
            cells = [re.sub(r"^\S+", r"**\g<0>**", text) for text in cells]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decoded_by_most(level: Level, shown: Collection[str]) -> list[str]:
    """Return the prompts that contenders of the short table decoded, but for those that decoded far fewer.

    Members of families are included.
    """
    families = tuple(name for name in shown if name in FAMILIES)
    calls = [c for n, c in level.calls.items() if n in shown or (n.startswith(families) and "+" not in n)]
    most = max(map(len, calls))
    return sorted(set.intersection(*(set(c) for c in calls if len(c) >= 0.75 * most)))


def decoded(level: Level, name: str, prompts: Sequence[str]) -> list[str]:
    """Return those of the prompts that a contender decoded."""
    return [p for p in prompts if p in level.calls[name]]


def cell(level: Level, name: str, prompts: Sequence[str], compare: bool) -> str:
    """A contender's tokens per second on these prompts, on request with its ratio to our decoding without a draft.

    Empty where there are no prompts, without the ratio where plain decoding has none of them.
    """
    if not prompts:
        return ""
    text = f"{level.goodput(name, prompts):.1f}"
    if compare and PLAIN in level.calls and (e := level.ratio(name, PLAIN, prompts)):
        text += f" [{e.value:.2f}: {e.low:.2f}–{e.high:.2f}]" if e.prompts > 1 else f" [{e.value:.2f}]"
    return text


def publish_headline(path: Path, readme: str, leading: Sequence[str] = (), levels: Sequence[str] = ()) -> None:
    """Put a run's short table between the markers of a document."""
    insert(Path(readme), headline(levels_of(path, leading, levels), read_manifest(path)), MARKER)
