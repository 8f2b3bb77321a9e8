"""Many simulated workers around one learner with a delay, and what an exchange with the real learner costs."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from experiments.bench.learner import array_bytes, made_up_delta
from experiments.learner import Key, Learner
from experiments.ray_runner import CALLS
from experiments.stream_start import cold
from experiments.streams import Walker, endless
from policies.base import Policy, State
from policies.registry import make_policy
from speckv_online.contest import tell_costs
from speckv_online.cost import CostTable
from speckv_online.traces import Trace

#: Exchanges that are timed for the arithmetic, as many at a time as the learner serves.
TIMED = 512


def simulate(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    *,
    workers: int,
    every: int,
    delay: int,
    steps: int,
    seed: int = 0,
) -> float:
    """Return the goodput of workers that start from nothing and merge every ``every`` steps, tokens/modelled second.

    What a worker gets from the learner holds all that it sent itself, and what the others sent at least ``delay``
    steps ago. Workers of one seed meet the same streams whatever the delay is.

    Parameters
    ----------
    spec : str
        See :mod:`policies.registry`.
    traces, cost
        What is replayed, and where the seconds come from.
    workers, every, delay, steps : int
        Number of workers, steps between exchanges, delay in steps, and steps of each worker.
    seed : int
        Of the streams and policies.
    """
    options = cold(spec, seed)
    learner = make_policy(spec, seed=seed, **options)
    walkers = [
        Walker(make_policy(spec, seed=seed, worker=i, **options), endless(traces, [seed, i]), cost)
        for i in range(workers)
    ]
    sent: deque[tuple[int, list[State]]] = deque()  # when, and every worker's batch; not merged yet
    tokens, seconds, done = 0, 0.0, 0
    while done < steps:
        now = min(every, steps - done)
        for walker in walkers:
            more, took = walker.advance(now)
            tokens += more
            seconds += took
        done += now
        if done == steps:
            break
        exchange_late(learner, walkers, sent, done, delay)
    return tokens / seconds


def exchange_late(
    learner: Policy, walkers: Sequence[Walker], sent: deque[tuple[int, list[State]]], now: int, delay: int
) -> None:
    """Let every walker send what it learnt and take over what was sent at least ``delay`` steps ago, and all its own.

    ``sent`` holds what is on its way: when it was sent, and every walker's batch.
    """
    sent.append((now, [walker.policy.take_delta() for walker in walkers]))
    while sent and sent[0][0] <= now - delay:
        for delta in sent.popleft()[1]:
            learner.merge(delta)
    merged = learner.state_dict()
    for i, walker in enumerate(walkers):
        walker.policy.load_state_dict(merged)
        for _, deltas in sent:
            walker.policy.merge(deltas[i])
        walker.policy.take_delta()  # its own batches on their way must not be sent again
        tell_costs(walker.policy, walker.cost, walker.cost.levels)  # a worker's calibration is its own


@dataclass(frozen=True)
class Exchange:
    """Bytes of a batch and of the state that comes back, and the learner's seconds per batch, checkpoints included."""

    sent: int
    received: int
    seconds: float


def weigh(spec: str, outcomes: int, folder: Path) -> Exchange:
    """Exchange with a learner in this process, whose checkpoints go to the disk of ``folder``."""
    delta, key = made_up_delta(spec, outcomes), Key(spec, 0)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints, ThreadPoolExecutor(CALLS) as pool:
        learner = Learner(checkpoints)
        merged = learner.sync("", 0, {key: delta})[key]
        start = perf_counter()
        list(pool.map(lambda i: learner.sync("", i, {key: delta}), range(1, TIMED + 1)))
        seconds = (perf_counter() - start) / TIMED
    return Exchange(array_bytes(delta), array_bytes(merged.state), seconds)
