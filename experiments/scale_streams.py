"""What an exchange with the real learner costs: bytes both ways, and the learner's seconds."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from experiments.bench.learner import array_bytes, made_up_delta
from experiments.learner import Key, Learner
from experiments.ray_runner import CALLS

#: Exchanges that are timed for the arithmetic, as many at a time as the learner serves.
TIMED = 512


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
