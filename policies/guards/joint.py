"""How guards pass on what is asked of a policy that decides a batch's rows together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import numpy as np

from policies.base import Context, Decision, Draft, Outcome
from policies.batches import Forward


class PassesRows:
    """Passes everything on to ``rows``."""

    rows: Any

    def rests(self, level: str, rows: int) -> bool:
        """See :class:`~policies.batches.JointPolicy`."""
        found: bool = self.rows.rests(level, rows)
        return found

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        """See :class:`~policies.batches.JointPolicy`."""
        found: list[Decision] = self.rows.decide_rows(contexts, pads, may_drop)
        return found

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        """See :class:`~policies.batches.JointPolicy`."""
        found: list[bool | str] = self.rows.proceed_rows(decisions, drafts)
        return found

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        """See :class:`~policies.batches.JointPolicy`."""
        found: list[int] = self.rows.submit_rows(decisions, drafts)
        return found

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        """See :class:`~policies.batches.JointPolicy`."""
        self.rows.learn_rows(decisions, outcomes, forward)


class FaultRows:
    """Asks a joint policy, and settles what becomes of wrong answers; a fault guard has one.

    Parameters
    ----------
    policy : JointPolicy
        The policy to guard.
    check : callable
        Given a decision and the most tokens that it may draft: returns the decision, repaired where it can be, or None.
    fallback : callable
        Returns the guard's own decision where so many tokens may be drafted.
    fault : callable
        Counts a fault of a kind, with its reason.
    faults : tuple of type
        What a policy's call may end with.
    """

    def __init__(
        self,
        policy: Any,
        check: Callable[[Decision, int], Decision | None],
        fallback: Callable[[int], Decision],
        fault: Callable[[str, object], None],
        faults: tuple[type[BaseException], ...],
    ) -> None:
        self.policy, self._check, self._fallback, self._fault, self._faults = policy, check, fallback, fault, faults
        self._drafters: tuple[str, ...] = ()

    def rests(self, level: str, rows: int) -> bool:
        """Return whether the policy says so."""
        try:
            return self.policy.rests(level, rows) is True
        except self._faults as error:
            self._fault("rests raised", error)
            return False

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        """Return usable decisions, one for each row."""
        most = [context.max_gamma for context in contexts]
        self._drafters = contexts[0].drafters
        try:
            decisions = self.policy.decide_rows(contexts, pads, may_drop)
            if len(decisions) != len(most):
                raise ValueError(f"{len(decisions)} decisions about {len(most)} rows")
            checked = [self._check(decision, n) for decision, n in zip(decisions, most, strict=True)]
        except self._faults as error:
            self._fault("decide_rows raised", error)
            return [self._fallback(n) for n in most]
        return [self._fallback(n) if found is None else found for found, n in zip(checked, most, strict=True)]

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        """Return usable answers; rows end their drafts where there is none."""
        try:
            answers = list(self.policy.proceed_rows(decisions, drafts))
            if len(answers) != len(decisions):
                raise ValueError(f"{len(answers)} answers about {len(decisions)} rows")
        except self._faults as error:
            self._fault("proceed_rows raised", error)
            return [False] * len(decisions)
        for i, answer in enumerate(answers):
            if isinstance(answer, np.bool_):
                answers[i] = bool(answer)
            elif type(answer) is not bool and not (isinstance(answer, str) and answer in self._drafters):
                self._fault("impossible answer", f"proceed_rows answered {answer!r}")
                answers[i] = False
        return answers

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        """Return how many tokens of each row to send; all where the policy does not say."""
        all_of_them = [draft.drafted for draft in drafts]
        try:
            answers = [int(answer) for answer in self.policy.submit_rows(decisions, drafts)]
            if len(answers) == len(drafts) and all(0 <= n <= k for n, k in zip(answers, all_of_them, strict=True)):
                return answers
            self._fault("impossible answer", f"submits {answers} of {all_of_them} drafted tokens")
        except self._faults as error:
            self._fault("submit_rows raised", error)
        return all_of_them

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        """Teach the policy what came of its own decisions."""
        pairs = [(d, o) for d, o in zip(decisions, outcomes, strict=True) if type(d.id) is int and d.id >= 0]
        good = [(d, o) for d, o in pairs if not o.drafted or isfinite(sum(o.signals.ravel().tolist()))]
        if len(good) < len(pairs):
            self._fault("signals that are no numbers", "such a step teaches nothing")
        if not good:
            return
        try:
            self.policy.learn_rows(*zip(*good, strict=True), forward)
        except self._faults as error:
            self._fault("learn_rows raised", error)
