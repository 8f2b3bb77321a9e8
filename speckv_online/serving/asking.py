"""How a policy is asked about a step: request by request, or once for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, NEUTRAL, Decision, Draft, Outcome
from policies.batches import Forward
from policies.guards.fault import FaultGuard
from policies.steps import Batch, Plan
from speckv_online.context import History
from speckv_online.serving.engine import Engine, EngineStep, Running

#: An engine shows no signals of its drafts: policies that read some are shown these.
SIGNALS = np.tile([NEUTRAL[0], NEUTRAL[1], 0.0, 0.0], (MAX_GAMMA, 1))
SIGNALS.flags.writeable = False


class Asking(ABC):
    """Asks a policy.

    Parameters
    ----------
    policy : FaultGuard
    engine : Engine
    """

    def __init__(self, policy: FaultGuard, engine: Engine) -> None:
        self.policy, self.engine = policy, engine
        self._most = min(engine.most_drafts, MAX_GAMMA)

    @abstractmethod
    def __len__(self) -> int:
        """How many requests are known."""

    @abstractmethod
    def known(self, id: str) -> bool:
        """Whether a step was planned for a request already."""

    @abstractmethod
    def forget(self, ids: Iterable[str]) -> None:
        """Drop requests that are over."""

    @abstractmethod
    def plan(self, level: str, running: Sequence[Running]) -> int:
        """Return how many drafts the coming step is to make for each of these requests."""

    @abstractmethod
    def trim(self, drafted: Mapping[str, int]) -> dict[str, int]:
        """Return how many drafts of each request to verify, of those that were made."""

    @abstractmethod
    def learn(self, level: str, step: EngineStep, tokens: int, produced: int) -> None:
        """Teach what a step came to, that read so many tokens and produced some."""


class AskOnce(Asking):
    """Asks a :class:`~policies.steps.StepPolicy`: once for all requests."""

    def __init__(self, policy: FaultGuard, engine: Engine) -> None:
        super().__init__(policy, engine)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        # The plan whose drafts are being verified, and the one whose drafts come next: for whom, and how many at most.
        self._pending: Plan | None = None
        self._next: Plan | None = None
        self._planned: list[tuple[str, int, int]] = []

    def __len__(self) -> int:
        return len(self._slots)

    def known(self, id: str) -> bool:
        return id in self._slots

    def forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            if (slot := self._slots.pop(id, None)) is not None:
                self._free.append(slot)

    def _start(self, id: str) -> int:
        slot = self._slots[id] = self._free.pop() if self._free else len(self._slots)
        self.policy.start(slot)
        return slot

    def plan(self, level: str, running: Sequence[Running]) -> int:
        own, unread, planned, limits = self._most, 0, [], []
        for id, _, remaining, most, read in running:
            slot = self._slots.get(id)
            slot = self._start(id) if slot is None else slot
            left = remaining - 1
            limit = left if left < own else own
            limit = (most if most < limit else limit) if limit > 0 else 0
            unread += read
            limits.append(limit)
            planned.append((id, slot, limit))
        slots, engine = [slot for _, slot, _ in planned], self.engine
        before = self._next
        self._planned, self._pending = planned, before
        if self.policy.rests(level, len(limits)):
            if before is not None and before.gamma:
                self._next = None
            else:  # a plan without drafts stands for this step, and is learnt from once the policy is asked again
                self._pending = None
            return 0
        plan = self._next = self.policy.plan(Batch(level, slots, limits, unread, engine.looks_up, engine.pads))
        return min(plan.gamma, max(limits))

    def trim(self, drafted: Mapping[str, int]) -> dict[str, int]:
        plan, ids, slots, counts = self._next, [], [], []
        if plan is None:  # the step passes unasked
            return dict.fromkeys(drafted, 0)
        for id, slot, limit in self._planned:
            if id in drafted and id in self._slots:
                ids.append(id)
                slots.append(slot)
                counts.append(min(drafted[id], plan.gamma, limit))
        if plan.asks and any(counts):
            counts = self.policy.keep(plan, slots, counts)
        return dict(zip(ids, counts, strict=True))

    def learn(self, level: str, step: EngineStep, tokens: int, produced: int) -> None:
        if self._pending is None:
            return
        slots, drafted, accepted = [], [], []
        for id, count, right, _ in step.verified:
            if (slot := self._slots.get(id)) is not None:
                slots.append(slot)
                drafted.append(count)
                accepted.append(right)
        if slots:
            forward = Forward(
                level, len(step.verified), tokens, step.rounds, step.forwards, step.read, step.seconds,
                produced=produced,
            )  # fmt: skip
            self.policy.learn_step(self._pending, slots, drafted, accepted, forward)


class _Row:
    """A request: its history, the decision whose drafts are being verified, and the one whose drafts come next."""

    __slots__ = ("history", "next", "pending")

    def __init__(self, history: History) -> None:
        self.history = history
        self.pending: Decision | None = None
        self.next: Decision | None = None


class AskEach(Asking):
    """Asks any other policy: request by request."""

    def __init__(self, policy: FaultGuard, engine: Engine) -> None:
        super().__init__(policy, engine)
        self._rows: dict[str, _Row] = {}
        self._planned: list[str] = []
        self._drafters = (LOOKUP,) if engine.looks_up else ()

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, id: str) -> bool:
        return id in self._rows

    def forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._rows.pop(id, None)

    def plan(self, level: str, running: Sequence[Running]) -> int:
        gamma, self._planned = 0, [request.id for request in running]
        for id, length, remaining, most, unread in running:
            row = self._rows.get(id)
            if row is None:
                row = self._rows[id] = _Row(History(level, "", length, drafters=self._drafters))
                self.policy.begin(row.history.context())
            row.history.level, row.history.context_length = level, length
            most = max(min(self._most, most, remaining - 1), 0)
            context = row.history.context(most, remaining, rows=len(running), unread=unread)
            row.pending, row.next = row.next, self.policy.decide(context)
            gamma = max(gamma, row.next.gamma)
        return gamma

    def trim(self, drafted: Mapping[str, int]) -> dict[str, int]:
        kept = {}
        for id in self._planned:
            if id in drafted and id in self._rows and (decision := self._rows[id].next) is not None:
                kept[id] = count = min(drafted[id], decision.gamma)
                if decision.ask_at_submit and count:
                    kept[id] = self.policy.submit(decision, Draft(count, SIGNALS[:count]))
        return kept

    def learn(self, level: str, step: EngineStep, tokens: int, produced: int) -> None:
        for id, drafted, accepted, made in step.verified:
            row = self._rows.get(id)
            if row is None:
                continue
            # Shares that add up to the step. What was drafting of it is not known.
            seconds = step.seconds * (1 + drafted) / tokens
            outcome = Outcome(
                drafted, accepted, accepted + (accepted < drafted), made, seconds, verify_seconds=seconds, level=level,
                context_length=row.history.context_length, signals=SIGNALS[:drafted], drafter="".join(self._drafters),
                forwards=0 if self._drafters else drafted, exhausted=bool(self._drafters),
            )  # fmt: skip
            row.history.update(outcome)
            if row.pending is not None:
                self.policy.learn(row.pending, outcome)
