"""Profiling as Ray tasks, one per compression level.

A task reserves a whole machine's cores by default, because two levels that share a machine would disturb each other's
clocks: on one machine the levels follow each other, on a cluster they run side by side. Every machine writes into the
same directory, so that has to be on a file system that all of them see.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runtime.ray_runner import connect
from speckv_online.console import say
from speckv_online.io.prompts import Prompt

if TYPE_CHECKING:
    from experiments.profile.collect import ProfileConfig

#: Seconds between looks at how far the tasks are.
LOOK = 5.0


def collect_levels(config: ProfileConfig, prompts: list[Prompt], out: Path) -> None:
    """Collect the missing traces of every level, each in a task, and say on standard error how far they are.

    A task that dies with its machine is started once more, and goes on where it was.

    Raises
    ------
    UserError
        If Ray cannot be reached, or a task ends with such an error.
    """
    import ray

    with connect() as nodes:
        threads = config.threads or max(1, min(node.cores for node in nodes))
        gpus = 1.0 if config.device != "cpu" and any(node.gpus for node in nodes) else 0.0
        collect: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(collect_in_task)
        settings = asdict(config) | {"threads": threads}
        waiting = {collect.remote(settings, level, prompts, str(out.resolve())): level for level in config.levels}
        said: dict[str, int] = {}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=LOOK)
            for level in config.levels:
                count = len(list((out / level).glob("*.npz")))
                if said.get(level) != count:
                    said[level] = count
                    say(f"{level}: {count} traces of {len(prompts)} prompts")
            for task in done:
                del waiting[task]
                ray.get(task)


def collect_in_task(settings: dict[str, Any], level: str, prompts: list[Prompt], out: str) -> None:
    """What a task does: collect one level, as a process without Ray would."""
    from experiments.profile.collect import ProfileConfig, collect_level

    collect_level(ProfileConfig(**settings), level, prompts, Path(out))
