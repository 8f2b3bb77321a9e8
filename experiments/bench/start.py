"""What a start takes: seconds from ``speckv generate`` to the first and the last token, and the peak of its memory.

Each run is a process of its own. The levels take turns. The first run of a level may make what later ones map.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
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


def start(level: str, tokens: int) -> dict[str, float]:
    """Run the command once; return seconds to the first and to the last token, and megabytes at the peak."""
    asked = ("--prompt", PROMPT, "--level", level, "--max-new-tokens", str(tokens))
    began = perf_counter()
    command = [sys.executable, "-m", "speckv_online.cli", "generate", *asked]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as process,
    ):
        text: IO[bytes] = process.stdout  # type: ignore[assignment]
        first = text.read(1)
        seen, peak = perf_counter(), memory_of(process.pid).get("peak", 0)
        while text.read(4096):
            peak = max(peak, memory_of(process.pid).get("peak", 0))
        ended = perf_counter()
        process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode or not first:
        raise UserError(f"speckv generate --level {level} failed: {said[-300:] or 'no text'}")
    return {"first_token": seen - began, "last_token": ended - began, "peak_mb": peak / 1e6}


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
    print(f"measured, medians of {config.runs}\nlevel     first token, s   {config.tokens} tokens, s   peak, MB")
    for level, row in rows.items():
        print(f"{level:<8}{row['first_token']:16.2f}{row['last_token']:16.2f}{row['peak_mb']:11.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
