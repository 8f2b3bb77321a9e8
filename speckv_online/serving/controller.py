"""Which number of drafts an engine's next step gets, for any engine.

An engine's step verifies the drafts of the step before, and drafts for the next one. Its adapter calls, in this order:
:meth:`Controller.plan` before the step; :meth:`Controller.learn` when the target's tokens are there;
:meth:`Controller.trim` when the new drafts are. To support another engine, write one adapter that does so;
:mod:`speckv_online.serving.vllm` is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter

from policies.base import MAX_GAMMA
from policies.guards.fault import FaultGuard
from speckv_online.serving.asking import AskEach, Asking, AskOnce
from speckv_online.serving.counts import Counts
from speckv_online.serving.engine import Engine, EngineStep, Running
from speckv_online.serving.settings import Settings, engine_policy
from speckv_online.serving.state_file import StateFile


class Controller:
    """Asks a policy for an engine.

    Parameters
    ----------
    settings : Settings
    engine : Engine

    Attributes
    ----------
    counts : Counts
    resumed : bool
        Whether the policy started from a file.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        policy = engine_policy(settings.policy, most_rows=engine.most_rows)
        self.engine, self.policy = engine, FaultGuard(policy, min(engine.most_drafts, MAX_GAMMA))
        about = {"policy": settings.policy, "engine": engine.name, "level": engine.level, "method": engine.method}
        self._file = StateFile(settings.state, about | {"most_rows": str(engine.most_rows)})
        self.resumed = self._file.load(policy)
        self.counts = Counts()
        self._asking: Asking = (AskOnce if policy.in_steps else AskEach)(self.policy, engine)
        self._spent, self._resting = 0.0, ("", 0)
        # Requests that verified 0, 1, 2, ... drafted tokens, and that had so many accepted, since they were counted.
        self._drafted, self._accepted = [0] * (MAX_GAMMA + 1), [0] * (MAX_GAMMA + 1)

    def decoding(self, id: str) -> bool:
        """Whether a step was planned for a request already."""
        return self._asking.known(id)

    def forget(self, ids: Iterable[str]) -> None:
        """Drop requests that are over."""
        self._asking.forget(ids)

    def took(self, seconds: float) -> None:
        """Count time that the adapter took for itself, besides this class's."""
        self._spent += seconds

    def rests(self, rows: int) -> bool:
        """Return whether the policy lets a step pass unasked, one that neither verifies drafts nor is to make any.

        The adapter then calls :meth:`rested` instead of :meth:`plan` and :meth:`learn`.
        """
        if not self.policy.in_steps:
            return False
        started = perf_counter()
        level = self._name(rows)
        found = self.policy.rests(level, rows)
        if found:
            self.counts.add("steps", 1, level.partition("@")[2] or 1, 0)
            self._resting = level, rows
        self._spent += perf_counter() - started
        return found

    def rested(self, seconds: float) -> None:
        """Count a step that passed unasked, and have the policy learn what it took; zero as in :class:`EngineStep`."""
        started = perf_counter()
        if seconds:
            self.policy.rested(*self._resting, seconds)
            self.counts.add("seconds", seconds)
            self.counts.add("plain_seconds", seconds)
        self._spend(started)

    def _spend(self, started: float) -> None:
        self.counts.add("policy_seconds", self._spent + perf_counter() - started)
        self._spent = 0.0

    def _name(self, rows: int) -> str:
        """Return the level of batches of about this size."""
        return self.engine.level if rows < 2 else f"{self.engine.level}@{1 << (rows - 1).bit_length()}"

    def plan(self, running: Sequence[Running]) -> int:
        """Return how many drafts the coming step is to make for each of these requests."""
        if not running:
            return 0
        started = perf_counter()
        level = self._name(len(running))
        gamma = self._asking.plan(level, running)
        self.counts.add("steps", 1, level.partition("@")[2] or 1, gamma)
        self._spent += perf_counter() - started
        return gamma

    def trim(self, drafted: Mapping[str, int]) -> dict[str, int]:
        """Return how many drafts of each request to verify, of those that were made."""
        started = perf_counter()
        kept = self._asking.trim(drafted)
        self.counts.add("trimmed_tokens", sum(drafted.values()) - sum(kept.values()))
        self._spent += perf_counter() - started
        return kept

    def learn(self, step: EngineStep) -> None:
        """Take in what a step came to."""
        started = perf_counter()
        rows = tokens = len(step.verified)
        level, made = self._name(rows), 0
        for _, drafted, accepted, produced in step.verified:
            made += produced
            if drafted:
                tokens += drafted
                self._drafted[drafted] += 1
                self._accepted[accepted] += 1
        self._asking.learn(level, step, tokens, made)
        if step.seconds:
            self.counts.add("seconds", step.seconds)
            if self.policy.in_steps:
                self.counts.add("plain_seconds", made * self.policy.plain_seconds(level, rows) / rows)
        self._spend(started)

    def save(self, *, last: bool = False) -> None:
        """Write the state if it is time to, or at last."""
        if last or self._file.due:
            self._file.save(self.policy.state_dict(), wait=last)

    def collect(self) -> Counts:
        """Return the counts, with the policy's own failures."""
        for name, seen in (("drafted_tokens", self._drafted), ("accepted_tokens", self._accepted)):
            for j in range(MAX_GAMMA):
                if count := sum(seen[j + 1 :]):
                    self.counts.add(name, count, j)
            seen[:] = [0] * len(seen)
        fallbacks = self.counts.of("fallbacks")
        for kind, number in self.policy.faults.items():
            fallbacks[(kind,)] = number
        return self.counts
