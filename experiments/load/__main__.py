"""Policies inside vLLM under load: throughput and latency at several loads, by vLLM's own load generator.

Starts a server per contender on loopback, drives them in turns with the held-out prompts, and stops them. Nothing is
sent and nothing is fetched. Finished blocks are kept: the same command goes on where it was stopped. Writes
``load.json``, ``load.md`` and ``load.png``. With ``--ray``, each method and dtype is a task of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.common.documents import check_place, insert
from experiments.config import launch
from experiments.load.config import NONE, WARM, LoadConfig

MARKER = "load"
#: What ``--quick`` plays.
QUICK: dict[str, Any] = {
    "methods": ("draft_model",), "contenders": (NONE, "2", "online"), "concurrency": ("1", "8"), "rates": ("2",),
    "requests": 4, "output_tokens": 32, "repeats": 1, "dtypes": ("bfloat16",),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(load, LoadConfig, argv)


def load(config: LoadConfig) -> int:
    """Play all cells, and write what they came to."""
    from experiments.load.cell import play
    from experiments.load.predicted import calibration, predict
    from experiments.load.report import COLUMNS, plot, summarise, table
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.reporting.report import markdown_table, text_table

    check_place(config.doc, MARKER)
    if config.quick:
        config = replace(config, **QUICK)
    if config.calibrated:
        for method in config.methods:
            for dtype in config.dtypes:
                calibration(config.calibrated, method, dtype)  # what is not there should show before the run
    out = Path(config.out).expanduser()
    images = Path(config.images).expanduser() if config.images else out
    for path in (out, images):
        check_writable(path)
    cells = [(method, dtype) for method in config.methods for dtype in config.dtypes]
    if config.ray:
        from experiments.runtime.ray_runner import set_environment

        set_environment(os.environ.get("RAY_ADDRESS", ""))
        from experiments.common.ray_cells import play_on_ray

        played = dict(play_on_ray(cells, lambda cell: play(config, *cell), whole_machines=True))
        results = [played[cell] for cell in cells]
    else:
        results = [play(config, *cell) for cell in cells]
    summaries = [summarise(cell) for cell in results]
    if config.calibrated:
        for summary in summaries:
            predict(config, summary)
    write_atomically(out / "load.json", lambda f: f.write(json.dumps({"cells": results, "summaries": summaries})))
    parts = []
    for summary in summaries:
        head = f"{summary['method']}, {summary['dtype']}, {'compiled' if config.compiled else 'eager'}"
        parts.append(f"**{head}**\n\n" + "\n".join(markdown_table([COLUMNS, *table(summary)])))
    write_atomically(out / "load.md", lambda f: f.write("\n\n".join(parts) + "\n"))
    plot(summaries, images / "load.png")
    if config.doc:
        text = "\n\n".join([_about(config), *parts])
        if config.images:
            link = _beside(images / "load.png", config.doc)
            text += f"\n\n![Tokens per second against milliseconds per token]({link})"
        insert(Path(config.doc), text + "\n", MARKER)
    if config.json:
        print(json.dumps(summaries))
    else:
        for summary in summaries:
            print(f"{summary['method']}, {summary['dtype']}", *text_table([COLUMNS, *table(summary)]), sep="\n")
    return 0


def _about(config: LoadConfig) -> str:
    """Say what was played."""
    import platform

    tokens = f"{(config.output_tokens + 1) // 2} to {config.output_tokens}" if config.varied else config.output_tokens
    said = f"Measured, {config.repeats} repetitions, {tokens} tokens per answer, {platform.machine()}, "
    said += f"{os.cpu_count()} cores. A policy's server lives through all blocks, and starts knowing nothing"
    said += f"; `{WARM}…` starts from a state of another run at these loads." if config.warm else "."
    return said + (" Predictions are the serving simulator's, modelled." if config.calibrated else "")


def _beside(picture: Path, document: str) -> str:
    """Return a picture's path as a document links to it."""
    return os.path.relpath(picture, Path(document).expanduser().parent).replace(os.sep, "/")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end with this process
    sys.exit(main())
