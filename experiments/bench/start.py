"""What a start takes: seconds from ``speckv generate`` to the first and the last token, and the peaks of its memory.

Each run is a process of its own. The levels take turns. The first run of a level may make what later ones map.

Two peaks are told: of all that is in memory, and of what is the process's own. The first holds pages of mapped files
too. How many of those is up to the system: Linux 6.18 may map two megabytes at a time, older ones map 64 kilobytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import IO

from experiments.common.process_memory import memory_of
from experiments.config import launch, option
from speckv_online.errors import UserError

PROMPT = "Explain in a few sentences why the sky is blue."


@dataclass(frozen=True)
class StartConfig:
    """Settings of ``python -m experiments.bench.start``."""

    levels: tuple[str, ...] = option(("fp16", "int8", "nf4", "q4_1"), "levels of the default target, comma separated")
    runs: int = option(5, "runs of each level")
    tokens: int = option(64, "tokens of each run")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.runs < 1 or self.tokens < 1 or not self.levels:
            raise UserError("--runs and --tokens must be at least 1, and --levels must name a level")


class Peaks(threading.Thread):
    """Watches the memory of a process until it ends: what it has at most, in bytes."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.own = process, 0, 0
        self.start()

    def run(self) -> None:
        """Look fifty times a second. A peak of all memory is kept by the system; one of its own is not."""
        while found := memory_of(self.process):
            self.peak, self.own = max(self.peak, found.get("peak", 0)), max(self.own, found.get("own", 0))
            sleep(0.02)


def start(level: str, tokens: int) -> dict[str, float]:
    """Run the command once; return seconds to the first and to the last token, and megabytes at the peaks."""
    asked = ("--prompt", PROMPT, "--level", level, "--max-new-tokens", str(tokens))
    began = perf_counter()
    command = [sys.executable, "-m", "speckv_online.cli", "generate", *asked]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as process,
    ):
        text: IO[bytes] = process.stdout  # type: ignore[assignment]
        memory = Peaks(process.pid)
        first = text.read(1)
        seen = perf_counter()
        while text.read(4096):
            pass
        ended = perf_counter()
        process.wait()
        memory.join()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode or not first:
        raise UserError(f"speckv generate --level {level} failed: {said[-300:] or 'no text'}")
    taken = {"first_token": seen - began, "last_token": ended - began}
    return taken | {"peak_mb": memory.peak / 1e6, "own_mb": memory.own / 1e6}


def measure(config: StartConfig) -> dict[str, dict[str, float]]:
    """Return the medians by level."""
    found = {level: list[dict[str, float]]() for level in config.levels}
    for _ in range(config.runs):
        for level, runs in found.items():
            runs.append(start(level, config.tokens))
    return {level: {name: median(run[name] for run in runs) for name in runs[0]} for level, runs in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, StartConfig, argv)


def bench(config: StartConfig) -> int:
    """Run the benchmark and print it."""
    rows = measure(config)
    if config.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"measured, medians of {config.runs}")
    print(f"level     first token, s   {config.tokens} tokens, s   peak, MB   its own, MB")
    for level, row in rows.items():
        seconds = f"{row['first_token']:16.2f}{row['last_token']:16.2f}"
        print(f"{level:<8}{seconds}{row['peak_mb']:11.0f}{row['own_mb']:14.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
