"""Policies that decide the steps of a serving engine: one number of drafts for all requests of a step.

An engine steps many times a second, and asks between two steps, while nothing else runs. So nothing is made per request
and step: a request has a number of its own while it runs, its slot, and a policy keeps what it knows of it in arrays.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies.base import LOOKUP, Context, Decision, Draft, Outcome, Policy
from policies.batches import Forward


@dataclass(slots=True)
class Batch:
    """The requests that a step may draft for.

    Attributes
    ----------
    level : str
        As in :class:`~policies.base.Context`, with the batch's size.
    slots, limits : sequence of int
        Of each request, and the most tokens that it may draft.
    unread : int
        Tokens that the draft model has to read first, of all requests, beyond the latest one of each.
    looks_up, pads : bool
        Whether drafts take no forward of a model, and whether the target reads all requests as wide as the longest.
    """

    level: str
    slots: Sequence[int]
    limits: Sequence[int]
    unread: int = 0
    looks_up: bool = False
    pads: bool = False


@dataclass(slots=True)
class Plan:
    """What a policy wants done in a step.

    Attributes
    ----------
    id : int
        As of a :class:`~policies.base.Decision`.
    gamma : int
        Most tokens to draft, for each request that may draft as many.
    asks : bool
        Whether :meth:`StepPolicy.keep` is to be asked once the drafts are there.
    features : object
        The policy's own affair.
    """

    id: int
    gamma: int
    asks: bool = False
    features: Any = None


class StepPolicy(Policy):
    """A policy that decides steps; a sequence that is decoded alone is a step's only request, in slot 0."""

    in_steps = True

    def rests(self, level: str, rows: int) -> bool:
        """Return whether the coming step is to pass unasked: nothing is drafted in it."""
        return False

    def rested(self, level: str, rows: int, seconds: float) -> None:
        """Take in what a step took that passed unasked; zero seconds if it was no usual one."""

    def plain_seconds(self, level: str, rows: int) -> float:
        """Return the seconds of a step that drafts nothing, as estimated; 0 where nothing is known."""
        return 0.0

    @abstractmethod
    def start(self, slot: int) -> None:
        """Begin a request: nothing is known of what was in its slot."""

    @abstractmethod
    def plan(self, batch: Batch) -> Plan:
        """Decide a step."""

    def keep(self, plan: Plan, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Return how many of their drafted tokens to send to the target, for the requests that drafted any."""
        return list(counts)

    @abstractmethod
    def learn_step(
        self, plan: Plan, slots: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], forward: Forward
    ) -> None:
        """Take in what became of a plan's drafts, by request, and what their verification took."""

    def begin(self, context: Context) -> None:
        self.start(0)

    def decide(self, context: Context) -> Decision:
        looks_up = context.drafters[:1] == (LOOKUP,)
        plan = self.plan(Batch(context.level, [0], [context.max_gamma], context.unread, looks_up))
        return Decision(
            plan.id, min(plan.gamma, context.max_gamma), policy_version=self.version, features=plan,
            ask_at_submit=plan.asks,
        )  # fmt: skip

    def submit(self, decision: Decision, draft: Draft) -> int:
        return self.keep(decision.features, [0], [draft.drafted])[0] if draft.drafted else 0

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        forwards = 0 if outcome.drafter == LOOKUP else outcome.forwards
        forward = Forward(
            outcome.level, 1, 1 + outcome.drafted, forwards, forwards, outcome.caught_up, outcome.seconds,
            outcome.draft_seconds, outcome.verify_seconds, outcome.policy_seconds, outcome.produced,
        )  # fmt: skip
        self.learn_step(decision.features, [0], [outcome.drafted], [outcome.accepted], forward)
