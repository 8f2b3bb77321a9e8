"""Policies that decide all rows of a batch at once.

In a batch one forward verifies all rows, and one forward of the draft serves all rows that draft on. What a row's next
token costs then depends on what the other rows do. A :class:`JointPolicy` is asked once for all rows. Any other policy
is asked row by row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from policies.base import Context, Decision, Draft, Outcome, Policy

#: Most rows of a batch.
MOST_ROWS = 16


@dataclass(slots=True)
class Forward:
    """What one step of a batch was, all rows together.

    Attributes
    ----------
    level : str
        As in the rows' contexts.
    rows : int
        Rows that shared the forward.
    tokens : int
        Tokens that the target read: the latest one and the drafts of each row, and padding where there is some.
    rounds, forwards : int
        Forwards of the draft model, and drafted tokens that they made, summed over rows.
    read : int
        Context tokens, beyond the latest one of each row, that the draft model read first.
    seconds, draft_seconds, verify_seconds : float
        The whole step and its two main parts; zero where they are not those of a usual step.
    policy_seconds : float
        What the policy took of ``seconds``.
    produced : int
        Tokens that it added to the outputs; told to policies that decide steps.
    """

    level: str
    rows: int
    tokens: int
    rounds: int = 0
    forwards: int = 0
    read: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    policy_seconds: float = 0.0
    produced: int = 0


class JointPolicy(Policy):
    """A policy that decides the rows of a batch together; alone, a sequence is decided as by any policy.

    The methods follow those of :class:`~policies.base.Policy`, with lists in place of single arguments. They are asked
    about batches that begin with two rows or more, to their end.
    """

    joint = True

    def rests(self, level: str, rows: int) -> bool:
        """Return whether to take the batch's coming step plainly: nothing is drafted, asked, or learnt from it."""
        return False

    @abstractmethod
    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        """Return a decision for each row.

        Parameters
        ----------
        contexts : sequence of Context
            ``rows`` is how many there are, and ``unread`` what the draft model has to read first.
        pads : bool
            Whether the target reads each row as wide as the longest draft.
        may_drop : bool
            Whether :meth:`submit_rows` will be asked: not where a row's tokens are drawn.
        """

    @abstractmethod
    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        """Return for each row that asks whether to draft another token."""

    @abstractmethod
    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        """Return for each row that drafted, and asks, how many tokens to send to the target."""

    @abstractmethod
    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        """Take in what the rows' decisions came to, and what the step took."""
