"""Warm start, drift and merging on streams of exact traces: what learning from prompt to prompt is worth over time.

Three parts. *start*: steps until 95 % of the final goodput, from trained weights and from nothing. *drift*: streams
that change level, task or draft every 1,000 steps. *merge*: goodput by number of workers and by the steps between
merges. All seconds are modelled. Writes ``streams.md`` and plots, and with ``--doc`` puts the tables between the
markers of a document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.config import option, parse
from experiments.replays import check_traces, insert
from speckv_online.commands import run_command
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.cost import CostTable
    from speckv_online.traces import Trace

PARTS = ("start", "drift", "merge")
MARKER = "streams"
EVERYTHING = "draft, level and task"


@dataclass(frozen=True)
class StreamsConfig:
    """Settings of ``python -m experiments.replays_streams``."""

    traces: tuple[str, ...] = option((), "traces by pair, NAME=DIRECTORY, comma separated")
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: files or built-in names, comma separated")
    policies: tuple[str, ...] = option(("online", "goodput"), "policies, comma separated")
    parts: tuple[str, ...] = option(PARTS, "what to run: start, drift, merge, comma separated")
    split: str = option("test", "which split of the prompts: train, test or all")
    orders: int = option(20, "start: seeded orders of the prompts")
    streams: int = option(3, "drift: seeded streams of each kind")
    period: int = option(1000, "drift: steps between changes")
    rounds: int = option(3, "drift: how often a stream comes to each of its kinds")
    workers: tuple[str, ...] = option(("1", "4", "16", "64", "256"), "merge: numbers of workers, comma separated")
    every: tuple[str, ...] = option(("1", "10", "100", "1000", "10000"), "merge: steps between merges, comma separated")
    steps: int = option(2000, "merge: steps of each worker")
    level: str = option("int8", "merge: compression level of the traces (of the pair and the cost table named first)")
    seeds: int = option(3, "merge: seeds to average over")
    doc: str = option("", "document to put the tables into, between its markers")
    images: str = option("", "directory of the plots (default: beside the tables)")
    out: str = option("runs/streams", "directory of the tables")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if not self.costs or not self.policies or not self.parts or not set(self.parts) <= set(PARTS):
            raise UserError(f"--costs, --policies and --parts must name at least one; parts are {', '.join(PARTS)}")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if not all(text.isdigit() and int(text) > 0 for text in (*self.workers, *self.every)):
            raise UserError("--workers and --every must be whole numbers above zero")
        if min(self.orders, self.streams, self.rounds, self.steps, self.seeds) < 1 or self.period < 400:
            raise UserError("--orders, --streams, --rounds, --steps and --seeds must be at least 1, --period 400")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    description = (__doc__ or "").split("\n\n")[0]
    prog = "python -m experiments.replays_streams"
    return run_command("replays_streams", lambda: streams(parse(StreamsConfig, argv, prog, description)))


def streams(config: StreamsConfig) -> int:
    """Run the parts and write tables and plots."""
    from policies.registry import make_policy
    from speckv_online.cost import load_cost
    from speckv_online.files import write_atomically
    from speckv_online.rundir import check_writable
    from speckv_online.traces import load_traces

    for spec in config.policies:
        make_policy(spec)
    out = Path(config.out).expanduser()
    check_writable(out)
    images = Path(config.images).expanduser() if config.images else out
    check_writable(images)
    splits = () if config.split == "all" else (config.split,)
    pairs = {name: load_traces(path, splits=splits) for name, path in (text.split("=", 1) for text in config.traces)}
    tables = [load_cost(spec) for spec in config.costs]
    parts = {"start": _start, "drift": _drift, "merge": _merge}
    text = "\n\n".join("\n".join(parts[part](config, pairs, tables, images)) for part in PARTS if part in config.parts)
    write_atomically(out / "streams.md", lambda f: f.write(text + "\n"))
    if config.doc:
        insert(Path(config.doc), text + "\n", MARKER)
    print(text)
    return 0


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Pairs = dict[str, list["Trace"]]


def _start(config: StreamsConfig, pairs: Pairs, tables: list[CostTable], images: Path) -> Iterator[str]:
    from experiments.stream_plots import plot_start
    from experiments.stream_start import as_rows, start
    from speckv_online.hindsight import by_level

    rows, found = [], {}
    for pair, traces in pairs.items():
        for table in tables:
            for level, group in by_level(traces).items():
                where = f"{pair}, {table.name}, {level}"
                for spec in config.policies:
                    _say(f"start: {where}, {spec}")
                    found[where, spec] = start(spec, group, table, orders=config.orders)
                    rows.append(as_rows(where, found[where, spec]))
    plot_start({k: v for k, v in found.items() if k[1] == config.policies[0]}, images / "warm-start.png")
    yield f"### Warm start (modelled; median and quartiles of {config.orders} orders)\n"
    yield (
        "Steps until goodput over the next 200 steps is 95 % of the final one, which is that of the same policy after "
        "4,000 more steps on the same prompts. Cold: an untrained network of the same shape, or no acceptance weights. "
        "Both are told the costs beforehand. Passed if warm takes at most a third of cold.\n"
    )
    heads = ("cell", "policy", "steps, warm", "steps, cold", "first 100 steps, warm", "first 100 steps, cold", "")
    yield from _table(heads, rows)
    yield "\n![Goodput by steps from warm and cold starts](img/warm-start.png)"


def _drift(config: StreamsConfig, pairs: Pairs, tables: list[CostTable], images: Path) -> Iterator[str]:
    from experiments.stream_drift import as_rows, drift
    from experiments.stream_plots import plot_drift

    rows, found = [], {}
    for table in tables:
        for stream, kinds in _streams(pairs):
            # A stream of everything has kinds enough to come to each of them once.
            how = {"period": config.period, "rounds": 1 if stream == EVERYTHING else config.rounds}
            for spec in config.policies:
                where = f"{stream}, {table.name}"
                _say(f"drift: {where}, {spec}")
                found[where, spec] = drift(spec, kinds, table, seeds=range(config.streams), **how)
                rows.append(as_rows(where, found[where, spec]))
    plot_drift(found, config.policies, images / "drift.png")
    yield f"### Drift (modelled; {config.streams} streams of each kind, a change every {config.period} steps)\n"
    yield (
        "Goodput is relative to a settled copy of the policy, which has met only what the stream has changed to, for "
        "4,000 steps, and replays the same prompts. Back: steps after a change from which on every 100 steps are at "
        "least 95 % of it, all changes together. The last column is over the whole stream; which fixed γ comes closest "
        "is known in hindsight only.\n"
    )
    heads = ("stream", "policy", "changes", "first 100 steps", "back after", "worst kind past 300", "× nearest fixed γ")
    yield from _table(heads, rows)
    yield "\n![Goodput after a change, relative to the settled policy](img/drift.png)"


def _streams(pairs: Pairs) -> Iterator[tuple[str, dict[str, list[Trace]]]]:
    """Yield every changing stream: its name and, by kind, the traces that it changes between."""
    from speckv_online.hindsight import by_level

    mixed: dict[str, list[Trace]] = {}
    for pair, traces in pairs.items():
        for trace in traces:
            mixed.setdefault(f"{pair} {trace.level} {trace.task}", []).append(trace)
    order = np.random.default_rng(0).permutation(sorted(mixed)).tolist()
    if len(order) > 1:
        yield EVERYTHING, {kind: mixed[kind] for kind in order}
    for pair, traces in pairs.items():
        levels = by_level(traces)
        if len(levels) > 1:
            yield f"levels of {pair}", levels
        for level, group in levels.items():
            tasks = sorted({t.task for t in group})
            if len(tasks) > 1:
                yield f"tasks, {pair} {level}", {task: [t for t in group if t.task == task] for task in tasks}
    if len(pairs) > 1:
        both = {pair: by_level(traces) for pair, traces in pairs.items()}
        for level in next(iter(both.values())):
            if all(level in groups for groups in both.values()):
                yield f"drafts, {level}", {pair: groups[level] for pair, groups in both.items()}


def _merge(config: StreamsConfig, pairs: Pairs, tables: list[CostTable], images: Path) -> Iterator[str]:
    from experiments.stream_merge import grid
    from experiments.stream_plots import plot_merge

    (pair, traces), table = next(iter(pairs.items())), tables[0]
    group = [t for t in traces if t.level == config.level]
    if not group:
        raise UserError(f"the traces of {pair} have no level {config.level!r}: give another --level")
    workers, every = [int(w) for w in config.workers], [int(m) for m in config.every]
    found = {}
    for spec in config.policies:
        _say(f"merge: {spec}, {workers} workers, every {every} steps")
        found[spec] = grid(spec, group, table, workers, every, steps=config.steps, seeds=range(config.seeds))
    plot_merge(found, workers, every, images / "merge.png")
    yield f"### Merging (modelled; {pair}, {table.name}, {config.level}; mean of {config.seeds} seeds)\n"
    yield (
        f"Tokens per second of all workers together over the first {config.steps} steps of each, from a cold start. "
        f"Where m is {config.steps} or more nothing is merged.\n"
    )
    rows = [
        [f"`{spec}`", str(count), *(f"{rate:.2f}" for rate in line)]
        for spec, rates in found.items()
        for count, line in zip(workers, rates.tolist(), strict=True)
    ]
    yield from _table(("policy", "workers", *(f"m = {m}" for m in every)), rows)
    yield "\n![Goodput by steps between merges and number of workers](img/merge.png)"


if __name__ == "__main__":
    sys.exit(main())
