"""Drift and merging on streams of exact traces: how soon a policy is back after a change, and what sharing is worth.

Two parts. *drift*: streams that change level, task or draft every 1,000 steps. *merge*: goodput by number of workers
and by the steps between merges. All seconds are modelled. Writes ``streams.md`` and plots; ``--doc`` puts the tables
between the markers of a document. A run that was stopped is continued by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.documents import check_place, insert
from experiments.config import launch
from experiments.streams.config import PARTS, StreamsConfig
from speckv_online.reporting.report import markdown_table

MARKER = "streams"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(streams, StreamsConfig, argv)


def streams(config: StreamsConfig) -> int:
    """Play what is left to play, and write tables and plots."""
    from experiments.common.cached_cells import contents, run
    from experiments.common.trace_sources import named_costs
    from experiments.streams.cells import cells, play, weight
    from policies.registry import make_policy
    from speckv_online.io import manifest
    from speckv_online.io.files import exclusive, write_atomically
    from speckv_online.io.run_directory import RunDir, check_writable

    for spec in config.policies:
        make_policy(spec)
    check_place(config.doc, MARKER)
    out = Path(config.out).expanduser()
    costs, todo = named_costs(config.costs), cells(config)
    directory = RunDir.open(out, asdict(config), volatile=StreamsConfig.VOLATILE)
    images = Path(config.images).expanduser() if config.images else out
    check_writable(images)
    with exclusive(out):
        names = {"traces": [text.partition("=")[0] for text in config.traces], "costs": [name for name, _ in costs]}
        settings = asdict(config) | names | {"out": "", "doc": "", "images": ""}
        facts = manifest.collect(command="python -m experiments.streams", config=settings)
        directory.write_manifest(facts)
        log, many = out / "cells.jsonl", config.processes
        held = contents([*(text.partition("=")[2] for text in (*config.traces, *config.settled)), *config.costs])
        code, specs = ["experiments.streams.cells"], config.policies
        found = run(
            todo, partial(play, config), log, code=code, policies=specs, settings=held, weight=weight, processes=many
        )
        directory.write_manifest(facts | {"status": "finished", "finished": manifest.now()})
    parts = {"drift": _drift, "merge": _merge}
    text = "\n\n".join(
        "\n".join(parts[part](config, {c: found[c] for c in todo if c[0] == part}, images))
        for part in PARTS
        if part in config.parts
    )
    write_atomically(out / "streams.md", lambda f: f.write(text + "\n"))
    if config.doc:
        insert(Path(config.doc), text + "\n", MARKER)
    print(text)
    return 0


Found = dict[tuple[str, ...], Any]


def _drift(config: StreamsConfig, found: Found, images: Path) -> Iterator[str]:
    from experiments.streams.drift import Drift, as_rows
    from experiments.streams.plots import plot_drift

    drifts = {(f"{stream}, {cost}", spec): Drift.from_json(one) for (_, cost, stream, spec), one in found.items()}
    plot_drift(drifts, config.policies, images / "drift.png")
    yield f"### Drift (modelled; {config.streams} streams of each kind, a change every {config.period} steps)\n"
    yield (
        "Goodput is relative to a settled copy of the policy, which has met only what the stream has changed to, for "
        "4,000 steps, and replays the same prompts. Back: steps after a change from which on every 100 steps are at "
        "least 95 % of it, all changes together. "
    )
    other = ["first 100 steps, others", "back after, others"] if config.settled else []
    if other:
        yield (
            "A copy that settles on the stream's own prompts has met each of them a hundred times and knows their "
            "tokens; *others* is relative to a copy that has settled on other prompts of the same kind. "
        )
    yield "The last column is over the whole stream; which fixed γ comes closest is known in hindsight only.\n"
    start = ("stream", "policy", "changes", "first 100 steps", "back after", "worst kind past 300")
    heads = (*start, *other, "× nearest fixed γ")
    yield from markdown_table([heads, *(as_rows(where, one) for (where, _), one in drifts.items())])
    yield "\n![Goodput after a change, relative to the settled policy](img/drift.png)"


def _merge(config: StreamsConfig, found: Found, images: Path) -> Iterator[str]:
    from experiments.common.trace_sources import named_costs
    from experiments.streams.plots import plot_merge

    workers, every = [int(w) for w in config.workers], [int(m) for m in config.every]
    rates = {
        spec: np.array([[found["merge", spec, w, m] for m in config.every] for w in config.workers])
        for spec in config.policies
    }
    plot_merge(rates, workers, every, images / "merge.png")
    pair, (cost, _) = config.traces[0].partition("=")[0], named_costs(config.costs)[0]
    yield f"### Merging (modelled; {pair}, {cost}, {config.level}; at least {config.walkers} streams a figure)\n"
    yield (
        f"Tokens per second of all workers together over the first {config.steps} steps of each, from a cold start. "
        f"Where m is {config.steps} or more nothing is merged. Up to {config.walkers} workers streams are the same. "
        "Even a lone worker gains by exchanging at every step: its policy then decides by its latest posterior, which "
        "it else solves for every 16 or 128 steps.\n"
    )
    rows = [
        [f"`{spec}`", str(count), *(f"{rate:.2f}" for rate in line)]
        for spec, table in rates.items()
        for count, line in zip(workers, table.tolist(), strict=True)
    ]
    yield from markdown_table([("policy", "workers", *(f"m = {m}" for m in every)), *rows])
    yield "\n![Goodput by steps between merges and number of workers](img/merge.png)"


if __name__ == "__main__":
    sys.exit(main())
