"""What an exchange with the real learner costs: bytes both ways, and the learner's seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from experiments.bench.learner import array_bytes, made_up_delta
from experiments.runtime.learner import Key, Learner
from experiments.runtime.ray_runner import CALLS
from experiments.streams.walker import Walker, endless
from policies.base import State
from policies.registry import make_policy
from speckv_online.simulate.cost_table import CostTable
from speckv_online.traces.trace import Trace

#: Exchanges that are timed for the arithmetic at least, as many at a time as the learner serves.
TIMED = 512


@dataclass(frozen=True)
class Exchange:
    """Bytes of a batch and of what comes back, and the learner's seconds per batch, checkpoints included.

    Attributes
    ----------
    sent : float
        Mean over the batches.
    alone, received : int
        To a worker that has the learner to itself, and to one of the fleet.
    """

    sent: float
    alone: int
    received: int
    seconds: float


def observed(spec: str, steps: int, traces: Sequence[Trace], cost: CostTable, count: int) -> list[State]:
    """Return a batch of ``steps`` steps from each of ``count`` workers, all somewhere else on streams of their own."""
    batches = []
    for i in range(count):
        walker = Walker(make_policy(spec, worker=i), endless(traces, [0, i]), cost)
        walker.advance(steps * (i % 8))
        walker.policy.take_delta()
        walker.advance(steps)
        batches.append(walker.policy.take_delta())
    return batches


def made_up(spec: str, steps: int, count: int) -> list[State]:
    """The same without traces; made-up steps have no tokens, so nothing is in it of what came after which."""
    return [made_up_delta(spec, steps, seed) for seed in range(count)]


def weigh(spec: str, batches: Sequence[State], folder: Path) -> Exchange:
    """Exchange with a learner in this process, whose checkpoints go to the disk of ``folder``, a fleet's batches."""
    key, fleet = Key(spec, 0), len(batches)
    timed = max(TIMED, 2 * fleet)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints, ThreadPoolExecutor(min(CALLS, fleet)) as pool:
        learner = Learner(checkpoints)

        def exchange(i: int) -> int:
            # A worker has what was merged when its turn was last: a batch of every other one is new to it.
            known = {key: max(1, i - fleet)}
            return array_bytes(
                learner.sync(str(i % fleet), i // fleet, {key: batches[i % fleet]}, False, known)[key].state
            )

        learner.sync("first", 0, {key: batches[0]})
        alone = array_bytes(learner.sync("alone", 0, {key: batches[0]}, False, {key: 1})[key].state)
        start = perf_counter()
        back = list(pool.map(exchange, range(2, timed + 2)))
        seconds = (perf_counter() - start) / timed
    return Exchange(float(np.mean([array_bytes(batch) for batch in batches])), alone, back[-1], seconds)
