"""Runs workers and the learner as Ray actors: on a Ray of its own, a local one, or a cluster, all in the same way.

The driver deals the work out and is the only one that writes records; the learner sits on the driver's machine and is
the only one that writes checkpoints. So the run directory need not be shared between machines, and whatever dies can be
replaced: a worker holds nothing but the unit that it is decoding and what it learnt since the last exchange.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from experiments.runtime.call_watch import TRIES, PolicyCall, forget_note, note_path
from experiments.runtime.local_runner import failure
from experiments.runtime.schedule import Node
from experiments.runtime.serialization import LEARNER, LearnerActor, RemoteSync
from experiments.runtime.work_queue import Event, Job, Work
from experiments.runtime.worker import Failed
from experiments.runtime.worker_actor import WorkerActor, note_of
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.run_directory import Unit

OBJECT_STORE_BYTES = 100_000_000
#: Times that a worker may die in a row, without having finished a unit in between, before it is not replaced.
DEATHS = 3
#: Times that a unit is tried again whose worker died within a call of its policy.
RETRIES = 1
#: Workers that the learner serves at a time; those that wait for the disk share a checkpoint.
CALLS = 64
#: How Ray runs the learner. Its replies, up to 200 kB, go with the answer to the call: by default Ray would pass those
#: above 100 kB through its object store, which costs the learner twice the time.
LEARNER_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_concurrency": CALLS,
    "runtime_env": {"env_vars": {"RAY_max_direct_call_object_size": "1000000"}},
}


def set_environment(address: str = "") -> None:
    """Set what Ray reads of the environment when it is imported, so call this before anything imports it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Ray would replace 127.0.0.1 by the machine's own address; this switch, meant for laptops, keeps it as it is.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A token for this run only: Ray would leave one in the home directory, and later clusters would ask for it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def connect(address: str = "") -> Iterator[list[Node]]:
    """Connect to a Ray cluster, else start one; yield its machines.

    A cluster that is started here listens on the loopback interface only, has no dashboard, sends no usage statistics
    and ends with this process.

    Parameters
    ----------
    address : str
        As for ``ray.init``; by default that of ``RAY_ADDRESS``, which a Ray job has set.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://", "ray://")):
        raise UserError(f"{address} takes jobs, not drivers: run `speckv submit CONFIG --address {address}`")
    set_environment(address)
    import ray

    _check_answers(address)
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
        raise UserError(
            f"cannot {where} ({' '.join(str(e).split())[:200]}): unset RAY_ADDRESS or --address, or use --local"
        ) from e
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [Node(int(found.get("CPU", 0)), float(found.get("GPU", 0))) for found in alive]
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse a ``HOST:PORT`` where nothing listens: Ray itself would try for minutes."""
    import ray

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    hosts = [host.strip("[]")]
    if hosts[0] in ("127.0.0.1", "localhost"):  # which Ray takes for the machine's own address
        hosts.append(ray.util.get_node_ip_address())
    for name in hosts:
        with contextlib.suppress(OSError), socket.create_connection((name, int(port)), timeout=10):
            return
    raise UserError(
        f"no Ray cluster answers at {address}: start one with `ray start --head`, or unset RAY_ADDRESS or --address, "
        "or use --local"
    )


@dataclass(eq=False)
class Post:
    """A place for a worker: its actor now, the units that it was given, and how often it died in a row."""

    level: str
    index: int
    actor: Any = None
    call: str = ""
    node: str = ""
    note: str = ""
    since: float = 0.0
    #: Number of the policy's call that was at hand when somebody looked.
    seen: int = -1
    units: deque[tuple[Unit, int]] = field(default_factory=deque)
    deaths: int = 0


class RayRun:
    """One run on Ray; :meth:`events` does it. :func:`connect` must be active.

    Ray starts a worker as soon as its cores and GPUs are free. A worker that dies, alone or with its machine, is
    replaced, and its unit is decoded again. If it died within a call of a policy twice in the same unit, or had to be
    killed there, the policy is given up. A learner that dies is restarted by Ray, takes its checkpoints up, and is
    asked again; batches that it has are not added twice.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.works: dict[str, Work] = {}
        self.posts: list[Post] = []
        self.running: dict[Any, Post] = {}  # what is awaited -> whose it is
        self.failed: set[str] = set()
        self.ended: Counter[tuple[str, str, str, int]] = Counter()  # by unit: deaths in its policy's calls
        #: A worker ends late calls itself, unless native code keeps it from that.
        self.patience = 1.5 * job.config.call_seconds + 2 * TRIES

    def events(self) -> Iterator[Event]:
        """Run everything; yield what happens."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.here = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(self.here, soft=False)
        options = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here} | LEARNER_OPTIONS
        forget_note(note_path(self.job.out, LEARNER))  # of a run that was killed
        limit = self.job.config.call_seconds
        learner: Any = ray.remote(LearnerActor).options(name=LEARNER, **options).remote(self.job.out, limit)
        self.prompts = ray.put(list(self.job.prompts))
        yield from self._open()
        while self.running:
            done, _ = ray.wait(list(self.running), num_returns=1, timeout=self.patience / 3)
            yield from self._look()
            ref = done[0] if done else None
            if ref is None or ref not in self.running:  # nothing yet, or its worker is gone
                continue
            post = self.running.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayTaskError as error:  # raised by the worker; may look like the next kind as well
                yield from self._fail(post.level, error)
            except ray.exceptions.RayActorError:
                yield from self._bury(post)
            else:
                yield from self._go_on(post, result)
        for level, work in self.works.items():
            if level not in self.failed and work.left:
                yield from self._fail(level, self._given_up(level))
        ray.kill(learner)
        forget_note(note_path(self.job.out, LEARNER))

    def _open(self) -> Iterator[Event]:
        shares = self.job.schedule.shares
        for level in shares:
            try:
                self.works[level] = self.job.work(level)
            except UserError as error:
                yield from self._fail(level, error)
        for index in range(max(share.workers for share in shares.values())):
            for level, share in shares.items():
                if index < share.workers and self.works.get(level):
                    self.posts.append(Post(level, index))
                    yield self._start(self.posts[-1])

    def _start(self, post: Post) -> Event:
        import ray

        share = self.job.schedule.shares[post.level]
        make: Any = ray.remote(WorkerActor).options(num_cpus=share.threads, num_gpus=share.gpus)
        post.node, post.note = "", secrets.token_hex(16)
        work = post.level, post.index, share.threads, self.prompts, RemoteSync()
        post.actor = make.remote(post.note, self.job.config, *work)
        self._call(post, "start")
        return Event(post.level, "waiting", post.index)

    def _call(self, post: Post, method: str, *arguments: Any) -> None:
        post.call, post.since, post.seen = method, time.monotonic(), -1
        self.running[getattr(post.actor, method).remote(*arguments)] = post

    def _go_on(self, post: Post, result: Any) -> Iterator[Event]:
        """Take in what a worker did, and give it something to do."""
        work = self.works[post.level]
        if post.call == "finish":
            self._dismiss(post)
            yield Event(post.level, "finished", post.index, facts=result)
            return
        if post.call == "start":  # it has its cores
            post.node = result
            self._call(post, "load")
            yield Event(post.level, "loading", post.index)
            return
        event: Event | None
        if post.call == "load":
            event = Event(post.level, "ready", post.index, facts=result)
        elif isinstance(result, Failed):
            event = None
            yield from self.job.give_up(post.level, post.index, result.unit.policy, result.reason)
        else:
            try:
                progress = work.record(result.unit, result.steps, result.facts, result.seconds)
            except UserError as error:
                yield from self._fail(post.level, error)
                return
            post.deaths = 0
            event = Event(post.level, "unit", post.index, progress=progress)
        post.units = deque(item for item in post.units if work.wanted(item[0])) or work.take()
        if post.units:
            self._call(post, "decode", *post.units[0])
        else:
            self._call(post, "finish")
            for other in self.posts:  # those that still wait for a place are not needed any more
                if other.level == post.level and other.call in ("start", "load"):
                    self._dismiss(other)
        if event is not None:
            yield event

    def _bury(self, post: Post) -> Iterator[Event]:
        """A worker died: give its unit back and replace it, unless it dies again and again."""
        call = self._at_hand(post)
        if call is None:
            post.deaths += 1
        else:
            unit = post.units[0][0]
            self.ended[unit.key] += 1
            reason = call.reason(self.job.config.call_seconds)
            if call.late or self.ended[unit.key] > RETRIES:
                yield from self.job.give_up(post.level, post.index, call.policy, reason)
            else:
                text = f"policy {call.policy}: {reason}; it is tried once more"
                yield Event(post.level, "trouble", post.index, text=text)
        yield from self._replace(post)

    def _replace(self, post: Post) -> Iterator[Event]:
        work = self.works[post.level]
        work.give_back(post.units)
        post.units = deque()
        self._dismiss(post)
        if not work:  # it had nothing left to do
            return
        if post.deaths < DEATHS:
            yield Event(post.level, "trouble", post.index, text=f"worker {post.index} died and is replaced")
            yield self._start(post)
        else:
            yield Event(post.level, "trouble", post.index, text=f"worker {post.index} died {DEATHS} times in a row")

    def _look(self) -> Iterator[Event]:
        """Kill workers whose policy's call does not end, and which cannot end it themselves."""
        for post in [post for post in self.posts if post.call == "decode"]:
            if time.monotonic() - post.since < self.patience:
                continue
            call = self._at_hand(post)
            if call is not None and call.number == post.seen:
                reason = call._replace(late=True).reason(self.job.config.call_seconds)
                yield from self.job.give_up(post.level, post.index, call.policy, reason)
                yield from self._replace(post)
            else:
                post.since, post.seen = time.monotonic(), call.number if call is not None else -1

    def _at_hand(self, post: Post) -> PolicyCall | None:
        """Return the call of a policy that a worker is in, or died in."""
        return note_of(post.note, post.node) if post.call == "decode" and post.units else None

    def _fail(self, level: str, error: BaseException) -> Iterator[Event]:
        """A level cannot go on: let its workers go."""
        if level not in self.failed:
            self.failed.add(level)
            for post in self.posts:
                if post.level == level:
                    self._dismiss(post)
            yield failure(level, error)

    def _dismiss(self, post: Post) -> None:
        import ray

        if post.actor is not None:
            ray.kill(post.actor)
            if post.node in ("", self.here):
                forget_note(note_path(post.note))
        post.actor, post.call = None, ""
        self.running = {ref: other for ref, other in self.running.items() if other is not post}

    def _given_up(self, level: str) -> UserError:
        return UserError(
            f"the {level} worker died {DEATHS} times in a row, most often for lack of memory: "
            f"free some, then continue with --resume {self.job.out}"
        )
