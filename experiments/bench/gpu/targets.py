"""What the stages' files say about the targets that were set beforehand; what was not measured is said too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A target, what was measured (None: nothing), and whether that is within it."""

    text: str
    value: float | None
    met: bool

    def line(self) -> str:
        """Return it as a line."""
        if self.value is None:
            return f"{self.text}: not measured"
        return f"{self.text}: {self.value:.3g}, {'met' if self.met else 'missed'}"


def read(folder: Path, stage: str) -> dict[str, Any]:
    """Return a stage's file, empty where there is none, or none of a GPU and models of usual size."""
    path = folder / f"{stage}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {} if found.get("device") == "cpu" or found.get("tiny") else found


def at_least(text: str, value: float | None, bound: float) -> Target:
    """Return a target that is met from a bound on."""
    return Target(f"{text} >= {bound:g}", value, value is not None and value >= bound)


def at_most(text: str, value: float | None, bound: float) -> Target:
    """Return a target that is met up to a bound."""
    return Target(f"{text} <= {bound:g}", value, value is not None and value <= bound)


def targets(folder: Path) -> list[Target]:
    """Compare what was measured with the targets."""
    rates: dict[str, dict[str, float]] = {}
    for row in read(folder, "decoding").get("rows", []):
        rates.setdefault(row["level"], {})[row["who"]] = row["tokens_per_second"]
    found = [at_least("ours over transformers at gamma 4, least of the levels", ratio(rates, "fixed:4", THEIRS), 3.0)]
    fixed = ("fixed:1", "fixed:2", "fixed:4", "fixed:8")
    for text, others in (("no draft", ("autoregressive",)), ("the best fixed gamma", fixed)):
        found.append(at_least(f"online over {text}, least of the levels", ratio(rates, "online", others), 0.98))
    for row in read(folder, "costs").get("rows", []):
        found.append(at_most(f"T(5)/T(1), {row['pair']} at {row['level']}", row["five_over_one"], 1.15))
    host = read(folder, "host").get("rows", [])
    shares = [row["shares"]["decide"] for row in host if row["policy"] == "online"]
    found.append(at_most("the policy's share of a step, of online", max(shares, default=None), 0.05))
    gaps = [row["ms_between_graphs"]["p50"] for row in host if row.get("ms_between_graphs")]
    found.append(at_most("ms of the host between two graph launches, median", max(gaps, default=None), 0.15))
    return found


THEIRS = ("transformers:constant-4",)


def ratio(rates: dict[str, dict[str, float]], mine: str, others: tuple[str, ...]) -> float | None:
    """Return the least ratio, over levels, of one rate to the best of some others; None where none is known."""
    known = [
        by[mine] / max(by[name] for name in others if name in by)
        for by in rates.values()
        if mine in by and any(name in by for name in others)
    ]
    return min(known, default=None)
