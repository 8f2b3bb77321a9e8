"""A sequence under way: its tokens, its steps, what the policy took of them, and their records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from policies.base import N_SIGNALS, Outcome, Policy
from speckv_online.context import History, summarise
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.sequence import TokenSequence
from speckv_online.io.step_records import StepRecord
from speckv_online.policy_timer import PolicyTimer
from speckv_online.speculation import Speculation


class Row:
    """One sequence of a single decode, of a batch, or of transformers' assisted generation.

    Parameters
    ----------
    policy : Policy
        A guarded policy.
    sequence : TokenSequence
        The sequence, which holds its prompt only.
    level, task : str
        As in :class:`~policies.base.Context`.
    drafters : tuple of str
        Names that a decision's ``drafter`` may take.
    budget : int
        Most tokens to produce.
    max_gamma : int
        Most tokens that any step drafts.
    sampled : bool
        Whether tokens are drawn.
    number : int
        Which prompt of a batch it is.
    unseen : int
        Tokens that a cache holds before the prompt's ids.

    Attributes
    ----------
    policy : PolicyTimer
        What the steps ask.
    step : Speculation
        The step under way.
    out : Generation
        What there is so far.
    """

    def __init__(
        self,
        policy: Policy,
        sequence: TokenSequence,
        *,
        level: str,
        task: str = "",
        drafters: tuple[str, ...] = (),
        budget: int,
        max_gamma: int,
        sampled: bool = False,
        number: int = 0,
        unseen: int = 0,
    ) -> None:
        self.sequence, self.budget, self.number, self.sampled = sequence, budget, number, sampled
        self.history = History(level, task, unseen + len(sequence.tokens), sequence.tokens, drafters)
        self.policy, self._begin = PolicyTimer(policy), policy.begin
        self.step = Speculation(
            self.policy, self.history, np.zeros((max(max_gamma, 1), N_SIGNALS)), may_drop=not sampled,
            ends=sequence.eos,
        )  # fmt: skip
        self.out = Generation()

    def begin(self) -> None:
        """Tell the policy of the new text."""
        self._begin(self.history.context())

    @property
    def remaining(self) -> int:
        """Tokens left of the budget."""
        return self.budget - len(self.out.tokens)

    def commit(
        self,
        tokens: list[int],
        accepted: int,
        *,
        forwards: int,
        lag: int,
        exhausted: bool,
        draft_seconds: float,
        verify_seconds: float,
    ) -> Outcome:
        """End the step, which added these tokens to the sequence; see :meth:`Speculation.commit`."""
        step = self.step
        signals = step.signals[: len(step.tokens)].copy()
        self.out.tokens += tokens
        return step.commit(
            accepted, len(tokens), signals, forwards, lag, exhausted, draft_seconds, verify_seconds
        )  # fmt: skip

    def learn(self, outcome: Outcome, seconds: float, typical: bool, draft_typical: bool = True) -> None:
        """Teach the policy what the step came to, and record it.

        Parameters
        ----------
        outcome : Outcome
            Of :meth:`commit`.
        seconds : float
            What the step took, without this call.
        typical : bool
            Whether its seconds are those of a usual step; else the policy is told the draft's alone.
        draft_typical : bool
            Whether the draft's are.
        """
        decision, told = self.step.decision, self.told(outcome, seconds, typical, draft_typical)
        self.policy.learn(decision, told)
        self.recorded(self.policy.learning)

    def told(self, outcome: Outcome, seconds: float, typical: bool, draft_typical: bool = True) -> Outcome:
        """Record the step; return what the policy is told of it. The arguments are as of :meth:`learn`."""
        deciding, before = self.policy.deciding, self.policy.learning
        outcome.seconds, outcome.policy_seconds = seconds + before, deciding + before
        record = record_of(self, outcome)
        record.decide_seconds, record.seconds = deciding, seconds
        self.out.steps.append(record)
        if typical:
            return outcome
        drafting = outcome.draft_seconds if draft_typical else 0.0
        return replace(outcome, seconds=0.0, verify_seconds=0.0, draft_seconds=drafting)

    def recorded(self, learning: float) -> None:
        """Note in the step's record what the policy took to learn from it."""
        record, self.policy.learning = self.out.steps[-1], learning
        record.learn_seconds = learning
        record.seconds += learning


def record_of(row: Row, outcome: Outcome) -> StepRecord:
    """Return the record of the step that just came to an end, without the policy's own seconds."""
    mean_h, max_h, mean_c, min_c = summarise(outcome.signals)
    choice = row.step.choice
    return StepRecord(
        step=row.history.step - 1, gamma=choice.gamma, drafted=outcome.drafted, accepted=outcome.accepted,
        labelled=outcome.labelled, produced=outcome.produced, mean_draft_entropy=mean_h, mean_draft_confidence=mean_c,
        max_draft_entropy=max_h, min_draft_confidence=min_c, context_length=outcome.context_length,
        propensity=choice.propensity, policy_version=choice.policy_version, decision_id=choice.id,
        decide_seconds=0.0, draft_seconds=outcome.draft_seconds, verify_seconds=outcome.verify_seconds,
        seconds=outcome.seconds, forwards=outcome.forwards,
    )  # fmt: skip
