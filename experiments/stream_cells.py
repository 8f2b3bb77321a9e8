"""Cells of ``python -m experiments.replays_streams``: what there is to play, playing it side by side, and resuming.

A cell is one policy in one place: a pair, cost table and level, a changing stream, or a number of workers and of steps
between merges. Each goes into an append-only log when it is done, with a digest of the policies' code and weights: a
run that is started again plays what the log lacks, or what the policies of that time played.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speckv_online.cost import CostTable, load_cost
from speckv_online.errors import UserError
from speckv_online.hindsight import by_level
from speckv_online.traces import Trace, load_traces

if TYPE_CHECKING:
    from experiments.replays_streams import StreamsConfig

EVERYTHING = "draft, level and task"
#: Part, where, policy; all text, so that it is the same in JSON.
Cell = tuple[str, ...]
Kinds = dict[str, list[Trace]]


def cells(config: StreamsConfig) -> list[Cell]:
    """Return all cells of the parts that are asked for, in the order of the tables."""
    found: list[Cell] = []
    tables = [name for name, _ in named_costs(config.costs)]
    pairs = _pairs(config.traces, config.split)
    if "start" in config.parts:
        places = [(pair, name, lv) for pair, own in pairs.items() for name in tables for lv in by_level(own)]
        found += [("start", *place, spec) for place in places for spec in config.policies]
    if "drift" in config.parts:
        found += [("drift", name, stream, spec) for name in tables for stream in streams(pairs)
                  for spec in config.policies]  # fmt: skip
    if "merge" in config.parts:
        pair, own = next(iter(pairs.items()))
        if config.level not in by_level(own):
            raise UserError(f"the traces of {pair} have no level {config.level!r}: give another --level")
        found += [("merge", spec, count, every) for spec in config.policies for count in config.workers
                  for every in config.every]  # fmt: skip
    return found


def play(config: StreamsConfig, cell: Cell) -> Any:
    """Play one cell; the result is ready for JSON."""
    part, *where = cell
    costs, pairs = dict(named_costs(config.costs)), _pairs(config.traces, config.split)
    if part == "start":
        from experiments.stream_start import start

        pair, name, level, spec = where
        group = by_level(pairs[pair])[level]
        return start(spec, group, costs[name], orders=config.orders).as_json()
    if part == "drift":
        from experiments.stream_drift import drift

        name, stream, spec = where
        # A stream of everything has kinds enough to come to each of them once.
        rounds = 1 if stream == EVERYTHING else config.rounds
        kinds, seeds = streams(pairs)[stream], range(config.streams)
        return drift(spec, kinds, costs[name], period=config.period, rounds=rounds, seeds=seeds).as_json()
    from experiments.stream_merge import simulate

    spec, count, every = where
    pair, name = next(iter(pairs)), next(iter(costs))
    group = by_level(pairs[pair])[config.level]
    setting = {"workers": int(count), "every": int(every), "steps": config.steps}
    # Goodput is over all workers: few of them need more seeds for a steady mean.
    seeds = range(-(-config.walkers // int(count)))
    return float(np.mean([simulate(spec, group, costs[name], **setting, seed=seed) for seed in seeds]))


def streams(pairs: Mapping[str, Sequence[Trace]]) -> dict[str, Kinds]:
    """Return every changing stream: by its name the traces, by kind, that it changes between."""
    found: dict[str, Kinds] = {}
    mixed: Kinds = {}
    for pair, traces in pairs.items():
        for trace in traces:
            mixed.setdefault(f"{pair} {trace.level} {trace.task}", []).append(trace)
    order = np.random.default_rng(0).permutation(sorted(mixed)).tolist()
    if len(order) > 1:
        found[EVERYTHING] = {kind: mixed[kind] for kind in order}
    levels = {pair: by_level(traces) for pair, traces in pairs.items()}
    for pair, groups in levels.items():
        if len(groups) > 1:
            found[f"levels of {pair}"] = groups
        for level, group in groups.items():
            tasks = sorted({t.task for t in group})
            if len(tasks) > 1:
                found[f"tasks, {pair} {level}"] = {task: [t for t in group if t.task == task] for task in tasks}
    for level in next(iter(levels.values())):
        if len(pairs) > 1 and all(level in groups for groups in levels.values()):
            found[f"drafts, {level}"] = {pair: groups[level] for pair, groups in levels.items()}
    return found


def run(config: StreamsConfig, todo: Sequence[Cell], log: Path) -> dict[Cell, Any]:
    """Play the cells that the log lacks, and return the results of all."""
    from tqdm import tqdm

    version = code_digest()
    done = {cell: found for cell, found in _read(log, version) if cell in set(todo)}
    left = [cell for cell in todo if cell not in done]
    # The longest first, so that no process is left with one at the end: many workers that merge often.
    left.sort(key=lambda c: -int(c[2]) * (1 + 10 / int(c[3])) if c[0] == "merge" else 0.0)
    bar = tqdm(total=len(todo), initial=len(done), unit="cell", disable=not sys.stderr.isatty(), file=sys.stderr)
    with log.open("a", encoding="utf-8") as file:
        if log.stat().st_size and not log.read_bytes().endswith(b"\n"):
            file.write("\n")  # a kill cut the last line short
        for cell, found in _play_all(config, left):
            done[cell] = found
            file.write(json.dumps({"cell": cell, "code": version, "found": found}) + "\n")
            file.flush()
            bar.update()
            if bar.disable:
                print(f"{len(done)}/{len(todo)} {', '.join(cell)}", file=sys.stderr, flush=True)
    return done


def code_digest() -> str:
    """Return a short hash of the policies' code and of the weights that they ship with."""
    import policies

    digest = hashlib.sha256()
    for file in sorted(f for f in Path(str(policies.__file__)).parent.rglob("*") if f.suffix in (".py", ".npz")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _play_all(config: StreamsConfig, todo: Sequence[Cell]) -> Iterator[tuple[Cell, Any]]:
    if config.processes == 1:
        for cell in todo:
            yield cell, play(config, cell)
        return
    # Fresh processes: a fork would take over the state of whatever threads the libraries have started.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.processes, mp_context=context) as pool:
        waiting = {pool.submit(play, config, cell): cell for cell in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(log: Path, version: str) -> Iterator[tuple[Cell, Any]]:
    """Yield what the log holds of these policies; a line that a kill cut short is skipped."""
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["code"] == version:
            yield tuple(row["cell"]), row["found"]


@cache
def _pairs(traces: tuple[str, ...], split: str) -> dict[str, list[Trace]]:
    """Load the traces once per process."""
    splits = () if split == "all" else (split,)
    return {name: load_traces(path, splits=splits) for name, path in (text.split("=", 1) for text in traces)}


@cache
def named_costs(specs: tuple[str, ...]) -> tuple[tuple[str, CostTable], ...]:
    """Load the cost tables once per process; each goes by its name."""
    tables = [load_cost(spec) for spec in specs]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise UserError(f"two cost tables have the same name: {', '.join(names)}")
    return tuple(zip(names, tables, strict=True))
