"""How many outcomes per second the learner takes in: one actor, and many workers that only send, on a real Ray.

Every fake worker makes one batch of statistics beforehand, from a real policy that has learnt from made-up steps, and
then sends it again and again under new names, each time waiting for what was merged since its last and putting that
into its copy of the state, as a real worker does. What is timed is all that the learner does: the call, the merge, the
checkpoint on disk, the reply. ``outcomes/s`` is by the wall clock, with workers and Ray on the same machine; ``per CPU
second`` counts the learner's own processor time alone, and is what one core can do. Batches are sums, so a batch of
many outcomes should take no longer than one of few.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from experiments.config import launch, option
from experiments.runtime.learner import Key
from experiments.runtime.patches import Patch, Reply, patched
from experiments.runtime.serialization import LearnerActor, RemoteSync
from policies.base import MAX_GAMMA, N_SIGNALS, Draft, Outcome, State
from policies.registry import make_policy
from speckv_online.context import History
from speckv_online.errors import UserError

#: Outcomes per second that a learner on one core has to take in.
BAR = 20_000
#: A batch of the largest size may cost this much more than one of the smallest.
SAME = 1.5
SHARED = Key("", 0)
HEAD = ("policy", "outcomes/batch", "batches/s", "outcomes/s", "per CPU second", "CPU ms/batch", "bytes sent", "back")
#: Size of the default pair's vocabulary.
VOCABULARY = 49_152


@dataclass(frozen=True)
class BenchConfig:
    """Settings of ``python -m experiments.bench.learner``."""

    policies: tuple[str, ...] = option(("online", "linucb"), "policies to merge, comma separated")
    workers: int = option(16, "fake workers")
    outcomes: tuple[str, ...] = option(("8", "32", "256", "2048"), "outcomes per batch, comma separated")
    seconds: float = option(5.0, "seconds per policy and size")
    bar_at: int = option(32, "size of batch that the bar is for: the default of compare's --sync-every")
    address: str = option("", "Ray cluster (default: one of its own)")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if not self.policies or not all(text.isdecimal() and int(text) > 0 for text in self.outcomes or ("",)):
            raise UserError("--policies must name at least one, --outcomes whole numbers above zero")
        if self.workers < 1 or not self.seconds > 0:
            raise UserError("--workers must be at least 1, --seconds above zero")


@dataclass(frozen=True)
class Load:
    """One policy at one size of batch; times are measured.

    Attributes
    ----------
    batches : int
        Batches merged.
    wall, cpu : float
        Seconds that passed, and seconds of processor time that the learner used.
    sent, received : int
        Bytes of a batch's arrays, and of what comes back, on average.
    """

    policy: str
    outcomes: int
    batches: int
    wall: float
    cpu: float
    sent: int
    received: int

    @property
    def per_second(self) -> float:
        """Outcomes per second of wall clock."""
        return self.batches * self.outcomes / self.wall

    @property
    def per_cpu_second(self) -> float:
        """Outcomes per second of the learner's processor time."""
        return self.batches * self.outcomes / self.cpu


class TimedLearner(LearnerActor):
    """The learner, and the processor time that it has used."""

    def cpu(self) -> float:
        """Return the seconds of processor time of this process so far, all its threads together."""
        return time.process_time()


class FakeWorker:
    """Sends the same statistics again and again, each time as a new batch; every worker has made up its own."""

    def __init__(self, index: int, policy: str, outcomes: int) -> None:
        self.name, self.key, self.sequence = f"worker {index}", SHARED._replace(spec=policy), 0
        self.delta = made_up_delta(policy, outcomes, index)
        self.version = 0
        self.state: State = {}

    def size(self) -> int:
        """Return the bytes of a batch's arrays."""
        return array_bytes(self.delta)

    def send(self, learner: Any, until: float) -> tuple[int, int]:
        """Send until a time of ``time.time()``; return the number of batches, and of bytes that came back."""
        sync, count, received = RemoteSync(learner), 0, 0
        while time.time() < until:
            known, deltas = {self.key: self.version}, {self.key: self.delta}
            merged = sync(self.name, self.sequence, deltas, False, known)[self.key]
            self.version, self.state = merged.version, patched(self.state, merged.state)
            received += array_bytes(merged.state)
            self.sequence += 1
            count += 1
        return count, received


def made_up_delta(policy: str, outcomes: int, seed: int = 0) -> State:
    """Return the statistics of a policy after some made-up steps, drafts being right three times in five.

    The n-th commonest of the tokens comes up in proportion to 1 / n, as in texts.

    Raises
    ------
    UserError
        If the policy has none to share.
    """
    learner, rng = make_policy(policy, seed=seed), np.random.default_rng(seed)
    history = History("nf4", "", 100)
    common = 1.0 / np.arange(1, VOCABULARY + 1)
    words = rng.choice(VOCABULARY, (outcomes, 2 * MAX_GAMMA), p=common / common.sum()).tolist()
    learner.begin(history.context())
    for row in words:
        decision = learner.decide(replace(history.context(), tokens=row[:MAX_GAMMA]))
        k = min(decision.gamma, MAX_GAMMA)
        signals = rng.random((MAX_GAMMA, N_SIGNALS))
        if decision.ask_per_token and k:
            k = learner.submit(decision, Draft(k, signals[:k], row[MAX_GAMMA : MAX_GAMMA + k]))
        right = rng.random(k) < 0.6
        n = int(np.argmin(right)) if not right.all() else k
        outcome = Outcome(k, n, min(n + 1, k), n + 1, 0.05 + 0.01 * k, 0.01 * k, 0.05, "nf4", 100, 0, signals[:k])
        outcome.tokens = row[MAX_GAMMA : MAX_GAMMA + k]
        learner.learn(decision, outcome)
        history.update(outcome)
    delta = learner.take_delta()
    if not delta:
        raise UserError(f"{policy} shares nothing with other workers: choose policies that learn")
    return delta


def array_bytes(state: Reply | State) -> int:
    """Return the bytes of a state's arrays, patches included."""
    parts = [v for value in state.values() for v in (value if isinstance(value, Patch) else (value,))]
    return sum(np.asarray(value).nbytes for value in parts)


def measure(config: BenchConfig, policy: str, outcomes: int, folder: str) -> Load:
    """Time one policy at one size of batch; Ray must be connected."""
    import ray

    from experiments.runtime.ray_runner import LEARNER_OPTIONS

    learner: Any = ray.remote(TimedLearner).options(**LEARNER_OPTIONS).remote(folder)
    make: Any = ray.remote(FakeWorker).options(num_cpus=0)
    workers = [make.remote(i, policy, outcomes) for i in range(config.workers)]
    try:
        sent = ray.get(workers[0].size.remote())
        ray.get([worker.send.remote(learner, time.time() + 0.5) for worker in workers])  # first calls, connections
        cpu, start = ray.get(learner.cpu.remote()), time.time()
        done = ray.get([worker.send.remote(learner, start + config.seconds) for worker in workers])
        wall, used = time.time() - start, ray.get(learner.cpu.remote()) - cpu
    finally:
        for actor in (*workers, learner):
            ray.kill(actor)
    batches, received = (sum(column) for column in zip(*done, strict=True))
    return Load(policy, outcomes, batches, wall, used, sent, received // max(batches, 1))


def bench(config: BenchConfig) -> int:
    """Measure everything, print it; exit code 1 if the bar is missed."""
    from experiments.runtime.ray_runner import connect
    from speckv_online.reporting.report import text_table

    sizes = sorted(int(text) for text in config.outcomes)
    for policy in config.policies:
        made_up_delta(policy, 8)  # a typo should show before Ray starts
    found = []
    with connect(config.address):
        for policy in config.policies:
            for size in sizes:
                print(f"{policy}: batches of {size} outcomes", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    found.append(measure(config, policy, size, folder))
    checks = [check for policy in config.policies for check in judge([f for f in found if f.policy == policy], config)]
    if config.json:
        rows = [asdict(f) | {"per_second": f.per_second, "per_cpu_second": f.per_cpu_second} for f in found]
        print(json.dumps({"kind": "measured", "workers": config.workers, "rows": rows, "checks": checks}))
    else:
        table = [HEAD, *(cells(f) for f in found)]
        print("\n".join(text_table(table)))
        print(f"measured with {config.workers} fake workers")
        print("\n".join(f"{check['text']}: {'pass' if check['pass'] else 'fail'}" for check in checks))
    return 0 if all(check["pass"] for check in checks) else 1


def cells(f: Load) -> tuple[str, ...]:
    """Return a row of the table."""
    return (
        f.policy, str(f.outcomes), f"{f.batches / f.wall:,.0f}", f"{f.per_second:,.0f}", f"{f.per_cpu_second:,.0f}",
        f"{1e3 * f.cpu / max(f.batches, 1):.2f}", f"{f.sent:,}", f"{f.received:,}",
    )  # fmt: skip


def judge(found: Sequence[Load], config: BenchConfig) -> list[dict[str, Any]]:
    """Return what is asked of the learner and whether it holds: the bar, and batches that cost the same at any size."""
    checks = []
    if at := [f for f in found if f.outcomes == config.bar_at]:
        text = f"{at[0].policy}: {at[0].per_cpu_second:,.0f} outcomes/s on one core (bar {BAR:,})"
        checks.append({"text": text, "pass": at[0].per_cpu_second >= BAR})
    if len(found) > 1:
        ratio = (found[-1].cpu / found[-1].batches) / (found[0].cpu / found[0].batches)
        sizes = f"{found[-1].outcomes} against {found[0].outcomes} outcomes"
        text = f"{found[0].policy}: a batch of {sizes} costs {ratio:.2f} times as much (bar {SAME})"
        checks.append({"text": text, "pass": ratio <= SAME})
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, BenchConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
