"""One step of speculation: draft, verify, commit.

Single decoding, batches, transformers' assistant and the simulator all take their steps through :class:`Speculation`,
one for each sequence. Who drafts and who verifies is theirs; what the policy is asked and when, what an end of sequence
inside a draft means, and what an outcome says is settled here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Draft, Outcome, Policy
from speckv_online.context import History
from speckv_online.policy_timer import PolicyTimer


class Proposer(Protocol):
    """What a step asks of who proposes a sequence's tokens."""

    def lookup_confidence(self) -> float:
        """Return how likely the coming proposal is right if it takes no forward of a model, 0 if it takes one."""

    def lookup_alternative(self) -> float:
        """Return how likely a lookup is right that could be had, as the drafter ``ngram``, in place of a forward."""

    def use(self, name: str) -> str:
        """Draft what comes of the step as the drafter of this name, by default the first; return the name."""


class Unknown:
    """Proposes tokens of which nothing is known but their signals."""

    def lookup_confidence(self) -> float:
        """No token is a lookup's."""
        return 0.0

    def lookup_alternative(self) -> float:
        """There is no lookup."""
        return 0.0

    def use(self, name: str) -> str:
        """There is nothing to choose."""
        return ""


_NOBODY = Unknown()


class Choice(NamedTuple):
    """What a decision was when it was made; fields as in :class:`~policies.base.Decision`."""

    id: int
    gamma: int
    propensity: float
    policy_version: int


class Speculation:
    """The steps of one sequence: :meth:`decide`, :meth:`add` for each drafted token, :meth:`submit`, :meth:`commit`.

    Parameters
    ----------
    policy : Policy or PolicyTimer
        A guarded policy: its answers are taken as they come.
    history : History
        What the sequence's earlier steps came to; :meth:`commit` advances it.
    signals : ndarray, shape (max_gamma, N_SIGNALS)
        Where the signals of the step's drafts stand: the driver's own, of which policies get read-only views.
    may_drop : bool
        Whether any drafted token may be dropped before it is verified. Not in sampled decoding: to drop a drawn token
        for what it is would bias the output. See :meth:`submit`.
    ends : collection of int
        Tokens that end a sequence: nothing is drafted after one.

    Attributes
    ----------
    decision : Decision
        The policy's own, for the step under way; handed back to it, and not read.
    choice : Choice
        What the decision was when it was made.
    asks : bool
        Whether the policy wanted to be asked after each token.
    gamma : int
        Most tokens that this step drafts.
    tokens : list of int
        The step's drafts: the driver's own, never shown.
    lookups : list of float
        As :attr:`policies.base.Draft.lookups`; tokens that were dropped stay in it.
    drafter : str
        Name of the drafter that the step began with.
    """

    __slots__ = (
        "_asks",
        "_drawn",
        "_ends",
        "_policy",
        "_proposer",
        "_submits",
        "asks",
        "choice",
        "decision",
        "drafter",
        "gamma",
        "history",
        "lookups",
        "may_drop",
        "signals",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        policy: Policy | PolicyTimer,
        history: History,
        signals: np.ndarray,
        *,
        may_drop: bool = True,
        ends: Collection[int] = (),
    ) -> None:
        self._policy, self.history, self.may_drop, self._ends = policy, history, may_drop, frozenset(ends)
        self.signals = signals
        self.decision, self.gamma, self.drafter = Decision(0, 0), 0, ""
        self.tokens: list[int] = []
        self.lookups: list[float] = []
        self._asks = self.asks = self._submits = False
        self._drawn = 0
        self.choice = Choice(0, 0, 1.0, 0)
        self._proposer: Proposer = _NOBODY

    def decide(self, max_gamma: int, remaining: int, proposer: Proposer | None, lag: int = 1) -> int:
        """Begin a step: ask the policy, and return how many tokens to draft at most.

        Parameters
        ----------
        max_gamma, remaining : int
            As in :class:`~policies.base.Context`.
        proposer : Proposer or None
            Who proposes this step's tokens; None if nobody does.
        lag : int
            Context tokens that the proposer has not read yet, the latest one included.
        """
        context = self.begin(max_gamma, remaining, proposer, unread=lag - 1)
        confidence = context.lookup_confidence  # of this moment: a policy may write to its context
        return self.take(self._policy.decide(context), max_gamma, confidence)

    def begin(
        self, max_gamma: int, remaining: int, proposer: Proposer | None, rows: int = 1, unread: int = 0
    ) -> Context:
        """Begin a step: return its context. The arguments are as of :meth:`decide`, and as in the context."""
        self.tokens, self.lookups, self.drafter = [], [], ""
        self._proposer = _NOBODY if proposer is None else proposer
        if proposer is None:
            return self.history.context(max_gamma, remaining, rows=rows)
        confidence, other = proposer.lookup_confidence(), proposer.lookup_alternative()
        return self.history.context(max_gamma, remaining, confidence, other, rows, unread)

    def take(self, decision: Decision, max_gamma: int, confidence: float) -> int:
        """Take the step's decision; return how many tokens to draft at most.

        ``max_gamma`` and ``confidence``, that of the default drafter's lookup, are of before it was made.
        """
        proposer = self._proposer
        if proposer is not _NOBODY:
            name = decision.drafter
            self.drafter = proposer.use(name)
            self.lookups = [proposer.lookup_confidence() if name else confidence]
        # Values of this moment: a policy may write to its decision later.
        asks, gamma = decision.ask_per_token, decision.gamma
        self.decision, self.asks, self._asks = decision, asks, asks
        self._submits = asks or decision.ask_at_submit
        self.choice = Choice(decision.id, gamma, decision.propensity, decision.policy_version)
        self.gamma = gamma = gamma if gamma < max_gamma else max_gamma
        return gamma

    def rest(self) -> None:
        """Take a step that drafts nothing, of which the policy is neither asked nor told."""
        self.tokens, self.lookups, self.drafter, self._proposer = [], [], "", _NOBODY
        self.take(Decision(0, 0), 0, 0.0)

    def add(self, token: int) -> bool:
        """Take a drafted token in, whose signals are written; return whether to draft another."""
        tokens, lookups, proposer = self.tokens, self.lookups, self._proposer
        tokens.append(token)
        lookups.append(proposer.lookup_confidence())
        if len(tokens) >= self.gamma or token in self._ends:
            return False
        return self.answer(self._policy.proceed(self.decision, self.draft())) if self._asks else True

    def note(self, token: int) -> bool:
        """Take a drafted token in, as :meth:`add` does; return whether more may be drafted, if the policy agrees."""
        self.tokens.append(token)
        self.lookups.append(self._proposer.lookup_confidence())
        return len(self.tokens) < self.gamma and token not in self._ends

    @property
    def awaits(self) -> bool:
        """Whether the policy is to be asked before another token is drafted."""
        return self._asks

    def draft(self) -> Draft:
        """Return what the policy is shown before another token."""
        k = len(self.tokens)
        return Draft(k, self._shown(k), self.tokens[:], self.lookups[:], self._proposer.lookup_alternative())

    def answer(self, answer: bool | str) -> bool:
        """Take the policy's answer; return whether to draft another token."""
        if isinstance(answer, str):
            # Lookups take next to nothing, and may be dropped: they are drafted to the end unasked.
            self._asks = self._proposer.use(answer) != LOOKUP
            self.lookups[-1] = self._proposer.lookup_confidence()
            return True
        return answer

    def _shown(self, count: int) -> np.ndarray:
        """Return the signals of the first drafts as policies see them."""
        shown = self.signals[:count]
        shown.flags.writeable = False  # of this view alone
        return shown

    def extend(self, tokens: list[int], lookups: list[float]) -> int:
        """Take tokens in that the policy need not be asked about, with the lookup confidence of each following one.

        Returns how many were taken: those after an end of sequence are not.
        """
        count = len(tokens)
        if not self._ends.isdisjoint(tokens):
            count = next(i + 1 for i, token in enumerate(tokens) if token in self._ends)
            tokens, lookups = tokens[:count], lookups[:count]
        self.tokens += tokens
        self.lookups += lookups
        return count

    def submit(self, proposals: Sequence[object] | None = None) -> int:
        """End the draft: drop the tokens that the policy does not submit, and return how many are left.

        ``proposals`` are those of :meth:`whole`.
        """
        draft = self.whole(proposals)
        if draft is not None:
            self.keep(self._policy.submit(self.decision, draft))
        return len(self.tokens)

    def whole(self, proposals: Sequence[object] | None = None) -> Draft | None:
        """Return the draft that the policy is to judge before it is verified; None where it need not.

        Parameters
        ----------
        proposals : sequence, optional
            In sampled decoding, what each draft was drawn from, None for a deterministic one. Those at the end that are
            deterministic, such as lookups, may be dropped: each follows from the tokens before it, so that whether it
            is dropped does so too. By default none may be.
        """
        k = len(self.tokens)
        self._drawn = 0 if self.may_drop else k if proposals is None else drawn_of(proposals[:k])
        if k > self._drawn and self._submits:
            return Draft(k, self._shown(k), self.tokens[:], self.lookups[:])
        return None

    def keep(self, count: int) -> None:
        """Drop all but the first tokens, as :meth:`whole` allows."""
        del self.tokens[max(count, self._drawn) :]

    def commit(
        self,
        accepted: int,
        produced: int,
        signals: np.ndarray,
        forwards: int,
        lag: int,
        exhausted: bool,
        draft_seconds: float,
        verify_seconds: float,
        seconds: float = 0.0,
    ) -> Outcome:
        """End the step: return what it came to, and advance the history.

        Parameters
        ----------
        accepted : int
            Drafted tokens that the target agrees with.
        produced : int
            Tokens that the step added to the output.
        signals : ndarray, shape (drafted, N_SIGNALS)
            Signals of the submitted tokens, the outcome's own.
        forwards : int
            Drafted tokens that took a forward of the draft model, dropped ones included.
        lag : int
            Context tokens that the drafter had not read when the step began.
        exhausted : bool
            See :func:`is_exhausted`.
        draft_seconds, verify_seconds, seconds : float
            As in :class:`~policies.base.Outcome`.
        """
        tokens, history = self.tokens, self.history
        drafted = len(tokens)
        accepted, labelled = judged(drafted, accepted, produced)
        outcome = Outcome(
            drafted, accepted, labelled, produced, seconds, draft_seconds, verify_seconds, history.level,
            history.context_length, lag - 1 if forwards and lag > 1 else 0, signals, self.drafter, forwards, 0.0,
            exhausted, tokens, self.lookups,
        )  # fmt: skip
        history.update(outcome)
        return outcome


def drawn_of(proposals: Sequence[object]) -> int:
    """Return how many drafts there are up to the last one that was drawn."""
    count = len(proposals)
    while count and proposals[count - 1] is None:
        count -= 1
    return count


def judged(drafted: int, accepted: int, produced: int) -> tuple[int, int]:
    """Return how many of a step's drafts were accepted, and of how many the label is known.

    The label of each accepted token is known, and that of the first one that was rejected. If the sequence ended inside
    the draft, nothing is known of what follows the end.
    """
    if produced <= accepted:
        return produced, produced
    return accepted, accepted if accepted == drafted else accepted + 1


def judged_at_once(drafted: np.ndarray, accepted: np.ndarray, produced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do what :func:`judged` does for arrays of one shape."""
    accepted = np.minimum(accepted, produced)
    return accepted, np.where(produced <= accepted, accepted, np.minimum(accepted + 1, drafted))


def is_exhausted(used: str, drafted: int, lookups: list[float]) -> bool:
    """Whether a drafter has nothing to propose after a step's drafts.

    Parameters
    ----------
    used : str
        Name of the drafter that the step began with.
    drafted : int
        Tokens that were sent to the target.
    lookups : list of float
        How sure the drafter was of each token that it drafted, and of the next one.
    """
    return used == LOOKUP and lookups[-1] == 0.0 and drafted == len(lookups) - 1 < MAX_GAMMA
