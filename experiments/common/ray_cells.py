"""Cells as Ray tasks: on a cluster, in a Ray job, or on a Ray of this machine's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.common.cached_cells import Cell
from experiments.runtime.ray_runner import connect


def play_on_ray(
    todo: Sequence[Cell], play: Callable[[Cell], Any], whole_machines: bool = False
) -> Iterator[tuple[Cell, Any]]:
    """Play cells as tasks of one core each, or of a machine's cores: cells that share a machine disturb its clock.

    A task that dies with its machine is started once more. Files that the cells read must be on a file system that all
    machines see.
    """
    import ray

    with connect() as nodes:
        cores = max(1, min(node.cores for node in nodes)) if whole_machines else 1

        def call(cell: Cell) -> Any:
            return play(cell)

        task: Any = ray.remote(num_cpus=cores, max_retries=1)(call)
        waiting = {task.remote(cell): cell for cell in todo}
        while waiting:
            for done in ray.wait(list(waiting))[0]:
                yield waiting.pop(done), ray.get(done)
