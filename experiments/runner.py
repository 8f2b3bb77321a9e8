"""Runs workers and the learner, in this process or as Ray actors; both give the same stream of events."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import CompareConfig
from experiments.learner import Key, Learner, Merged
from experiments.worker import Progress, Worker
from policies.base import State
from speckv_online.errors import UserError
from speckv_online.manifest import cores
from speckv_online.prompts import Prompt

log = logging.getLogger(__name__)

MAX_AUTO_THREADS = 8
OBJECT_STORE_BYTES = 100_000_000
RESTARTS = 2
#: Name of the learner actor; Ray keeps the names of different jobs apart.
LEARNER = "learner"


@dataclass(frozen=True)
class Job:
    """What is to be run: settings, prompts, run directory and threads per worker."""

    config: CompareConfig
    prompts: list[Prompt]
    out: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a level: ``loading``, ``ready`` (facts), ``unit`` (a Progress) or ``finished``."""

    level: str
    kind: str
    facts: dict[str, Any] | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Schedule:
    """How levels share the cores: at most ``slots`` workers at a time, ``threads`` each, of ``cores``."""

    threads: int
    slots: int
    cores: int

    def describe(self, levels: int) -> dict[str, Any]:
        """Return the facts for a manifest."""
        if levels == 1:
            how = "alone"
        elif self.slots == 1:
            how = "one after the other"
        else:
            how = "side by side" if self.slots >= levels else f"up to {self.slots} at a time"
        return {"levels": how, "threads_per_worker": self.threads, "cores": self.cores}


def plan(threads: int, levels: int, nodes: list[int]) -> Schedule:
    """Share cores out so that threads never exceed them.

    Parameters
    ----------
    threads : int
        Threads per worker; 0 picks all cores of a node, up to 8, beyond which one sequence gains little.
    levels : int
        Number of workers in all.
    nodes : list of int
        Cores of each machine.
    """
    chosen = threads or min(max(nodes), MAX_AUTO_THREADS)
    slots = sum(node // chosen for node in nodes)
    if not slots:
        raise UserError(f"--threads {threads} is more than the {max(nodes)} cores here: give fewer")
    return Schedule(chosen, min(slots, levels), sum(nodes))


def run_local(job: Job) -> Iterator[Event]:
    """Run the levels one after the other in this process."""
    learner = Learner(job.out)
    for index, level in enumerate(job.config.levels):
        yield Event(level, "loading")
        worker = Worker(job.config, level, index, job.threads, job.prompts, job.out, learner.sync)
        yield Event(level, "ready", facts=worker.load())
        while (progress := worker.advance()) is not None:
            yield Event(level, "unit", progress=progress)
        yield Event(level, "finished", facts=worker.finish())
        del worker
        gc.collect()  # the models of one level go before those of the next come


@contextlib.contextmanager
def connect() -> Iterator[list[int]]:
    """Connect to the Ray cluster of ``RAY_ADDRESS`` or of the surrounding job, else start one; yield the nodes' cores.

    A cluster that is started here listens on the loopback interface only, has no dashboard, sends no usage statistics
    and ends with this process.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Ray would replace 127.0.0.1 by the machine's own address; this switch, meant for laptops, keeps it as it is.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A token for this run only: Ray would leave one in the home directory, and later clusters would ask for it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR, object_store_memory=OBJECT_STORE_BYTES, _node_ip_address="127.0.0.1",
            )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as e:
        where = f"connect to the Ray cluster at {address}" if address else "start Ray"
        raise UserError(f"cannot {where} ({' '.join(str(e).split())[:200]}): unset RAY_ADDRESS, or use --local") from e
    try:
        yield [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


class RemoteSync:
    """The learner's ``sync`` as a worker calls it: one call per prompt, never per step."""

    def __call__(self, worker: str, sequence: int, deltas: Mapping[Key, State]) -> dict[Key, Merged]:
        import ray

        learner: Any = ray.get_actor(LEARNER)
        return ray.get(learner.sync.remote(worker, sequence, deltas))


def run_ray(job: Job, slots: int) -> Iterator[Event]:
    """Run each level as a Ray actor, at most ``slots`` at a time, with one learner actor beside them.

    An actor that dies is restarted, reads from its own records which units are done, and goes on; what it had sent to
    the learner is not added twice. :func:`connect` must be active.
    """
    import ray

    durable = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    learner: Any = ray.remote(Learner).options(name=LEARNER, num_cpus=0, **durable).remote(job.out)
    gpus = 1 if job.config.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    make: Any = ray.remote(Worker).options(num_cpus=job.threads, num_gpus=gpus, **durable)
    waiting = list(enumerate(job.config.levels))
    running: dict[Any, tuple[str, str, Any]] = {}  # what is awaited -> (level, call, actor)
    while waiting or running:
        while waiting and len(running) < slots:
            index, level = waiting.pop(0)
            yield Event(level, "loading")
            actor = make.remote(job.config, level, index, job.threads, job.prompts, job.out, RemoteSync())
            running[actor.load.remote()] = (level, "load", actor)
        (done,), _ = ray.wait(list(running), num_returns=1)
        level, call, actor = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as e:
            raise UserError(
                f"the {level} worker died {RESTARTS + 1} times, most often for lack of memory: "
                f"free some, then continue with --out {job.out}"
            ) from e
        if call == "finish":
            yield Event(level, "finished", facts=result)
            ray.kill(actor)
        elif call == "advance" and result is None:
            running[actor.finish.remote()] = (level, "finish", actor)
        else:
            running[actor.advance.remote()] = (level, "advance", actor)
            yield Event(level, "ready", facts=result) if call == "load" else Event(level, "unit", progress=result)
    ray.kill(learner)
