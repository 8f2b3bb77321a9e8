"""What ``python -m experiments.drift`` found, from its records alone: goodput, gamma and drift alarms over time.

Alarms are those of ADWIN (Bifet and Gavalda, 2007) and of the Page-Hinkley test (Page, 1954), as river has them, on
whether the first drafted token of each step that drafted was accepted. Unlike accepted / drafted that does not depend
on how many tokens a policy drafts; a policy that drafts nothing has no alarms. Alarms change nothing in the policies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.documents import insert
from experiments.drift.config import Phase
from experiments.drift.plot import plot
from experiments.drift.tracks import Alarm, Track
from speckv_online.io.files import write_atomically
from speckv_online.io.manifest import describe
from speckv_online.io.run_directory import UnitResult, read_manifest, read_units
from speckv_online.io.step_records import StepRecord
from speckv_online.io.tables import finite
from speckv_online.reporting.report import markdown_table, text_table
from speckv_online.reporting.series import GROUPS
from speckv_online.stats import Estimate, bootstrap_goodput, paired_ratio

#: Fewest steps that Page-Hinkley and ADWIN look at before their first alarm.
GRACE = 30
#: Change of the acceptance that Page-Hinkley lets pass: with labels of 0 and 1 anything less is alarmed by chance.
DELTA = 0.1


def tracks(units: Sequence[UnitResult], phases: Sequence[Phase], threshold: float) -> list[Track]:
    """Return a track per policy; ``threshold`` is Page-Hinkley's."""
    by_policy: dict[str, list[UnitResult]] = {}
    for unit in units:
        by_policy.setdefault(unit.unit.policy, []).append(unit)
    return [_track(policy, by_policy, phases, threshold) for policy in by_policy]


def _track(
    policy: str, by_policy: Mapping[str, Sequence[UnitResult]], phases: Sequence[Phase], threshold: float
) -> Track:
    units = by_policy[policy]
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
        bootstrap_goodput([u.tokens for u in units], [u.seconds for u in units]),
        {other: _ratio(units, theirs) for other, theirs in by_policy.items() if other != policy},
    )


def _ratio(units: Sequence[UnitResult], others: Sequence[UnitResult]) -> Estimate:
    """Ratio of goodputs, paired by prompt: policies take turns in going first, so their records are in other orders."""
    prompts = {u.unit.prompt: u for u in others}
    sides = units, [prompts[u.unit.prompt] for u in units]
    return paired_ratio(*([getattr(u, name) for u in side] for side in sides for name in ("tokens", "seconds")))


def _first_accepted(steps: Sequence[StepRecord]) -> float | None:
    labels = [s.accepted > 0 for s in steps if s.labelled]
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
            if not record.labelled:
                continue
            for name, detector in detectors.items():
                detector.update(float(record.accepted > 0))
                if detector.drift_detected:
                    found.append(Alarm(name, step, prompt, phase))
    return found


def write_drift(path: Path, phases: Sequence[Phase], threshold: float) -> str:
    """Write ``drift.json``, ``drift.md`` and ``drift.png`` into a run directory; return the tables for a terminal."""
    found = tracks(read_units(path), phases, threshold)
    document = {
        "kind": "measured",
        "phases": [asdict(phase) for phase in phases],
        "page_hinkley_threshold": threshold,
        "policies": [asdict(track) for track in found],
    }
    as_json = json.dumps(finite(document), indent=1, default=_plain) + "\n"
    write_atomically(path / "drift.json", lambda f: f.write(as_json))
    write_atomically(path / "drift.png", lambda f: plot(found, f), binary=True)
    table: list[tuple[str, ...]] = [
        ("phase", "policy", "tokens/s (measured) [95 %]", "mean γ", "steps", "steps to ADWIN", "to Page-Hinkley")
    ]
    for number in range(len(phases)):
        for track in found:
            if number < len(track.phases):
                row = track.phases[number]
                alarm = row["steps_to_alarm"]
                table.append(
                    (
                        f"{number} {row['phase']}", track.policy, Estimate(**row["goodput"]).text(),
                        f"{row['mean_gamma']:.2f}", str(row["steps"]),
                        *(str(alarm.get(name, "–")) for name in ("ADWIN", "Page-Hinkley")),
                    )
                )  # fmt: skip
    names = [track.policy for track in found]
    whole: list[tuple[str, ...]] = [
        ("phase", "policy", "tokens/s (measured) [95 %]", *(f"× {name} [95 %]" for name in names))
    ]
    for track in found:
        ratios = (track.over[name].text() if name in track.over else "1" for name in names)
        whole.append(("whole stream", track.policy, track.whole.text(), *ratios))
    text = "\n".join([*markdown_table(whole), "", *markdown_table(table)]) + "\n"
    write_atomically(path / "drift.md", lambda f: f.write(text))
    return "\n".join([*text_table(table), "", *text_table(whole)])


def publish(path: Path, doc: str, picture: str) -> None:
    """Put the tables of a run into a document, and its plot where ``picture`` says; empty text leaves either away."""
    if picture:
        image = (path / "drift.png").read_bytes()
        write_atomically(Path(picture).expanduser(), lambda f: f.write(image), binary=True)
    if doc:
        facts = describe(read_manifest(path))
        image_link = f"\n![Goodput, acceptance and γ over the stream](img/{Path(picture).name})\n" if picture else ""
        text = (path / "drift.md").read_text(encoding="utf-8")
        insert(Path(doc), f"Measured; 95 % intervals over prompts. {facts}\n\n{text}{image_link}", "drift")


def _plain(value: Any) -> Any:
    """JSON of numpy's numbers."""
    return value.item() if hasattr(value, "item") else str(value)
