"""Replaying exact traces of many requests in a serving engine: arrivals, continuous batching, several replicas.

A step is the engine's. The requests that run and the prompts that wait share a forward; drafts that were made in the
step before are verified in it; then drafts are made for the next one. The policy is asked by
:class:`~speckv_online.serving.controller.Controller`, as inside a real engine, and sees what it sees there. Outputs are
exact, seconds are modelled (:class:`~speckv_online.simulate.engine_costs.EngineCosts`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.base import Policy
from speckv_online.errors import UserError
from speckv_online.serving.controller import Controller
from speckv_online.serving.engine import Engine, EngineStep, Running, Verified
from speckv_online.serving.settings import Settings, engine_policy
from speckv_online.simulate.engine_costs import EngineCosts
from speckv_online.traces.trace import Trace

#: Most tokens that a step reads, of prompts and of requests that run.
MOST_TOKENS = 2048


@dataclass(frozen=True)
class Load:
    """How requests come.

    Attributes
    ----------
    requests : int
        How many in all.
    concurrency : int
        Closed loop: so many at a time for each replica; 0 for an open loop.
    rate : float
        Open loop: arrivals per second, Poisson, for each replica.
    """

    requests: int
    concurrency: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.requests < 1 or self.concurrency < 0 or (self.concurrency > 0) == (self.rate > 0):
            raise UserError("a load has requests, and either concurrency or rate above 0")


@dataclass
class Served:
    """What a load came to, all replicas together.

    Attributes
    ----------
    tokens, seconds : float
        Tokens produced; modelled seconds from the first arrival to the last token.
    first, each : list of float
        By request, modelled seconds to its first token, and per token after it.
    drafted, accepted, steps : int
        Drafted tokens that were verified, those accepted, and engine steps.
    chosen : Counter
        Steps by number of drafts chosen.
    rates : list of float
        Tokens per modelled second of each tenth of the requests, in the order in which they ended.
    progress : list of (float, int)
        After each step, the replica's modelled seconds and the tokens so far.
    """

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    chosen: Counter[int] = field(default_factory=Counter)
    rates: list[float] = field(default_factory=list)
    progress: list[tuple[float, int]] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Tokens per modelled second."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return the figures, with medians over requests."""
        return {
            "kind": "modelled", "throughput": self.throughput, "median_ttft": float(np.median(self.first)),
            "median_tpot": float(np.median(self.each)), "p99_tpot": float(np.quantile(self.each, 0.99)),
            "acceptance_rate": self.accepted / self.drafted if self.drafted else None,
            "mean_gamma": sum(k * n for k, n in self.chosen.items()) / max(self.steps, 1), "steps": self.steps,
        }  # fmt: skip


class _Request:
    """A request under way: ``at`` tokens of its trace are produced, ``read`` ones of its context the draft has read."""

    __slots__ = ("arrived", "at", "drafts", "first", "id", "prompt", "read", "trace")

    def __init__(self, id: str, trace: Trace, arrived: float) -> None:
        self.id, self.trace, self.arrived = id, trace, arrived
        self.prompt = len(trace.prompt)  # tokens of it to be read still
        self.at = self.drafts = self.read = 0
        self.first = 0.0


class Replica:
    """One engine.

    Parameters
    ----------
    controller : Controller
    costs : EngineCosts
    policy_seconds : float
        What the policy itself takes of a step; measure it with the real engine.

    Attributes
    ----------
    now : float
        Modelled seconds.
    """

    def __init__(self, controller: Controller, costs: EngineCosts, policy_seconds: float = 0.0) -> None:
        self.controller, self._costs, self._policy = controller, costs, policy_seconds
        self.now, self.steps = 0.0, 0
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def step(self, served: Served) -> list[_Request]:
        """Take a step; return the requests that ended in it."""
        engine, controller = self.controller.engine, self.controller
        ready = [request for request in self.running if not request.prompt]
        tokens = len(ready) + sum(request.drafts for request in ready)
        context = sum(len(request.trace.prompt) + request.at for request in ready)
        reading, new = self._admit(tokens)
        usual = not reading
        rested = tokens == len(ready) and controller.rests(len(self.running))
        running = [] if rested else [self._running(request) for request in (*ready, *new)]
        gamma = 0 if rested else controller.plan(running)
        rounds = 0 if engine.looks_up else gamma
        unread, forwards = sum(r.unread for r in running) if rounds else 0, rounds * len(running)
        seconds = self._costs.seconds(tokens + reading, len(self.running), context, rounds, forwards, unread)
        self.now += seconds + (0.0 if rested else self._policy)
        verified, over = self._verify(ready, new, served)
        if rested:
            controller.rested(seconds if usual else 0.0)
        elif verified:
            controller.learn(EngineStep(verified, rounds, forwards, unread, seconds if usual else 0.0))
        self._draft(gamma, bool(rounds))
        controller.forget(request.id for request in over)
        self.running = [request for request in self.running if request not in over]
        self.steps += 1
        served.steps += 1
        served.chosen[gamma] += 1
        served.progress.append((self.now, served.tokens))
        return over

    def _admit(self, tokens: int) -> tuple[int, list[_Request]]:
        """Read prompts with what room is left; return how many tokens, and whose prompts end in this step."""
        while self.waiting and len(self.running) < self.controller.engine.most_rows:
            self.running.append(self.waiting.popleft())
        reading, new = 0, []
        for request in self.running:
            if request.prompt:
                part = min(request.prompt, max(MOST_TOKENS - tokens - reading, 0))
                request.prompt -= part
                reading += part
                if not request.prompt:
                    new.append(request)
        return reading, new

    def _running(self, request: _Request) -> Running:
        length, left = len(request.trace.prompt) + request.at, request.trace.budget - request.at
        most = self.controller.engine.most_drafts
        return Running(request.id, length, left, most, max(length - 1 - request.read, 0))

    def _verify(
        self, ready: list[_Request], new: list[_Request], served: Served
    ) -> tuple[list[Verified], list[_Request]]:
        verified, over = [], []
        for request in (*ready, *new):
            trace, at, drafted = request.trace, request.at, request.drafts
            accepted = min(int(trace.accepted[at]), drafted)
            produced = min(accepted + 1, len(trace) - at)
            if request in new:
                request.first = self.now
            else:
                verified.append(Verified(request.id, drafted, accepted, produced))
            request.at += produced
            served.tokens += produced
            served.drafted += drafted
            served.accepted += accepted
            if request.at >= len(trace):
                over.append(request)
                served.first.append(request.first - request.arrived)
                served.each.append((self.now - request.first) / max(len(trace) - 1, 1))
        return verified, over

    def _draft(self, gamma: int, reads: bool) -> None:
        """Make the drafts that the next step verifies."""
        drafted = {}
        for request in self.running:
            request.drafts = 0
            at = request.at
            if gamma and not request.prompt and at < len(request.trace):
                if reads:
                    request.read = len(request.trace.prompt) + at - 1
                most = min(gamma, int(request.trace.ended[at]), request.trace.budget - at - 1)
                if most > 0:
                    drafted[request.id] = most
        kept = self.controller.trim(drafted) if drafted else {}
        for request in self.running:
            request.drafts = kept.get(request.id, 0)


class Fleet:
    """Replicas of one engine that share what their policies learn.

    Parameters
    ----------
    policy : str
        A spec string, as for the plug-in.
    engine : Engine
    costs : EngineCosts
    replicas : int
    sync_every : int
        Steps of a replica between two exchanges with the learner; 0 for none.
    policy_seconds : float
        As for :class:`Replica`.
    """

    def __init__(
        self,
        policy: str,
        engine: Engine,
        costs: EngineCosts,
        *,
        replicas: int = 1,
        sync_every: int = 0,
        policy_seconds: float = 0.0,
    ) -> None:
        if replicas < 1 or sync_every < 0:
            raise UserError("replicas must be 1 or more, and sync_every not negative")
        self._engine, self._sync = engine, sync_every if replicas > 1 else 0
        self._replicas = [Replica(Controller(Settings(policy), engine), costs, policy_seconds) for _ in range(replicas)]
        self._learner: Policy | None = engine_policy(policy, most_rows=engine.most_rows) if self._sync else None

    def serve(self, traces: Sequence[Trace], load: Load, seed: int = 0) -> Served:
        """Serve a load: requests are drawn from the traces in a seeded order, again and again."""
        if not traces:
            raise UserError("there are no traces to serve")
        rng, served = np.random.default_rng(seed), Served()
        count, replicas = load.requests, self._replicas
        order = np.concatenate([rng.permutation(len(traces)) for _ in range(-(-count // len(traces)))])[:count]
        started = max(replica.now for replica in replicas)
        for replica in replicas:
            replica.now = started
        arrivals = np.zeros(count)
        if load.rate:
            arrivals = started + np.cumsum(rng.exponential(1.0 / (load.rate * len(replicas)), count))
        waiting = deque(_Request(f"{seed}-{i}", traces[k], arrivals[i]) for i, k in enumerate(order.tolist()))
        ended: list[tuple[float, int]] = []
        if load.concurrency:
            for _ in range(min(load.concurrency, count)):
                for replica in replicas:
                    if waiting:
                        self._send(waiting.popleft(), replica, replica.now)
        while waiting or any(replica.busy for replica in replicas):
            busy = [replica for replica in replicas if replica.busy]
            now = min((replica.now for replica in busy), default=float("inf"))
            if load.rate and waiting and waiting[0].arrived <= now:
                request = waiting.popleft()
                replica = min(replicas, key=lambda r: len(r.waiting) + len(r.running))
                self._send(request, replica, request.arrived)
                continue
            replica = min(busy, key=lambda r: r.now)
            for request in replica.step(served):
                ended.append((replica.now, len(request.trace)))
                if load.concurrency and waiting:
                    self._send(waiting.popleft(), replica, replica.now)
            if self._sync and replica.steps % self._sync == 0:
                self._exchange(replica)
        served.seconds = max(time for time, _ in ended) - started
        served.rates = _rates(ended, started)
        return served

    def take_over(self, other: Fleet) -> None:
        """Have each replica's policy go on from what that of another fleet has learnt."""
        for mine, its in zip(self._replicas, other._replicas, strict=True):
            mine.controller.policy.load_state_dict(its.controller.policy.state_dict())

    def _send(self, request: _Request, replica: Replica, now: float) -> None:
        if not replica.busy:
            replica.now = max(replica.now, now)
        request.arrived = now
        replica.waiting.append(request)

    def _exchange(self, replica: Replica) -> None:
        """Hand in what a replica's policy learnt, and take over what all did."""
        learner, policy = self._learner, replica.controller.policy
        assert learner is not None
        learner.merge(policy.take_delta())
        policy.load_state_dict(learner.state_dict())


def _rates(ended: list[tuple[float, int]], started: float) -> list[float]:
    ended = sorted(ended)
    found, before = [], started
    for part in np.array_split(np.array(ended), min(10, len(ended))):
        found.append(float(part[:, 1].sum()) / max(float(part[-1, 0]) - before, 1e-12))
        before = float(part[-1, 0])
    return found
