"""How far a run has come, from its files while it goes on: only what is new is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speckv_online.errors import UserError
from speckv_online.io.run_directory import UnitResult, read_from, read_manifest
from speckv_online.reporting.series import GROUPS

#: Finished prompts that the "recent" figures are over.
RECENT = 5
_EDGES = [most for _, most in GROUPS]


@dataclass
class Tally:
    """Sums over the finished units of one level and policy; seconds are those of the steps, prefill left out."""

    units: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    groups: np.ndarray = field(default_factory=lambda: np.zeros(len(GROUPS), dtype=int))
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, result: UnitResult) -> None:
        """Count a unit."""
        self.units += 1
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.steps += len(result.steps)
        self.drafted += sum(s.drafted for s in result.steps)
        self.accepted += sum(s.accepted for s in result.steps)
        which = np.searchsorted(_EDGES, [s.drafted for s in result.steps])
        self.groups += np.bincount(which, minlength=len(GROUPS))
        self.recent.append((result.tokens, result.seconds))

    def facts(self) -> dict[str, Any]:
        """Return what there is to show; ``acceptance`` is None where nothing was drafted."""
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        return {
            "prompts": self.units,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "recent_tokens_per_second": tokens / seconds,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "mean_gamma": self.drafted / self.steps,
            "gamma_share": {label: int(n) / self.steps for (label, _), n in zip(GROUPS, self.groups, strict=True)},
        }


class Progress:
    """Follows the records of a run directory; units without step records are left out.

    Parameters
    ----------
    path : str or Path
        Run directory; raises :class:`UserError` if there is none.

    Attributes
    ----------
    tallies : dict of (level, policy) to Tally
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").exists():
            raise UserError(f"{path} is not a run directory: give the --out of a run")
        self.tallies: dict[tuple[str, str], Tally] = {}
        self._offsets: dict[Path, int] = {}
        self._seen: set[tuple[str, str, str, int]] = set()
        self.manifest: dict[str, Any] = {}

    def update(self) -> list[UnitResult]:
        """Read what was written since the last call, and return the units that are new."""
        if (self.path / "run.json").exists():  # it is written a little later than the config
            self.manifest = read_manifest(self.path)
        fresh = []
        for file in sorted(self.path.glob("steps-*.jsonl")):
            start = self._offsets.get(file, 0)
            if file.stat().st_size < start:
                start = 0  # cut back when the run was resumed; units that are known do not count again
            for result, offset in read_from(file, start):
                self._offsets[file] = offset
                if result is not None and result.steps and result.unit.key not in self._seen:
                    self._seen.add(result.unit.key)
                    self.tallies.setdefault((result.unit.level, result.unit.policy), Tally()).add(result)
                    fresh.append(result)
        return fresh

    @property
    def finished(self) -> bool:
        """True once the run says that it has ended, with all levels or without some."""
        return self.manifest.get("status") in ("finished", "incomplete")

    def snapshot(self) -> dict[str, Any]:
        """Return all figures, ready for JSON; they are measured."""
        of = prompts_per_policy(self.manifest)
        rows = [{"level": level, "policy": policy, "of": of} | t.facts() for (level, policy), t in self.tallies.items()]
        return {
            "run": self.path.resolve().name,
            "status": self.manifest.get("status", "starting"),
            "kind": "measured",
            "rows": rows,
        }


def prompts_per_policy(manifest: Mapping[str, Any]) -> int | None:
    """Return how many prompts, all seeded orders together, each policy is to decode at each level, if that is known."""
    count, orders = manifest.get("prompts", {}).get("count"), len(manifest.get("seeds", []))
    return count * orders if count and orders else None
