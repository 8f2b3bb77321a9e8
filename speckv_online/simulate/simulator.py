"""Replaying exact traces: the steps that real decoding would take under any policy, with seconds from a cost model.

The simulator makes the decoder's calls in the decoder's order (begin, decide, proceed after each drafted token but the
last and those of a tail of lookups, submit, learn), so the steps agree with real greedy decoding one by one, lookups in
place of forwards included, but for policies that go by what a trace does not hold: measured seconds, other drafters,
and going back to the model within a step. Its seconds are modelled, not measured.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, Outcome, Policy
from policies.fixed import Fixed
from policies.guards.fault import FaultGuard
from speckv_online.context import History
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import LEAST, CostTable, LevelCost
from speckv_online.traces.trace import Trace


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
    tested: np.ndarray
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
        policy, budget = self.policy, trace.budget
        decide, proceed, submit, learn = policy.decide, policy.proceed, policy.submit, policy.learn
        end, level, t_d, t_v = len(trace), trace.level, cost.draft_seconds, cost.verify_seconds
        t_0, slope, usual = cost.overhead_seconds, cost.context_seconds, cost.context_length
        catch_up, first = cost.catch_up_seconds, cost.first_draft_seconds
        output, proposals, accepted, available, table, lookups, forwards, read = trace.rows
        tails = trace.tails
        lookups = lookups if tails is None else tails.lookups
        reads, longest, size = trace.reads, self.max_gamma, trace.gamma
        history = History(level, trace.task, len(trace.prompt))
        context = history.context
        context.tokens = tokens = trace.prompt.tolist()
        if tails is not None:
            context.drafters = (trace.meta["drafter"], LOOKUP)
        policy.begin(context)
        t, lag = 0, len(trace.prompt) if reads else 1
        while t < end:
            # Conditions instead of min() here: a call costs more than all that it compares.
            left = budget - t - 1
            context.remaining = left + 1
            limit = context.max_gamma = longest if longest < left else left
            if lookups:
                context.lookups = lookups[t][:1]
            if tails is not None:
                context.offer = tails.offer(t, 0)
            decision = decide(context)
            gamma = decision.gamma if decision.gamma < limit else limit
            drafts, ids, there, right = table[t], proposals[t], available[t], accepted[t]
            known, turn = lookups[t] if lookups else (), size
            if tails is not None and decision.drafter == LOOKUP:
                (ids, drafts, known, right), turn = tails.turned(t, 0), 0
                there, context.lookups, context.offer = len(ids), known[:1], 0.0
            proposed = k = most = gamma if gamma < there else there
            if decision.stops and most:
                # Only what is drafted so far is shown, as in the decoder.
                proposed = 0
                context.drafts = shown = []
                while proposed < most:
                    shown.append(ids[proposed])
                    proposed += 1
                    if known:
                        context.lookups = known[: proposed + 1]
                    if proposed < gamma:
                        if tails is not None:
                            context.offer = tails.offer(t, proposed) if proposed < turn else 0.0
                        answer = proceed(decision, proposed, drafts[:proposed])
                        if not answer:
                            break
                        if answer == LOOKUP and tails is not None and turn == size:
                            (ids, drafts, known, right), turn = tails.turned(t, proposed), proposed
                            proposed = gamma if gamma < len(ids) else len(ids)
                            context.drafts = ids[:proposed]
                            context.lookups = known[: proposed + 1]
                            break
                context.offer = 0.0
                k = submit(decision, proposed, drafts[:proposed])
            elif decision.trims and most:
                context.drafts, context.lookups, context.offer = ids[:most], known[: most + 1], 0.0
                k = submit(decision, most, drafts[:most])
            context.drafts = ids[:k]
            n = right if right < k else k
            whole = t + n == end  # the draft held the end-of-sequence token
            produced = n if whole else n + 1
            asked = proposed if proposed < turn else turn
            paid, reached = forwards[t][asked], read[t][asked]
            draft_seconds = first + t_d * paid + catch_up * (lag + reached - paid) if paid else 0.0
            verify_seconds = t_v[k] + slope * (context.context_length - usual)
            if verify_seconds < LEAST * t_v[k]:
                verify_seconds = LEAST * t_v[k]
            seconds = draft_seconds + verify_seconds + t_0
            tested = n if whole or n == k else n + 1
            outcome = Outcome(
                k, n, tested, produced, seconds, draft_seconds, verify_seconds, level, context.context_length,
                lag - 1 if paid else 0, drafts[:k], decision.drafter, paid, 0.0, k == there < size,
            )  # fmt: skip
            learn(decision, outcome)
            yield t, decision.gamma, k, n, tested, produced, proposed, seconds
            # The draft's cache keeps what it has read of the accepted tokens; the target's token comes on top.
            if reads:
                lag = n + 1 - (reached if reached < n else n) if paid else lag + produced
            history.update(outcome)
            tokens += output[t : t + produced]
            t += produced


def replay_fixed(trace: Trace, gamma: int, cost: LevelCost, max_gamma: int = MAX_GAMMA) -> Replay:
    """Replay one trace at a fixed gamma, without a policy object."""
    plan = np.full(len(trace), min(gamma, max_gamma))
    return replay_plan(trace, plan, plan, cost)


def replay_plan(
    trace: Trace, proposed: np.ndarray, submitted: np.ndarray, cost: LevelCost, turns: np.ndarray | None = None
) -> Replay:
    """Replay one trace under a rule that does not learn, and so is a table over positions.

    Parameters
    ----------
    trace : Trace
        Of L tokens.
    proposed, submitted : ndarray of int, shape (L,)
        Tokens that a step beginning at each position drafts, and how many of them it submits. Both are cut where the
        budget ends, and where the drafter has nothing more to propose.
    cost : LevelCost
        Where the seconds come from.
    turns : ndarray of int, shape (L,), optional
        After how many tokens a step goes on with the lookup alone; from ``proposed`` up, never.
    """
    length = len(trace)
    limit = trace.budget - 1 - np.arange(length)
    gamma = np.minimum(proposed, limit)
    available, accepted = trace.available, trace.accepted
    if turns is not None and trace.tails is not None:
        available, accepted = available.copy(), accepted.copy()
        for t in np.flatnonzero(turns < proposed).tolist():
            tail = trace.tails.turned(t, int(turns[t]))
            available[t], accepted[t] = len(tail.drafts), tail.accepted
    limit = np.minimum(limit, available)
    k = np.minimum(submitted, limit)
    n = np.minimum(accepted, k)
    produced = np.minimum(n + 1, length - np.arange(length))  # an accepted end of sequence is the last token
    following, starts, t = (np.arange(length) + produced).tolist(), [], 0
    while t < length:
        starts.append(t)
        t = following[t]
    at = np.array(starts)
    j, k, n, produced = np.minimum(proposed, limit)[at], k[at], n[at].astype(np.int64), produced[at]
    tested = np.where(at + n == length, n, np.minimum(n + 1, k))
    asked = j if turns is None else np.minimum(j, turns[at])
    paid, read = trace.forwards[at, asked], trace.read[at, asked]
    verify = np.array(cost.verify_seconds)[k]
    seconds = cost.draft_seconds * paid + cost.first_draft_seconds * (paid > 0) + cost.overhead_seconds
    seconds += np.maximum(
        verify + cost.context_seconds * (len(trace.prompt) + at - cost.context_length), LEAST * verify
    )
    if cost.catch_up_seconds and trace.reads:
        seconds += cost.catch_up_seconds * np.array(_behind(len(trace.prompt), paid, read, n, produced))
    return Replay(at, gamma[at], k, n, tested, produced, j, seconds)


def _behind(
    prompt: int, forwards: np.ndarray, read: np.ndarray, accepted: np.ndarray, produced: np.ndarray
) -> list[int]:
    """Tokens beyond one a forward that the draft has to read in each step; 0 where no forward is made."""
    found, lag = [], prompt
    for paid, reached, n, tokens in zip(*(x.tolist() for x in (forwards, read, accepted, produced)), strict=True):
        found.append(lag + reached - paid if paid else 0)
        lag = n + 1 - min(reached, n) if paid else lag + tokens
    return found
