"""What the plug-in counts, and how a server's metrics show it."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from speckv_online.io.files import write_atomically

#: Names of the metrics, what their labels are, and what they count.
METRICS = {
    "steps": (("rows", "gamma"), "engine steps, by requests in them (rounded up to a power of two) and drafts chosen"),
    "drafted_tokens": (("position",), "drafted tokens that were verified, by position in their draft"),
    "accepted_tokens": (("position",), "drafted tokens that were accepted, by position in their draft"),
    "trimmed_tokens": ((), "drafted tokens that were not verified"),
    "fallbacks": (("kind",), "failures of the policy or of the plug-in; such steps fall back to the configured number"),
    "seconds": ((), "seconds of steps that only decoded"),
    "plain_seconds": ((), "seconds that the same tokens would have taken without drafts, as estimated"),
    "policy_seconds": ((), "seconds that the plug-in itself took"),
}


class Counts:
    """Counters by name and labels."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in METRICS}

    def add(self, name: str, amount: float = 1, *labels: object) -> None:
        """Add to a counter."""
        self._found[name][tuple(map(str, labels))] += amount  # type: ignore[assignment]

    def of(self, name: str) -> Counter[tuple[str, ...]]:
        """Return a counter's values by labels."""
        return self._found[name]

    def total(self, name: str) -> float:
        """Return a counter's sum over labels."""
        return sum(self._found[name].values())

    def as_json(self) -> dict[str, Any]:
        """Return all of them: labels are joined by a slash."""
        found: dict[str, Any] = {}
        for name, values in self._found.items():
            own = {"/".join(labels): value for labels, value in values.items()}
            found[name] = own.get("", 0) if not METRICS[name][0] else own
        return found


class Publisher:
    """Shows counts to Prometheus where processes share metrics by files, and in a file.

    An engine's core is a process of its own. With ``PROMETHEUS_MULTIPROC_DIR`` set before the server starts, what the
    core counts appears at the server's ``/metrics``, as ``speckv:...``.

    Parameters
    ----------
    file : str
        A JSON file to write too; empty for none.
    """

    def __init__(self, file: str = "") -> None:
        self._file, self._shown = file, Counts()
        self._counters: dict[str, Any] = {}
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            from prometheus_client import CollectorRegistry, Counter

            registry = CollectorRegistry()
            for name, (labels, text) in METRICS.items():
                self._counters[name] = Counter(f"speckv:{name}", text, labels, registry=registry)

    @property
    def shows(self) -> bool:
        """Whether there is anywhere to show counts."""
        return bool(self._counters or self._file)

    def show(self, counts: Counts) -> None:
        """Show counts as they are now."""
        for name, counter in self._counters.items():
            shown = self._shown.of(name)
            for labels, value in counts.of(name).items():
                if more := value - shown[labels]:
                    (counter.labels(*labels) if labels else counter).inc(more)
                    shown[labels] = value
        if self._file:
            write_atomically(Path(self._file), lambda f: f.write(json.dumps(counts.as_json())))
