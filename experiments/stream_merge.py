"""Merging: what it is worth that workers add their statistics up every m steps, by m and by the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.stream_start import cold
from experiments.streams import Walker, endless, exchange
from policies.registry import make_policy
from speckv_online.cost import CostTable
from speckv_online.traces import Trace


@dataclass(frozen=True)
class Merged:
    """Goodput of W workers that merge every m steps, over their first ``steps`` steps each."""

    policy: str
    workers: int
    every: int
    steps: int
    goodput: float


def merged(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    workers: int,
    every: int,
    *,
    steps: int = 2000,
    seed: int = 0,
) -> Merged:
    """Let workers start from nothing, each on its own stream, and merge every ``every`` steps.

    Workers of one seed meet the same streams whatever ``every`` is.
    """
    options = cold(spec, seed)
    learner = make_policy(spec, seed=seed, **options)
    walkers = [
        Walker(make_policy(spec, seed=seed, worker=i, **options), endless(traces, [seed, i]), cost)
        for i in range(workers)
    ]
    tokens, seconds, done = 0, 0.0, 0
    while done < steps:
        now = min(every, steps - done)
        for walker in walkers:
            more, took = walker.advance(now)
            tokens += more
            seconds += took
        done += now
        if done < steps:
            exchange(learner, walkers)
    return Merged(spec, workers, every, steps, tokens / seconds)


def grid(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    workers: Sequence[int],
    every: Sequence[int],
    *,
    steps: int,
    seeds: Sequence[int],
) -> np.ndarray:
    """Return goodputs, means over the seeds, shape (workers, every)."""
    found = np.empty((len(workers), len(every)))
    for i, count in enumerate(workers):
        for j, m in enumerate(every):
            runs = [merged(spec, traces, cost, count, m, steps=steps, seed=seed).goodput for seed in seeds]
            found[i, j] = float(np.mean(runs))
    return found
