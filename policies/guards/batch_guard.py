"""The safety guard's part for batches that are decided together: a batch never falls far behind plain decoding.

A budget of tokens is kept per level and size of the batch. A step adds what its rows produced, and takes off (1 -
epsilon) times what the same rows would have produced without drafts in the step's modelled seconds: rows over T(rows)
per second, with T the plain step's seconds. The seconds of reading and the policy's own count too. While the budget is
overdrawn, the batch decodes plainly, unasked, which fills it up again. Plain steps are probed ever more rarely, so that
T never goes stale. The batch sleeps, as single decoding does (:mod:`policies.guards.sleep`), where asking the policy
does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from policies.base import Context, Decision, Outcome, PolicyError, State
from policies.batches import Forward
from policies.estimators.bayesian_linear import check_array
from policies.guards.joint import PassesRows
from policies.guards.ledger import PROBE
from policies.guards.sleep import NUMBERS, STRETCH, SleepSchedule
from policies.steps import Batch, Plan

#: Rows even each other out: how much a stretch's gain per token varies until there is data.
SPREAD = 0.03
#: Steps of a stretch at least.
STEPS = 12
#: The policy's own seconds in a step count at most as so many times their mean, whose latest step has this weight.
STALL, LATEST = 5.0, 0.05
KEY = "safety_batch."
#: Numbers of an account besides those of the sleep schedule.
OWN = 5


class BatchAccount:
    """Budget, probes and sleep of the batches of one level and size."""

    def __init__(self, budget: float) -> None:
        self.budget, self.steps, self.interventions = budget, 0, 0
        self.probes, self.due = 0, PROBE
        self.sleep = SleepSchedule(SPREAD)
        self.asleep, self.left = False, 0.0
        self.policy_seconds = 0.0

    def row(self) -> list[float]:
        """Everything that is saved; a stretch under way is not."""
        return [float(self.steps), self.budget, float(self.interventions), float(self.probes), float(self.due),
                *self.sleep.row()]  # fmt: skip

    def fill(self, row: list[float]) -> None:
        """Restore :meth:`row`."""
        self.steps, self.budget, self.interventions = int(row[0]), row[1], int(row[2])
        self.probes, self.due = int(row[3]), int(row[4])
        self.sleep.fill(row[OWN:])


class BatchGuard(PassesRows):
    """Guards a joint policy in batches; a :class:`~policies.guards.safety.SafetyGuard` has one.

    Parameters
    ----------
    policy : JointPolicy
        With ``batch_costs``, whose ``level`` gives a level's :class:`~policies.costs.batch_costs.BatchCosts`.
    epsilon, burn_in, sleeps
        As for the safety guard.
    """

    def __init__(self, policy: Any, epsilon: float, burn_in: float, sleeps: bool) -> None:
        self.rows, self.epsilon, self.burn_in, self.sleeps = policy, epsilon, burn_in, sleeps
        self._accounts: dict[str, BatchAccount] = {}

    def account(self, level: str) -> BatchAccount:
        """Return an account, made on first use."""
        found = self._accounts.get(level)
        if found is None:
            found = self._accounts[level] = BatchAccount(self.burn_in)
        return found

    def rests(self, level: str, rows: int) -> bool:
        """Return whether the coming step is plain and unasked."""
        account = self._accounts.get(level) or self.account(level)
        if account.budget < 0.0:
            account.interventions += 1
            account.budget += self.epsilon * rows
            return True
        if account.left <= 0.0:
            account.asleep = self.sleeps and account.sleep.start(1.0, True)
            account.left = float(max(STRETCH, STEPS * rows))
        if account.asleep:
            account.left -= rows
        return account.asleep or bool(self.rows.rests(level, rows))

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        """Ask the policy, but for probes of a plain step."""
        decisions: list[Decision] = self.rows.decide_rows(contexts, pads, may_drop)
        if self._due(contexts[0].level):
            return [replace(decision, gamma=0, drafter="") for decision in decisions]
        return decisions

    def plan(self, batch: Batch) -> Plan:
        """Ask a policy that decides steps, in the same way."""
        plan: Plan = self.rows.plan(batch)
        return replace(plan, gamma=0) if self._due(batch.level) else plan

    def _due(self, level: str) -> bool:
        """Count a step that the policy was asked for; return whether it is to be a probe of a plain one."""
        account = self.account(level)
        account.steps += 1
        if account.steps < account.due:
            return False
        self._postpone(account)
        return True

    @staticmethod
    def _postpone(account: BatchAccount) -> None:
        account.probes += 1
        account.due = max(PROBE * account.probes**2, account.steps + 1)

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        """Teach the policy, and count the step."""
        seen = self.rows.has_learnt(decisions[0].id)
        self.rows.learn_rows(decisions, outcomes, forward)
        if not seen:
            self._book(forward, float(sum(outcome.produced for outcome in outcomes)))

    def learn_step(
        self, plan: Plan, slots: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], forward: Forward
    ) -> None:
        """Teach a policy that decides steps, and count the step."""
        seen = self.rows.has_learnt(plan.id)
        self.rows.learn_step(plan, slots, drafted, accepted, forward)
        if not seen:
            self._book(forward, float(forward.produced))

    def _book(self, forward: Forward, produced: float) -> None:
        """Settle what a step made with what a plain one would have."""
        costs = self.rows.batch_costs.level(forward.level)
        if not costs.ready:
            return
        account, rows = self.account(forward.level), forward.rows
        if forward.tokens == rows and account.steps >= PROBE * account.probes**2:
            self._postpone(account)
        own, usual = forward.policy_seconds, account.policy_seconds
        account.policy_seconds += LATEST * (min(own, STALL * usual) - usual) if usual else own
        seconds = costs.step(forward) + (min(own, STALL * usual) if usual else own)
        plain = rows * seconds / costs.plain(rows)
        account.left -= produced
        account.sleep.tokens += produced
        account.sleep.seconds += plain
        most = self.burn_in
        account.budget = min(max(account.budget + produced - (1.0 - self.epsilon) * plain, -most), 4.0 * most)

    def state(self) -> State:
        """All accounts."""
        return {f"{KEY}{level}": np.array(account.row()) for level, account in self._accounts.items()}

    def load(self, state: State) -> None:
        """Restore :meth:`state`; a level that is not in it keeps the account it has."""
        for key in state:
            if not key.startswith(KEY):
                continue
            row = check_array(state, key, (OWN + NUMBERS,)).astype(float)
            try:
                self.account(key.removeprefix(KEY)).fill(row.tolist())
            except ValueError as error:
                raise PolicyError(f"the state's '{key}' is no account of a batch: {error}") from None

    def info(self) -> dict[str, Any]:
        """How often the policy was held back, and how many stretches it slept through."""
        held = {f"{level}.held_back": account.interventions for level, account in self._accounts.items()}
        slept = {f"{level}.slept": a.sleep.slept for level, a in self._accounts.items() if a.sleep.slept}
        return held | slept
