"""How many workers there are, what each may use, and how many fit on the machines at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from experiments.runtime.settings import CompareConfig
from speckv_online.errors import UserError

MAX_AUTO_THREADS = 8


class Node(NamedTuple):
    """A machine: CPU cores and GPUs."""

    cores: int
    gpus: float = 0.0


@dataclass(frozen=True)
class Share:
    """What a level gets: its workers, and the threads and GPUs of each."""

    workers: int
    threads: int
    gpus: float


@dataclass(frozen=True)
class Schedule:
    """Shares by level; ``slots`` workers run at a time, on ``cores`` cores in all."""

    shares: dict[str, Share]
    slots: int
    cores: int

    def describe(self) -> dict[str, Any]:
        """Return the facts for a manifest."""
        total = sum(share.workers for share in self.shares.values())
        if total == 1:
            how = "alone"
        elif self.slots == 1:
            how = "one after the other"
        else:
            how = "side by side" if self.slots >= total else f"up to {self.slots} at a time"
        return {
            "levels": how,
            "threads_per_worker": max(share.threads for share in self.shares.values()),
            "cores": self.cores,
            "shares": {level: asdict(share) for level, share in self.shares.items()},
        }


def plan(config: CompareConfig, nodes: Sequence[Node], blocks: int) -> Schedule:
    """Share cores and GPUs out so that they are never exceeded.

    Without a number of threads a worker gets its part of a node's cores, up to 8: one sequence gains little beyond.
    Without a number of GPUs it gets one, where there are any.

    Parameters
    ----------
    config : CompareConfig
        Settings; with ``local`` there is one worker per level, and one at a time.
    nodes : sequence of Node
        The machines.
    blocks : int
        Prompts to decode per level: more workers than that would be idle.

    Raises
    ------
    UserError
        If a worker fits on no machine.
    """
    cores = max(node.cores for node in nodes)
    cuda = config.device != "cpu" and any(node.gpus for node in nodes)
    shares = {}
    for level in config.levels:
        own = config.for_level(level)
        workers = 1 if config.local else max(1, min(own.workers, blocks))
        threads = own.threads or max(1, min(cores // workers, MAX_AUTO_THREADS))
        gpus = own.gpus if own.gpus is not None else float(cuda)
        share = shares[level] = Share(workers, threads, 0.0 if config.local or config.device == "cpu" else gpus)
        if threads > cores:
            raise UserError(f"--threads {threads} is more than the {cores} cores here: give fewer")
        if not _fits(share, nodes):
            raise UserError(f"a worker at {level} wants {threads} cores and {share.gpus:g} GPUs: no machine has both")
    free = [[float(node.cores), node.gpus] for node in nodes]
    slots = 0
    for share in (s for s in shares.values() for _ in range(s.workers)):
        for room in free:
            if room[0] >= share.threads and room[1] >= share.gpus - 1e-9:
                room[0] -= share.threads
                room[1] -= share.gpus
                slots += 1
                break
    return Schedule(shares, 1 if config.local else slots, sum(node.cores for node in nodes))


def _fits(share: Share, nodes: Sequence[Node]) -> bool:
    return any(node.cores >= share.threads and node.gpus >= share.gpus for node in nodes)
