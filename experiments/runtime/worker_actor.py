"""The worker as a Ray actor, and the note of its policies' calls, read from another machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.runtime.call_watch import CallWatch, PolicyCall, note_path, read_note
from experiments.runtime.settings import CompareConfig
from experiments.runtime.worker import Decoded, Failed, Sync, Worker
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import Unit

#: Seconds to wait for a look at another machine.
PATIENCE = 30.0


class WorkerActor(Worker):
    """A worker as an actor, which says on which machine it is. Nobody but a policy interrupts it.

    Parameters
    ----------
    note : str
        Names the note of its policies' calls.
    config, level, index, threads, prompts, sync
        As for :class:`~experiments.runtime.worker.Worker`.
    """

    def __init__(
        self,
        note: str,
        config: CompareConfig,
        level: str,
        index: int,
        threads: int,
        prompts: Sequence[Prompt],
        sync: Sync,
    ) -> None:
        watch = CallWatch(note_path(note), config.call_seconds)
        super().__init__(config, level, index, threads, prompts, sync, watch)

    def start(self) -> str:
        """Return Ray's id of the machine: the worker has its cores there."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def load(self) -> dict[str, Any]:
        self.watch.__enter__()
        return super().load()

    def decode(self, unit: Unit, prompt: int) -> Decoded | Failed:
        try:
            return super().decode(unit, prompt)
        except KeyboardInterrupt:
            self.seats.pop((unit.policy, unit.seed), None)
            return Failed(unit, "it raised KeyboardInterrupt")

    def finish(self) -> dict[str, Any]:
        self.watch.__exit__()
        return super().finish()


def note_of(name: str, node: str) -> PolicyCall | None:
    """Return the call in the note of that name on a machine of the cluster; None if the machine is gone.

    Parameters
    ----------
    name : str
        As given to the worker.
    node : str
        Ray's id of the machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        return read_note(note_path(name))
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    read: Any = ray.remote(_read).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        found: PolicyCall | None = ray.get(read.remote(name), timeout=PATIENCE)
    except ray.exceptions.RayError:
        return None
    return found


def _read(name: str) -> PolicyCall | None:
    return read_note(note_path(name))
