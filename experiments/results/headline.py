"""The short table of a run of :mod:`experiments.results` for the README: what users have today, and what this gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.common.documents import insert
from experiments.results.model_check import PLAIN
from experiments.results.tables import FOUR, PAPER, PRODUCT, THEIR_FOUR, THEIRS, Level, levels_of
from speckv_online.io.manifest import describe
from speckv_online.io.run_directory import read_manifest

MARKER = "headline"
BEST = "goodput"
#: Label, contender, whether to add the ratio to transformers' constant-4. A family stands for its best.
ROWS: tuple[tuple[str, str, bool], ...] = (
    ("transformers, `assistant_model=`, constant 4", THEIR_FOUR, False),
    ("transformers, `assistant_model=`, its best schedule", THEIRS, False),
    ("transformers, no draft", "transformers", False),
    ("ours, no draft", PLAIN, False),
    ("ours, γ = 4", FOUR, False),
    ("ours, best fixed γ", "fixed", False),
    ("ours, frozen MLP16, tokens per step (the paper's objective)", PAPER, False),
    ("ours, frozen MLP16, tokens per second", "mlp16", False),
    ("ours, `online`", "online", False),
    ("ours, `goodput` without lookups", "goodput:lookups=off", True),
    ("**ours, `goodput`**", BEST, True),
    ("ours, `goodput` with the hybrid drafter", PRODUCT, True),
)


def headline(levels: Sequence[Level], manifest: dict[str, Any]) -> str:
    """Return a caption and the table as Markdown; contenders that are not in the run are left out."""
    shown = {name for _, name, _ in ROWS}
    prompts = [decoded_by_most(level, shown) for level in levels]
    count = min(len(found) for found in prompts)
    tokens = manifest.get("settings", {}).get("max_new_tokens", "?")
    lines = [
        f"Tokens per second, `measured`: {count} held-out prompt{'s' * (count != 1)}, {tokens} new tokens each, "
        f"greedy, whole calls, prompt included, all contenders in turns in one process ({describe(manifest)}). "
        "In brackets the ratio to transformers' own constant-4, with a 95 % interval over prompts.",
        "",
        f"| | {' | '.join(level.name for level in levels)} |",
        "|---" + "|---:" * len(levels) + "|",
    ]
    for label, name, compare in ROWS:
        family = name in ("fixed", THEIRS)
        try:
            chosen = [level.best(name) if family else name for level in levels]
            own = [decoded(*given) for given in zip(levels, chosen, prompts, strict=True)]
            cells = [cell(*given, compare) for given in zip(levels, chosen, own, strict=True)]
        except KeyError:
            continue
        if family:
            picked = [n.partition(":")[2] or "0" for n in chosen]
            label += f" (*hindsight*: {', '.join(picked)})"
        if own != prompts:
            label += f" ({min(map(len, own))} of them)"
        if name == BEST:
            cells = [re.sub(r"^\S+", r"**\g<0>**", text) for text in cells]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decoded_by_most(level: Level, shown: Collection[str]) -> list[str]:
    """Return the prompts that contenders of the short table decoded, but for those that decoded far fewer.

    Families of schedules are included.
    """
    families = tuple(name for name in shown if name in ("fixed", THEIRS))
    calls = [c for n, c in level.calls.items() if n in shown or (n.startswith(families) and "+" not in n)]
    most = max(map(len, calls))
    return sorted(set.intersection(*(set(c) for c in calls if len(c) >= 0.75 * most)))


def decoded(level: Level, name: str, prompts: Sequence[str]) -> list[str]:
    """Return those of the prompts that a contender decoded."""
    return [p for p in prompts if p in level.calls[name]]


def cell(level: Level, name: str, prompts: Sequence[str], compare: bool) -> str:
    """A contender's tokens per second on these prompts, on request with its ratio to transformers' constant-4.

    Empty where there are no prompts, without the ratio where constant-4 decoded none of them.
    """
    if not prompts:
        return ""
    text = f"{level.goodput(name, prompts):.1f}"
    if compare and (e := level.ratio(name, THEIR_FOUR, prompts)):
        text += f" [{e.value:.2f}: {e.low:.2f}–{e.high:.2f}]" if e.prompts > 1 else f" [{e.value:.2f}]"
    return text


def publish_headline(path: Path, readme: str, leading: Sequence[str] = (), levels: Sequence[str] = ()) -> None:
    """Put a run's short table between the markers of a document."""
    insert(Path(readme), headline(levels_of(path, leading, levels), read_manifest(path)), MARKER)
