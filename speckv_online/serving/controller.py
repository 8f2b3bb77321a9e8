"""Which number of drafts an engine's next step gets, for any engine.

An engine's step verifies the drafts of the step before, and drafts for the next one. Its adapter calls, in this order:
:meth:`Controller.plan` before the step; :meth:`Controller.learn` when the target's tokens are there;
:meth:`Controller.trim` when the new drafts are. To support another engine, write one adapter that does so;
:mod:`speckv_online.serving.vllm` is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, NEUTRAL, Context, Decision, Draft, Outcome
from policies.batches import Forward
from policies.guards.fault import FaultGuard
from speckv_online.context import History
from speckv_online.serving.counts import Counts
from speckv_online.serving.settings import Settings, engine_policy
from speckv_online.serving.state_file import StateFile

#: An engine shows no signals of its drafts: policies that read some are shown these.
SIGNALS = np.tile([NEUTRAL[0], NEUTRAL[1], 0.0, 0.0], (MAX_GAMMA, 1))
SIGNALS.flags.writeable = False


@dataclass(frozen=True)
class Engine:
    """What is known of an engine before its first step.

    Attributes
    ----------
    name : str
        Of the engine, its version and its models; a state belongs to one name.
    level : str
        How the target's weights are stored, see :func:`~policies.level_features.level_bits`.
    method : str
        How drafts are made, in the engine's words.
    looks_up : bool
        Whether drafts take no forward of a model.
    most_drafts, most_rows : int
        Most drafts of a request in a step, and most requests.
    pads : bool
        Whether all requests of a step take as long as the one with the most drafts.
    """

    name: str
    level: str
    method: str
    looks_up: bool
    most_drafts: int
    most_rows: int
    pads: bool = False


class Running(NamedTuple):
    """A request that a step may draft for.

    Attributes
    ----------
    id : str
    length : int
        Tokens of its context.
    remaining : int
        Most tokens that it may still produce.
    most : int
        Most drafts that it may have.
    unread : int
        Tokens that a draft model has to read first, beyond the latest one.
    """

    id: str
    length: int
    remaining: int
    most: int
    unread: int = 0


class Verified(NamedTuple):
    """What a request's drafts came to in a step."""

    id: str
    drafted: int
    accepted: int
    produced: int


class EngineStep(NamedTuple):
    """A step of an engine.

    Attributes
    ----------
    verified : sequence of Verified
        Requests that decoded.
    rounds : int
        Drafts that were made in it for each request, where a model makes them.
    forwards, read : int
        Drafted tokens that took a forward of the draft model, and tokens that it read first.
    seconds : float
        Zero for a step that did anything else than decoding, such as reading a prompt.
    """

    verified: Sequence[Verified]
    rounds: int
    forwards: int
    read: int
    seconds: float


class _Row:
    """A request: its history, the decision whose drafts are being verified, and the one whose drafts come next."""

    __slots__ = ("context", "history", "next", "pending")

    def __init__(self, history: History) -> None:
        self.history = history
        self.pending: Decision | None = None
        self.next: Decision | None = None
        self.context: Context | None = None


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
        self._costs: Any = getattr(policy, "batch_costs", None)
        self._rows: dict[str, _Row] = {}
        self._planned: list[str] = []
        self._spent, self._resting = 0.0, ("", 0)
        self._drafters = (LOOKUP,) if engine.looks_up else ()

    def decoding(self, id: str) -> bool:
        """Whether a step was planned for a request already."""
        return id in self._rows

    def forget(self, ids: Iterable[str]) -> None:
        """Drop requests that are over."""
        for id in ids:
            self._rows.pop(id, None)

    def rests(self, rows: int) -> bool:
        """Return whether the policy lets a step pass unasked, one that neither verifies drafts nor is to make any.

        The adapter may ask where all requests were planned for before. It then calls :meth:`rested` instead of
        :meth:`plan` and :meth:`learn`.
        """
        started = perf_counter()
        level = self._name(rows)
        found = self.policy.joint and self.policy.rests(level, rows)
        if found:
            self.counts.add("steps", 1, level.partition("@")[2] or 1, 0)
            self._resting = level, rows
        self._spent += perf_counter() - started
        return found

    def rested(self, seconds: float) -> None:
        """Count a step that passed unasked, and learn what it took: that is what drafts have to beat."""
        level, rows = self._resting
        if self._costs is not None:
            self._costs.level(level).observe(Forward(level, rows, rows, 0, 0, 0, seconds, 0.0, seconds))
        self.counts.add("seconds", seconds)
        self.counts.add("plain_seconds", seconds)
        self.counts.add("policy_seconds", self._spent)
        self._spent = 0.0

    def _name(self, rows: int) -> str:
        """Return the level of batches of about this size."""
        return self.engine.level if rows < 2 else f"{self.engine.level}@{1 << (rows - 1).bit_length()}"

    def plan(self, running: Sequence[Running]) -> int:
        """Return how many drafts the coming step is to make for each of these requests."""
        started = perf_counter()
        count = len(running)
        self._planned = [request.id for request in running]
        if not running:
            return 0
        level = self._name(count)
        rows, contexts, most_drafts = [], [], min(self.engine.most_drafts, MAX_GAMMA)
        for id, length, remaining, most, unread in running:
            row = self._rows.get(id)
            if row is None:
                row = self._rows[id] = _Row(History(level, "", length, drafters=self._drafters))
                self.policy.begin(row.history.context())
            row.history.level, row.history.context_length = level, length
            rows.append(row)
            most = max(min(most_drafts, most, remaining - 1), 0)
            contexts.append(row.history.context(most, remaining, rows=count, unread=unread))
        decisions: Sequence[Decision | None] = [None] * count
        if not self.policy.joint:
            decisions = [self.policy.decide(context) for context in contexts]
        elif not self.policy.rests(level, count):
            decisions = self.policy.decide_rows(contexts, self.engine.pads, True)
        gamma = 0
        for row, decision in zip(rows, decisions, strict=True):
            row.pending, row.next = row.next, decision
            gamma = gamma if decision is None else max(gamma, decision.gamma)
        self.counts.add("steps", 1, level.partition("@")[2] or 1, gamma)
        self._spent += perf_counter() - started
        return gamma

    def trim(self, drafted: Mapping[str, int]) -> dict[str, int]:
        """Return how many drafts of each request to verify, of those that were made."""
        started = perf_counter()
        asked = [(id, self._rows[id].next, drafted[id]) for id in self._planned if id in drafted and id in self._rows]
        kept = {id: min(count, decision.gamma) for id, decision, count in asked if decision is not None}
        asks = [(id, d) for id, d, count in asked if d is not None and d.ask_at_submit and count]
        if asks:
            decisions = [d for _, d in asks]
            drafts = [Draft(kept[id], SIGNALS[: kept[id]]) for id, _ in asks]
            if self.policy.joint:
                counts = self.policy.submit_rows(decisions, drafts)
            else:
                counts = [self.policy.submit(*pair) for pair in zip(decisions, drafts, strict=True)]
            kept.update((id, n) for (id, _), n in zip(asks, counts, strict=True))
        self.counts.add("trimmed_tokens", sum(drafted.values()) - sum(kept.values()))
        self._spent += perf_counter() - started
        return kept

    def learn(self, step: EngineStep) -> None:
        """Take in what a step came to."""
        started = perf_counter()
        decisions, outcomes, tokens, made = [], [], 0, 0
        rows = len(step.verified)
        level = self._name(rows)
        for id, drafted, accepted, produced in step.verified:
            tokens, made = tokens + 1 + drafted, made + produced
            row = self._rows.get(id)
            if row is None:
                continue
            outcome = Outcome(
                drafted, accepted, accepted + (accepted < drafted), produced, level=level,
                context_length=row.history.context_length, signals=SIGNALS[:drafted], drafter="".join(self._drafters),
                forwards=0 if self._drafters else drafted, exhausted=bool(self._drafters),
            )  # fmt: skip
            row.history.update(outcome)
            if row.pending is not None:
                decisions.append(row.pending)
                outcomes.append(outcome)
        for j in range(max((outcome.drafted for outcome in outcomes), default=0)):
            self.counts.add("drafted_tokens", sum(outcome.drafted > j for outcome in outcomes), j)
            self.counts.add("accepted_tokens", sum(outcome.accepted > j for outcome in outcomes), j)
        if decisions:
            self._teach(decisions, outcomes, rows, tokens, level, step)
        if step.seconds:
            self.counts.add("seconds", step.seconds)
            costs = None if self._costs is None else self._costs.level(level)
            if costs is not None and costs.ready:
                self.counts.add("plain_seconds", made * costs.plain(rows) / rows)
        self._spent += perf_counter() - started
        self.counts.add("policy_seconds", self._spent)
        self._spent = 0.0

    def _teach(
        self, decisions: list[Decision], outcomes: list[Outcome], rows: int, tokens: int, level: str, step: EngineStep
    ) -> None:
        if self.policy.joint:
            forward = Forward(level, rows, tokens, step.rounds, step.forwards, step.read, step.seconds)
            self.policy.learn_rows(decisions, outcomes, forward)
            return
        for decision, outcome in zip(decisions, outcomes, strict=True):
            # Shares that add up to the step. What was drafting of it is not known.
            outcome.seconds = outcome.verify_seconds = step.seconds * (1 + outcome.drafted) / tokens
            self.policy.learn(decision, outcome)

    def save(self, *, last: bool = False) -> None:
        """Write the state if it is time to, or at last."""
        if last or self._file.due:
            self._file.save(self.policy.state_dict(), wait=last)

    def collect(self) -> Counts:
        """Return the counts, with the policy's own failures."""
        fallbacks = self.counts.of("fallbacks")
        for kind, number in self.policy.faults.items():
            fallbacks[(kind,)] = number
        return self.counts
