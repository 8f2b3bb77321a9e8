"""What ``python -m experiments.drift`` found, from its records alone: goodput, gamma and drift alarms over time.

Alarms are those of ADWIN (Bifet and Gavalda, 2007) and of the Page-Hinkley test (Page, 1954), as river has them, on
whether the first drafted token of each step that drafted was accepted. Unlike accepted / drafted that does not depend
on how many tokens a policy drafts; a policy that drafts nothing has no alarms. Alarms change nothing in the policies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.drift import Phase
from speckv_online.files import write_atomically
from speckv_online.records import StepRecord
from speckv_online.report import text_table
from speckv_online.report_series import GROUPS
from speckv_online.rundir import UnitResult, read_units
from speckv_online.stats import bootstrap_goodput

#: Fewest steps that Page-Hinkley and ADWIN look at before their first alarm.
GRACE = 30
#: Change of the acceptance that Page-Hinkley lets pass: with labels of 0 and 1 anything less is alarmed by chance.
DELTA = 0.1


@dataclass(frozen=True)
class Alarm:
    """A drift alarm: which detector, at which step and prompt of the stream, and in which phase."""

    detector: str
    step: int
    prompt: int
    phase: int


@dataclass(frozen=True)
class Track:
    """One policy on the stream; lists have one entry per prompt in the order of decoding, and are measured.

    Attributes
    ----------
    tokens_per_second : list of float
    acceptance : list of (float or None)
        Steps whose first drafted token was accepted / steps that drafted.
    shares : dict of str to list of float
        Share of steps by number of drafted tokens.
    phases : list of dict
        Goodput of each phase with its interval over prompts, mean gamma, and steps to the first alarm of each detector.
    """

    policy: str
    tokens_per_second: list[float]
    acceptance: list[float | None]
    shares: dict[str, list[float]]
    alarms: list[Alarm]
    phases: list[dict[str, Any]]


def tracks(units: Sequence[UnitResult], phases: Sequence[Phase], threshold: float) -> list[Track]:
    """Return a track per policy; ``threshold`` is Page-Hinkley's."""
    by_policy: dict[str, list[UnitResult]] = {}
    for unit in units:
        by_policy.setdefault(unit.unit.policy, []).append(unit)
    return [_track(policy, own, phases, threshold) for policy, own in by_policy.items()]


def _track(policy: str, units: Sequence[UnitResult], phases: Sequence[Phase], threshold: float) -> Track:
    where = [int(u.unit.prompt.split(".")[0]) for u in units]
    alarms = find_alarms([u.steps for u in units], where, threshold)
    edges = [most for _, most in GROUPS]
    counts = [np.bincount(np.searchsorted(edges, [s.drafted for s in u.steps]), minlength=len(GROUPS)) for u in units]
    rows = []
    for number, phase in enumerate(phases):
        own = [u for u, w in zip(units, where, strict=True) if w == number]
        if not own:
            continue
        start = sum(len(u.steps) for u, w in zip(units, where, strict=True) if w < number)
        steps = [s for u in own for s in u.steps]
        first = {a.detector: a.step - start for a in reversed(alarms) if a.phase == number}
        rows.append(
            {
                "phase": phase.name,
                "prompts": len(own),
                "goodput": asdict(bootstrap_goodput([u.tokens for u in own], [u.seconds for u in own])),
                "mean_gamma": sum(s.drafted for s in steps) / len(steps),
                "steps": len(steps),
                "steps_to_alarm": first,
            }
        )
    return Track(
        policy,
        [u.tokens / u.seconds for u in units],
        [_first_accepted(u.steps) for u in units],
        {label: [float(c[i] / c.sum()) for c in counts] for i, (label, _) in enumerate(GROUPS)},
        alarms,
        rows,
    )


def _first_accepted(steps: Sequence[StepRecord]) -> float | None:
    labels = [s.accepted > 0 for s in steps if s.tested]
    return sum(labels) / len(labels) if labels else None


def find_alarms(prompts: Sequence[Sequence[StepRecord]], phases: Sequence[int], threshold: float) -> list[Alarm]:
    """Run both detectors over the steps of each prompt in turn; ``phases`` has the number of each prompt's phase.

    Page-Hinkley starts afresh after an alarm, as river's does; ADWIN drops the older part of its window.
    """
    from river.drift import ADWIN, PageHinkley

    detectors = {
        "ADWIN": ADWIN(grace_period=GRACE),
        "Page-Hinkley": PageHinkley(min_instances=GRACE, delta=DELTA, threshold=threshold, mode="both"),
    }
    found, step = [], 0
    for prompt, (steps, phase) in enumerate(zip(prompts, phases, strict=True)):
        for record in steps:
            step += 1
            if not record.tested:
                continue
            for name, detector in detectors.items():
                detector.update(float(record.accepted > 0))
                if detector.drift_detected:
                    found.append(Alarm(name, step, prompt, phase))
    return found


def write_drift(path: Path, phases: Sequence[Phase], threshold: float) -> str:
    """Write ``drift.json`` and ``drift.png`` into a run directory; return the table for a terminal."""
    found = tracks(read_units(path), phases, threshold)
    document = {
        "kind": "measured",
        "phases": [asdict(phase) for phase in phases],
        "page_hinkley_threshold": threshold,
        "policies": [asdict(track) for track in found],
    }
    write_atomically(path / "drift.json", lambda f: f.write(json.dumps(document, indent=1, default=_plain) + "\n"))
    write_atomically(path / "drift.png", lambda f: plot(found, f), binary=True)
    table: list[tuple[str, ...]] = [
        ("phase", "policy", "tokens/s (measured) [95 %]", "mean γ", "steps", "steps to ADWIN", "to Page-Hinkley")
    ]
    for number in range(len(phases)):
        for track in found:
            if number < len(track.phases):
                row = track.phases[number]
                e, alarm = row["goodput"], row["steps_to_alarm"]
                table.append(
                    (
                        f"{number} {row['phase']}", track.policy, f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]",
                        f"{row['mean_gamma']:.2f}", str(row["steps"]),
                        *(str(alarm.get(name, "–")) for name in ("ADWIN", "Page-Hinkley")),
                    )
                )  # fmt: skip
    return "\n".join(text_table(table))


def plot(found: Sequence[Track], file: Any) -> None:
    """Draw goodput, acceptance with alarms, and each policy's gamma shares over the prompts of the stream, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choosing = [t for t in found if t.policy.split(":")[0] not in ("autoregressive", "fixed")]
    heights = [2.2, 1.8, *([1.2] * len(choosing))]
    figure = Figure(figsize=(9, sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for j, track in enumerate(found):
        x = np.arange(1, len(track.tokens_per_second) + 1)
        panels[0].plot(x, track.tokens_per_second, color=f"C{j}", label=track.policy, marker=".", linewidth=1.2)
        rates = [np.nan if a is None else a for a in track.acceptance]
        panels[1].plot(x, rates, color=f"C{j}", marker=".", linewidth=1.2)
        for name, marker in (("ADWIN", "v"), ("Page-Hinkley", "^")):
            at = [a.prompt + 1 for a in track.alarms if a.detector == name]
            height = 1.06 + 0.07 * j
            panels[1].plot(at, [height] * len(at), marker, color=f"C{j}", markersize=6)
    panels[0].set_ylabel("tokens/s (measured)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    panels[1].set_ylabel("first draft accepted\n▼ ADWIN, ▲ Page-H.", fontsize="small")
    ramp = ("0.8", "#cfe1f2", "#93c4de", "#4b97c9", "#1f63a8", "#08306b")
    for panel, track in zip(panels[2:], choosing, strict=True):
        x = np.arange(1, len(track.tokens_per_second) + 1)
        below = np.zeros(len(x))
        for (label, share), colour in zip(track.shares.items(), ramp, strict=True):
            panel.bar(x, share, 1.0, bottom=below, color=colour, label=f"γ {label}")
            below += share
        panel.set_ylabel(track.policy)
        panel.set_ylim(0, 1)
    if choosing:
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    panels[-1].set_xlabel("prompts decoded by each policy")
    _mark(panels, found)
    figure.savefig(file, format="png", dpi=130)


def _mark(panels: Any, found: Sequence[Track]) -> None:
    """Draw a line where the stream changes, and name the phases above the first panel."""
    longest = max(found, key=lambda track: len(track.tokens_per_second))
    start = 0.5
    for row in longest.phases:
        for panel in panels:
            panel.axvline(start, color="0.3", linewidth=0.8, linestyle=":")
        panels[0].text(
            start + row["prompts"] / 2, 1.02, row["phase"].replace("@", "\n"), fontsize=7, ha="center", va="bottom",
            transform=panels[0].get_xaxis_transform(),
        )  # fmt: skip
        start += row["prompts"]
    panels[0].set_xlim(0.5, start)


def _plain(value: Any) -> Any:
    """JSON of numpy's numbers."""
    return value.item() if hasattr(value, "item") else str(value)
