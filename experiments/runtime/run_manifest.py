"""The manifest of a run while it goes on, and how the run ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runtime.call_watch import PolicyGivenUp
from experiments.runtime.display import Display
from experiments.runtime.work_queue import Event
from speckv_online.errors import UserError
from speckv_online.io import manifest
from speckv_online.io.run_directory import RunDir, UnitResult, read_manifest, read_units

#: What a manifest says of where its figures were measured.
MEASURED = ("version", "started", "hardware", "software", "git", "schedule")


def earlier_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an earlier part of the run, if there is one: finished levels are not run again."""
    try:
        return read_manifest(path)
    except UserError:
        return {}


def where_measured(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a manifest that says where its figures were measured."""
    return {key: facts[key] for key in MEASURED if key in facts}


class RunManifest:
    """Keeps the manifest of a run up to date, and ends the run: with its report, and an exit code that tells the truth.

    Parameters
    ----------
    run : RunDir
        Where to write.
    facts : dict
        The manifest; it is filled as the run goes on. Until a worker is ready to decode, it says of the measurements
        what it said before.
    display : Display
        Where to say what cannot be written.
    """

    def __init__(self, run: RunDir, facts: dict[str, Any], display: Display) -> None:
        earlier = earlier_manifest(run.path)
        self.run, self.display, self.here = run, display, where_measured(facts)
        self.facts = (
            facts | {"workers": earlier.get("workers", {}), "failed": {}, "given_up": {}} | where_measured(earlier)
        )
        self.facts["notes"] = list(dict.fromkeys([*facts.get("notes", []), *earlier.get("notes", [])]))
        self.errors: list[BaseException] = []
        self.first: dict[str, int] = {}  # by level the worker that was ready first
        self.unwritten = ""  # what was said last of a manifest that cannot be written

    def other_weights(self, event: Event) -> Event | None:
        """Return a failure to put in an event's place, if its worker has other weights than those of the records."""
        found = _hashes(event.facts or {})
        for level, entry in self.facts["workers"].items():
            known = _hashes(entry)
            for role in (r for r in found if r in known and found[r] != known[r]):
                text = f"the {role} has other weights than at {level} before: put those back or give another --out"
                return Event(event.level, "failed", event.worker, text=text, error=UserError(text))
        return None

    def note(self, event: Event) -> None:
        """Take in an event of the run."""
        if event.facts:
            self._measured_here()
            entry = self.facts["workers"].setdefault(event.level, {})
            faults = dict(Counter(entry.get("faults", {})) + Counter(event.facts.get("faults", {})))
            if event.worker != self.first.setdefault(event.level, event.worker):  # that one stands for its level
                entry.setdefault("others", {}).setdefault(str(event.worker), {}).update(event.facts)
            else:
                entry.update(event.facts)
            entry["faults"] = faults
        elif isinstance(event.error, PolicyGivenUp):
            if event.error.policy not in self.facts["given_up"]:
                self.facts["given_up"][event.error.policy] = {"reason": event.error.reason}
                self.errors.append(event.error)
        elif event.kind == "failed" and event.error is not None:
            self.facts["failed"][event.level] = event.text.replace(f"{self.run.path}/", "")  # no path in a manifest
            self.errors.append(event.error)
        else:
            return
        self.save()

    def _measured_here(self) -> None:
        """From now on figures are measured here; if earlier ones were not, readers are told."""
        changed = [
            key for key in ("hardware", "software", "git", "schedule") if self.facts.get(key) != self.here.get(key)
        ]
        if changed and self.facts["workers"]:
            note = f"Decoded in parts, between which this changed: {', '.join(changed)}. The figures mix them."
            self.facts["notes"] = list(dict.fromkeys([*self.facts["notes"], note]))
        self.facts.update(self.here)

    def save(self) -> None:
        """Write the manifest; a full disk must not end a run that can still decode."""
        try:
            self.run.write_manifest(self.facts)
            self.unwritten = ""
        except UserError as error:
            if str(error) != self.unwritten:
                self.display.say(str(error))
            self.unwritten = str(error)

    def finish(self, *, as_json: bool) -> int:
        """Write and print the report; return the exit code. A run in which nothing worked raises what went wrong."""
        from speckv_online.reporting.data import build_report
        from speckv_online.reporting.report import to_json, to_text, write_report

        self._count_given_up()
        status = "incomplete" if self.errors else "finished"
        self.facts.update(status=status, finished=manifest.now())
        self.save()
        if self.errors and not self._units():
            raise self.errors[0]
        where = str(self.run.path)
        last = f"Run: {where}\nReport: {where}/report.html"
        try:
            report = write_report(self.run.path)
        except UserError as error:
            self.display.say(str(error))
            report, last = build_report(self.run.path, self.facts), f"Run: {where}"
            status = "incomplete"
        print(json.dumps(to_json(report) | {"run": where}) if as_json else f"\n{to_text(report)}\n{last}")
        if self.errors:
            self.display.say(f"not everything was decoded; when the cause is gone, go on with --resume {where}")
        return 0 if status == "finished" else 1

    def _units(self) -> list[UnitResult]:
        return read_units(self.run.path) if any(self.run.path.glob("steps-*.jsonl")) else []

    def _count_given_up(self) -> None:
        """Note how many units of policies that were given up are missing; one that misses none was not."""
        config, prompts = self.facts["config"], self.facts["prompts"]["count"]
        done = Counter(result.unit.policy for result in self._units()) if self.facts["given_up"] else Counter()
        for policy, entry in list(self.facts["given_up"].items()):
            entry["units"] = len(config["levels"]) * config["orders"] * prompts - done[policy]
            if not entry["units"]:
                del self.facts["given_up"][policy]
                self.errors = [e for e in self.errors if getattr(e, "policy", None) != policy]


def _hashes(facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Hashes of the weights of a worker's models, by role, where they come from a folder."""
    return {role: found["sha256"] for role, found in facts.get("models", {}).items() if isinstance(found, dict)}
