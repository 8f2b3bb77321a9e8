"""The manifest of a run while it goes on, and how the run ends."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.display import Display
from experiments.work import Event
from speckv_online import manifest
from speckv_online.errors import UserError
from speckv_online.rundir import RunDir, read_manifest, read_units


def earlier_workers(path: Path) -> dict[str, Any]:
    """Return what the manifest of an earlier part of the run says of its workers: finished levels are not run again."""
    try:
        return dict(read_manifest(path).get("workers", {}))
    except UserError:
        return {}


class Ledger:
    """Keeps the manifest of a run up to date, and ends the run: with its report, and an exit code that tells the truth.

    Parameters
    ----------
    run : RunDir
        Where to write.
    facts : dict
        The manifest; it is filled as the run goes on.
    display : Display
        Where to say what cannot be written.
    """

    def __init__(self, run: RunDir, facts: dict[str, Any], display: Display) -> None:
        self.run, self.facts, self.display = run, facts, display
        self.errors: list[BaseException] = []

    def note(self, event: Event) -> None:
        """Take in an event of the run."""
        if event.facts:
            entry = self.facts["workers"].setdefault(event.level, {})
            faults = dict(Counter(entry.get("faults", {})) + Counter(event.facts.get("faults", {})))
            if event.worker and "device" in entry:  # the first worker stands for its level
                entry.setdefault("others", {}).setdefault(str(event.worker), {}).update(event.facts)
            else:
                entry.update(event.facts)
            entry["faults"] = faults
        elif event.kind == "failed" and event.error is not None:
            self.facts["failed"][event.level] = event.text.replace(f"{self.run.path}/", "")  # no path in a manifest
            self.errors.append(event.error)
        else:
            return
        self.save()

    def save(self) -> None:
        """Write the manifest; a full disk must not end a run that can still decode."""
        try:
            self.run.write_manifest(self.facts)
        except UserError as error:
            self.display.say(str(error))

    def finish(self, *, as_json: bool) -> int:
        """Write and print the report; return the exit code. A run in which nothing worked raises what went wrong."""
        from speckv_online.report import to_json, to_text, write_report
        from speckv_online.report_data import build_report

        if self.errors and not read_units(self.run.path):
            raise self.errors[0]
        status = "incomplete" if self.errors else "finished"
        self.facts.update(status=status, finished=manifest.now())
        self.save()
        try:
            report = write_report(self.run.path)
        except UserError as error:
            self.display.say(str(error))
            report = build_report(self.run.path)
            status = "incomplete"
        where = str(self.run.path)
        print(json.dumps(to_json(report) | {"run": where}) if as_json else f"\n{to_text(report)}\nRun: {where}")
        if self.errors:
            self.display.say(f"not everything was decoded; when the cause is gone, go on with --resume {where}")
        return 0 if status == "finished" else 1
