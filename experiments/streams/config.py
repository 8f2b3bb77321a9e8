"""What the experiments on endless streams of traces are told."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.trace_sources import check_traces
from experiments.config import option
from speckv_online.errors import UserError

PARTS = ("drift", "merge")


@dataclass(frozen=True)
class StreamsConfig:
    """Settings of ``python -m experiments.streams``."""

    traces: tuple[str, ...] = option((), "traces by pair, NAME=DIRECTORY, comma separated")
    settled: tuple[str, ...] = option(
        (), "drift: traces of other prompts, by pair as in --traces, for settled copies to settle on as well"
    )
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: files or built-in names, comma separated")
    policies: tuple[str, ...] = option(("online",), "policies, comma separated")
    parts: tuple[str, ...] = option(PARTS, "what to run: drift, merge, comma separated")
    split: str = option("test", "which split of the prompts: train, test or all")
    streams: int = option(3, "drift: seeded streams of each kind")
    period: int = option(1000, "drift: steps between changes")
    rounds: int = option(3, "drift: how often a stream changes to each of its kinds")
    workers: tuple[str, ...] = option(("1", "4", "16", "64", "256"), "merge: numbers of workers, comma separated")
    every: tuple[str, ...] = option(("1", "10", "100", "1000", "10000"), "merge: steps between merges, comma separated")
    steps: int = option(1000, "merge: steps of each worker")
    level: str = option("int8", "merge: compression level of the traces (of the pair and the cost table named first)")
    walkers: int = option(16, "merge: least streams behind a figure; few workers are run with several seeds")
    processes: int = option(1, "how many cells to play at a time")
    doc: str = option("", "document to put the tables into, between its markers")
    images: str = option("", "directory of the plots (default: beside the tables)")
    out: str = option("runs/streams", "run directory, continued if it holds the same run")

    VOLATILE = ("parts", "policies", "workers", "every", "processes", "doc", "images", "out")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if self.settled:
            check_traces(self.settled, "--settled")
        if not self.costs or not self.policies or not self.parts or not set(self.parts) <= set(PARTS):
            raise UserError(f"--costs, --policies and --parts must name at least one; parts are {', '.join(PARTS)}")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if not all(text.isdecimal() and int(text) > 0 for text in (*self.workers, *self.every)):
            raise UserError("--workers and --every must be whole numbers above zero")
        counts = ("streams", "rounds", "steps", "walkers", "processes")
        if min(getattr(self, name) for name in counts) < 1 or self.period < 400:
            raise UserError(f"--period must be at least 400, and all of {', '.join(counts)} at least 1")
