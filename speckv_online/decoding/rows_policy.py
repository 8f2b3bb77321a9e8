"""What a batch's rows ask of a policy: all at once where the policy decides them together, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from policies.base import Outcome
from policies.batches import Forward
from policies.guards.fault import FaultGuard
from speckv_online.decoding.row import Row
from speckv_online.drafters.batched import RowDrafter, RowProposer


class RowsPolicy:
    """Asks a policy for the rows of a batch's step.

    Parameters
    ----------
    policy : FaultGuard
        A guarded policy.

    Attributes
    ----------
    together : bool
        Whether the step under way is decided for all rows at once: of a batch that began with several, to its end.
    asleep : bool
        Whether it is taken plainly and unasked.
    """

    def __init__(self, policy: FaultGuard) -> None:
        self._policy, self._begun, self.together, self.asleep = policy, 0, False, False
        self._deciding = self._learning = 0.0

    def decide(self, rows: list[Row], drafter: RowDrafter | None, limits: list[int], pads: bool) -> list[int]:
        """Begin a step of every row; return the rows that draft."""
        self._begun = max(self._begun, len(rows))
        self.together = self._policy.joint and self._begun > 1
        proposers = [None if drafter is None else RowProposer(drafter, i) for i in range(len(rows))]
        if not self.together:
            self.asleep = False
            asked = zip(rows, limits, proposers, strict=True)
            return [
                i for i, (row, n, proposer) in enumerate(asked)
                if row.step.decide(n, row.remaining, proposer, 1 if drafter is None else drafter.lag(i))
            ]  # fmt: skip
        level = rows[0].history.level
        started = perf_counter()
        self.asleep = self._policy.rests(level, len(rows))
        self._deciding = perf_counter() - started
        if self.asleep:
            for row in rows:
                row.step.rest()
            return []
        contexts = [
            row.step.begin(n, row.remaining, proposer, len(rows), 0 if drafter is None else drafter.lag(i) - 1)
            for i, (row, n, proposer) in enumerate(zip(rows, limits, proposers, strict=True))
        ]
        sure, may_drop = [c.lookup_confidence for c in contexts], all(row.step.may_drop for row in rows)
        started = perf_counter()
        decisions = self._policy.decide_rows(contexts, pads, may_drop)
        self._deciding += perf_counter() - started
        taken = zip(rows, decisions, limits, sure, strict=True)
        return [i for i, (row, decision, n, own) in enumerate(taken) if row.step.take(decision, n, own)]

    def add(self, rows: list[Row], tokens: Sequence[int]) -> list[bool]:
        """Take a drafted token of each of these rows in; return which draft another."""
        if not self.together:
            return [row.step.add(token) for row, token in zip(rows, tokens, strict=True)]
        going = [row.step.note(token) for row, token in zip(rows, tokens, strict=True)]
        asked = [i for i, row in enumerate(rows) if going[i] and row.step.awaits]
        if asked:
            drafts = [rows[i].step.draft() for i in asked]
            started = perf_counter()
            answers = self._policy.proceed_rows([rows[i].step.decision for i in asked], drafts)
            self._deciding += perf_counter() - started
            for i, answer in zip(asked, answers, strict=True):
                going[i] = rows[i].step.answer(answer)
        return going

    def submit(self, rows: list[Row], drafter: RowDrafter | None) -> None:
        """End the drafts: drop what is not to be verified."""
        proposals = [None if drafter is None else drafter.proposals(i) for i in range(len(rows))]
        if not self.together:
            for row, own in zip(rows, proposals, strict=True):
                row.step.submit(own)
            return
        found = [(row, row.step.whole(own)) for row, own in zip(rows, proposals, strict=True)]
        drafted = [(row, draft) for row, draft in found if draft is not None]
        if drafted:
            started = perf_counter()
            counts = self._policy.submit_rows([row.step.decision for row, _ in drafted], [d for _, d in drafted])
            self._deciding += perf_counter() - started
            for (row, _), count in zip(drafted, counts, strict=True):
                row.step.keep(count)
        for row in rows:
            row.policy.deciding = self._deciding / len(rows)

    def learn(
        self, rows: list[Row], outcomes: list[Outcome], seconds: list[float], typical: list[bool], forward: Forward
    ) -> None:
        """Teach the policy what the step came to, and record it; ``forward.seconds`` are without this call.

        Parameters
        ----------
        rows, outcomes
            The outcomes of :meth:`~speckv_online.decoding.row.Row.commit`.
        seconds : list of float
            What the step took each row, without this call.
        typical : list of bool
            Whether these are those of a usual step.
        forward : Forward
            The step of all rows, its seconds without this call.
        """
        if not self.together:
            for row, outcome, spent, usual in zip(rows, outcomes, seconds, typical, strict=True):
                row.learn(outcome, spent, typical=usual)
            return
        told = [row.told(outcome, spent, usual)
                for row, outcome, spent, usual in zip(rows, outcomes, seconds, typical, strict=True)]  # fmt: skip
        if self.asleep:
            self._learning = 0.0
        else:
            forward.seconds += self._learning
            forward.policy_seconds = self._deciding + self._learning
            started = perf_counter()
            if not all(typical):
                forward.seconds = forward.draft_seconds = forward.verify_seconds = 0.0
            self._policy.learn_rows([row.step.decision for row in rows], told, forward)
            self._learning = perf_counter() - started
        for row in rows:
            row.recorded(self._learning / len(rows))
