"""How a fault guard asks a policy that decides steps: a wrong answer costs speed only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from policies.base import MAX_GAMMA, Policy
from policies.batches import Forward
from policies.guards.joint import PassesRows
from policies.steps import Batch, Plan

Answer = TypeVar("Answer")


class FaultSteps(PassesRows):
    """The part of a :class:`~policies.guards.fault.FaultGuard` for steps."""

    policy: Policy
    fallback_gamma: int
    _own_id: int
    _fault: Callable[[str, object], None]
    #: What a policy's call may end with. An interrupt is the user's.
    _faults: tuple[type[BaseException], ...] = (Exception, SystemExit)

    def _ask(self, name: str, otherwise: Answer, *arguments: Any) -> Answer:
        """Return what a call of the policy returns; a fault, and ``otherwise``, if it raises or is of another type."""
        try:
            answer = getattr(self.policy, name)(*arguments)
            if type(answer) is type(otherwise):
                return answer
            self._fault("impossible answer", f"{name} answered {answer!r}")
        except self._faults as error:
            self._fault(f"{name} raised", error)
        return otherwise

    def start(self, slot: int) -> None:
        """See :class:`~policies.steps.StepPolicy`, as for the other methods."""
        self._ask("start", None, slot)

    def rested(self, level: str, rows: int, seconds: float) -> None:
        self._ask("rested", None, level, rows, seconds)

    def plain_seconds(self, level: str, rows: int) -> float:
        return self._ask("plain_seconds", 0.0, level, rows)

    def plan(self, batch: Batch) -> Plan:
        self._own_id -= 1
        own = Plan(self._own_id, min(self.fallback_gamma, max(batch.limits)))
        found = self._ask("plan", own, batch)
        if type(found.id) is not int or type(found.gamma) is not int or not 0 <= found.gamma <= MAX_GAMMA:
            self._fault("impossible gamma", f"planned {found!r}")
            return own
        return found

    def keep(self, plan: Plan, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        own = list(counts)
        found = self._ask("keep", own, plan, slots, counts)
        if len(found) == len(own) and all(type(n) is int and 0 <= n <= k for n, k in zip(found, own, strict=True)):
            return found
        self._fault("impossible answer", f"keeps {found} of {own} drafted tokens")
        return own

    def learn_step(
        self, plan: Plan, slots: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], forward: Forward
    ) -> None:
        if plan.id >= 0:  # the guard's own are not shown to the policy, which could not know them
            self._ask("learn_step", None, plan, slots, drafted, accepted, forward)
