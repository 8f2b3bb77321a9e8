"""Replaying exact traces: the steps that real decoding would take under any policy, with seconds from a cost model.

The simulator makes the decoder's calls in the decoder's order (begin, decide, proceed after each drafted token but the
last and those of a tail of lookups, submit, learn), so the steps agree with real greedy decoding one by one, lookups in
place of forwards included, but for policies that go by what a trace does not hold: measured seconds, other drafters,
and going back to the model within a step. Its seconds are modelled, not measured.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, Policy
from policies.fixed import Fixed
from policies.guards.fault import FaultGuard
from speckv_online.context import History
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import LEAST, CostTable, LevelCost
from speckv_online.speculation import Speculation, judged_at_once
from speckv_online.traces.trace import Trace, until_end


@dataclass(frozen=True)
class Replay:
    """Steps of one or more replayed traces; every array has shape (steps,).

    Attributes
    ----------
    position : ndarray of int
        Output position t at which each step began.
    gamma : ndarray of int
        What the policy asked for, cut to what the step allowed.
    drafted, accepted, tested, produced : ndarray of int
        As in a step record: ``drafted`` counts the tokens that were submitted.
    proposed : ndarray of int
        Tokens drafted in all, withheld ones included.
    seconds : ndarray of float
        Modelled seconds.
    """

    position: np.ndarray
    gamma: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    labelled: np.ndarray
    produced: np.ndarray
    proposed: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    @property
    def tokens(self) -> int:
        """Tokens produced."""
        return int(self.produced.sum())

    @property
    def goodput(self) -> float:
        """Tokens per modelled second."""
        return self.tokens / float(self.seconds.sum())

    @classmethod
    def join(cls, parts: Iterable[Replay]) -> Replay:
        """Put replays one after another."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))

    def split(self) -> list[Replay]:
        """Take replays apart again, one per trace: each begins at position 0."""
        starts = np.flatnonzero(self.position == 0)[1:]
        columns = (np.split(getattr(self, name), starts) for name in self.__dataclass_fields__)
        return [Replay(*part) for part in zip(*columns, strict=True)]


class Simulator:
    """Replays traces under one policy, which goes on learning from trace to trace.

    Parameters
    ----------
    policy : Policy
        Wrapped in a fault guard, as the decoder does.
    cost : CostTable
        Where the seconds come from.
    max_gamma : int
        Most tokens that any step drafts.

    Examples
    --------
    ``Simulator(make_policy("online:seed=3"), load_cost("rtx3090-release")).run(traces).goodput``
    """

    def __init__(self, policy: Policy, cost: CostTable, max_gamma: int = MAX_GAMMA) -> None:
        # A slow decision is no fault here: a replay must not depend on how busy the machine is.
        self.policy = policy if isinstance(policy, FaultGuard) else FaultGuard(policy, stall_seconds=math.inf)
        self.cost, self.max_gamma = cost, max_gamma

    def run(self, traces: Iterable[Trace]) -> Replay:
        """Replay several traces in order."""
        return Replay.join([self.replay(trace) for trace in traces])

    def replay(self, trace: Trace) -> Replay:
        """Replay one trace.

        Raises
        ------
        UserError
            If the trace's drafts are shorter than ``max_gamma``, or the cost table lacks its level.
        """
        cost, inner = self._check(trace), self.policy.policy
        # Nothing that a fixed gamma could observe changes what it does: no need to ask it.
        if isinstance(inner, Fixed) and type(inner).decide is Fixed.decide and type(inner).learn is Policy.learn:
            return replay_fixed(trace, inner.gamma, cost, self.max_gamma)
        flat = list(chain.from_iterable(self._steps(trace, cost)))
        # A few times as quick as an array of each column's numbers.
        table = np.frombuffer(struct.pack(f"{len(flat)}d", *flat)).reshape(-1, len(Replay.__dataclass_fields__)).T
        columns: list[np.ndarray] = [*table[:-1].astype(np.int64, order="C"), table[-1].copy()]
        return Replay(*columns)

    def steps(self, trace: Trace) -> Iterator[tuple[int, float]]:
        """Replay one trace step by step, for those who do something in between; yields (tokens, seconds) of each."""
        for row in self._steps(trace, self._check(trace)):
            yield row[5], row[7]

    def _check(self, trace: Trace) -> LevelCost:
        if trace.gamma < self.max_gamma:
            raise UserError(f"the trace drafts {trace.gamma} tokens, too few to replay gamma up to {self.max_gamma}")
        return self.cost.level(trace.level)

    def _steps(self, trace: Trace, cost: LevelCost) -> Iterator[tuple[int, int, int, int, int, int, int, float]]:
        policy, budget, longest = self.policy, trace.budget, self.max_gamma
        end, t_d, t_v, t_0 = len(trace), cost.draft_seconds, cost.verify_seconds, cost.overhead_seconds
        slope, usual, catch_up = cost.context_seconds, cost.context_length, cost.catch_up_seconds
        first, reads = cost.first_draft_seconds, trace.reads
        output, forwards, read = trace.rows.tokens, trace.rows.forwards, trace.rows.read
        tokens = trace.prompt.tolist()
        names = () if trace.switch is None else (trace.meta["drafter"], LOOKUP)
        history = History(trace.level, trace.task, len(tokens), tokens, names)
        step = Speculation(policy, history, trace.rows.signals[0], ends=trace.ends)
        proposer = TraceProposer(trace, step)
        policy.begin(history.context())
        t, lag = 0, len(tokens) if reads else 1
        while t < end:
            # Conditions instead of min() here: a call costs more than all that it compares.
            left = budget - t - 1
            proposer.move(t)
            gamma = step.decide(longest if longest < left else left, left + 1, proposer, lag)
            proposed = proposer.draft(gamma)
            k, context_length = step.submit(), history.context_length
            n = proposer.accepted if proposer.accepted < k else k
            produced = n + 1 if t + n < end else n  # fewer if the draft held the end-of-sequence token
            asked = proposed if proposed < proposer.switch_at else proposer.switch_at
            paid, reached = forwards[t][asked], read[t][asked]
            draft_seconds = first + t_d * paid + catch_up * (lag + reached - paid) if paid else 0.0
            verify_seconds = t_v[k] + slope * (context_length - usual)
            if verify_seconds < LEAST * t_v[k]:
                verify_seconds = LEAST * t_v[k]
            seconds = draft_seconds + verify_seconds + t_0
            outcome = step.commit(
                n, produced, proposer.signals[:k], paid, lag, k == proposer.there < proposer.size, draft_seconds,
                verify_seconds, seconds,
            )  # fmt: skip
            labelled = outcome.labelled
            policy.learn(step.decision, outcome)
            yield t, step.choice.gamma, k, n, labelled, produced, proposed, seconds
            # The draft's cache keeps what it has read of the accepted tokens; the target's token comes on top.
            if reads:
                lag = n + 1 - (reached if reached < n else n) if paid else lag + produced
            tokens += output[t : t + produced]
            t += produced


class TraceProposer:
    """Proposes what a trace holds from a position on.

    Parameters
    ----------
    trace : Trace
        What was drafted at each position.
    step : Speculation
        Takes the drafts in.

    Attributes
    ----------
    ids : list of int
        All that there is to propose in this step.
    signals : ndarray, shape (len(ids), N_SIGNALS)
        Their signals, read-only.
    there : int
        How many tokens the drafter that the step began with has to propose.
    accepted : int
        How many of them the target agrees with.
    switch_at : int
        After how many tokens the step went on with lookups; ``size`` if it did not.
    size : int
        Most tokens that the trace has at a position.
    """

    def __init__(self, trace: Trace, step: Speculation) -> None:
        rows, switch = trace.rows, trace.switch
        self._rows, self._tails, self._step = rows, switch, step
        self._lookups = rows.lookups if switch is None else switch.lookups
        self.size = trace.gamma

    def move(self, t: int) -> None:
        """Begin a step at position t."""
        rows = self._rows
        there = self.there = rows.available[t]
        self.t, self.switch_at, self.accepted = t, self.size, rows.accepted[t]
        self.ids = rows.drafts[t] if there == self.size else rows.drafts[t][:there]
        self.signals = self._step.signals = rows.signals[t]
        self._known: Sequence[float] = self._lookups[t] if self._lookups else ()

    def lookup_confidence(self) -> float:
        """Return the confidence that the trace has of its next token."""
        j = len(self._step.tokens)
        return self._known[j] if j < len(self._known) else 0.0

    def lookup_alternative(self) -> float:
        """Return the confidence of the lookup that there could be instead of a forward."""
        if self._tails is None:
            return 0.0
        j = len(self._step.tokens)
        return self._tails.lookup_alternative(self.t, j) if j < self.switch_at else 0.0

    def use(self, name: str) -> str:
        """Go on with lookups if asked to; a trace has nothing else to go on with."""
        if name == LOOKUP and self._tails is not None and self.switch_at == self.size:
            self.switch_at = len(self._step.tokens)
            self.ids, self.signals, self._known, self.accepted = self._tails.switched(self.t, self.switch_at)
            self._step.signals = self.signals
            if not self.switch_at:  # the step begins with the lookup
                self.there = len(self.ids)
        return name

    def draft(self, gamma: int) -> int:
        """Draft up to ``gamma`` tokens, as many as the policy wants; return how many."""
        step, j = self._step, 0
        if gamma and not step.asks:
            there = len(self.ids)
            j = gamma if gamma < there else there
            following = self._known[1 : j + 1]
            j = step.extend(self.ids[:j], [*following, *[0.0] * (j - len(following))])
        elif gamma:
            while j < len(self.ids):
                token = self.ids[j]
                j += 1
                if not step.add(token):
                    break
        return j


def replay_fixed(trace: Trace, gamma: int, cost: LevelCost, max_gamma: int = MAX_GAMMA) -> Replay:
    """Replay one trace at a fixed gamma, without a policy object."""
    plan = np.full(len(trace), min(gamma, max_gamma))
    return replay_plan(trace, plan, plan, cost)


def replay_plan(
    trace: Trace, proposed: np.ndarray, submitted: np.ndarray, cost: LevelCost, switches: np.ndarray | None = None
) -> Replay:
    """Replay one trace under a rule that does not learn, and so is a table over positions.

    Parameters
    ----------
    trace : Trace
        Of L tokens.
    proposed, submitted : ndarray of int, shape (L,)
        Tokens that a step beginning at each position drafts, and how many of them it submits. Both are cut where the
        budget ends, where the drafter has nothing more to propose, and after an end of sequence.
    cost : LevelCost
        Where the seconds come from.
    switches : ndarray of int, shape (L,), optional
        After how many tokens a step goes on with the lookup alone; from ``proposed`` up, never.
    """
    length = len(trace)
    limit = trace.budget - 1 - np.arange(length)
    gamma = np.minimum(proposed, limit)
    available, accepted = trace.ended, trace.accepted
    if switches is not None and trace.switch is not None:
        available, accepted = available.copy(), accepted.copy()
        for t in np.flatnonzero(switches < proposed).tolist():
            tail = trace.switch.switched(t, int(switches[t]))
            available[t], accepted[t] = until_end(tail.drafts, trace.ends), tail.accepted
    limit = np.minimum(limit, available)
    k = np.minimum(submitted, limit)
    n = np.minimum(accepted, k)
    produced = np.minimum(n + 1, length - np.arange(length))  # fewer if the draft held the end-of-sequence token
    following, starts, t = (np.arange(length) + produced).tolist(), [], 0
    while t < length:
        starts.append(t)
        t = following[t]
    at = np.array(starts)
    j, k, n, produced = np.minimum(proposed, limit)[at], k[at], n[at].astype(np.int64), produced[at]
    n, labelled = judged_at_once(k, n, produced)
    asked = j if switches is None else np.minimum(j, switches[at])
    paid, read = trace.forwards[at, asked], trace.read[at, asked]
    verify = np.array(cost.verify_seconds)[k]
    seconds = cost.draft_seconds * paid + cost.first_draft_seconds * (paid > 0) + cost.overhead_seconds
    seconds += np.maximum(
        verify + cost.context_seconds * (len(trace.prompt) + at - cost.context_length), LEAST * verify
    )
    if cost.catch_up_seconds and trace.reads:
        seconds += cost.catch_up_seconds * np.array(_behind(len(trace.prompt), paid, read, n, produced))
    return Replay(at, gamma[at], k, n, labelled, produced, j, seconds)


def _behind(
    prompt: int, forwards: np.ndarray, read: np.ndarray, accepted: np.ndarray, produced: np.ndarray
) -> list[int]:
    """Tokens beyond one a forward that the draft has to read in each step; 0 where no forward is made."""
    found, lag = [], prompt
    for paid, reached, n, tokens in zip(*(x.tolist() for x in (forwards, read, accepted, produced)), strict=True):
        found.append(lag + reached - paid if paid else 0)
        lag = n + 1 - min(reached, n) if paid else lag + tokens
    return found
