"""What could have been reached, known only in hindsight: the best fixed gamma, and two bounds that see the future.

None of these is a policy: each has looked at the outcomes that it is scored on. Label them as hindsight wherever they
are shown. Goodput is tokens per modelled second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from policies.base import MAX_GAMMA
from speckv_online.cost import CostTable, LevelCost
from speckv_online.simulate import Replay, replay_fixed, replay_plan
from speckv_online.traces import Trace


@dataclass(frozen=True)
class FixedBest:
    """Best fixed gamma of one level in hindsight, its goodput, and the goodput of every gamma tried."""

    gamma: int
    goodput: float
    all: dict[int, float]


def by_level(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Group traces by compression level, in their order."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.level, []).append(trace)
    return groups


def best_fixed(
    traces: Iterable[Trace], cost: CostTable, gammas: Sequence[int] = range(MAX_GAMMA + 1)
) -> dict[str, FixedBest]:
    """Return, per level, the fixed gamma with the highest goodput over all its traces (0: no drafting)."""
    found = {}
    for level, group in by_level(traces).items():
        table = cost.level(level)
        rates = {g: Replay.join([replay_fixed(t, g, table) for t in group]).goodput for g in gammas}
        gamma = max(rates, key=lambda g: rates[g])
        found[level] = FixedBest(gamma, rates[gamma], rates)
    return found


def clairvoyant(traces: Iterable[Trace], cost: CostTable) -> dict[str, Replay]:
    """Replay, per level, an oracle that knows the accepted length of every draft beforehand.

    It drafts the k accepted tokens that maximise ``tokens - rate * seconds`` of the step, where ``rate`` is its own
    goodput over the level's traces: the fixed point of Dinkelbach's iteration for a ratio.
    """
    found = {}
    for level, group in by_level(traces).items():
        rate = 0.0
        while True:
            replay = Replay.join([_oracle(trace, cost.level(level), rate) for trace in group])
            if replay.goodput <= rate:
                break
            found[level], rate = replay, replay.goodput
    return found


def fastest(traces: Iterable[Trace], cost: CostTable) -> dict[str, Replay]:
    """Replay, per level, the sequence of k that takes the least modelled time of all, by dynamic programming.

    A true bound: unlike :func:`clairvoyant` it also weighs where a step leaves off, and what the draft has to read.
    """
    return {
        level: Replay.join([_shortest(trace, cost.level(level)) for trace in group])
        for level, group in by_level(traces).items()
    }


def _steps(trace: Trace, t: int, cost: LevelCost, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds of drafting k = 0, 1, ... ``most`` tokens at position t, as far as the budget goes."""
    k = np.arange(min(most, MAX_GAMMA, trace.budget - t - 1) + 1)
    tokens = np.minimum(np.minimum(k, int(trace.accepted[t])) + 1, len(trace) - t)
    context = len(trace.prompt) + t
    paid = trace.forwards[t, k].tolist()
    return tokens, np.array([cost.seconds(j, context, forwards) for j, forwards in enumerate(paid)])


def _oracle(trace: Trace, cost: LevelCost, rate: float) -> Replay:
    choice, t = {}, 0
    while t < len(trace):
        tokens, seconds = _steps(trace, t, cost, int(trace.accepted[t]))
        choice[t] = int(np.argmax(tokens - rate * seconds))
        t += int(tokens[choice[t]])
    return _replay(trace, choice, cost)


def _shortest(trace: Trace, cost: LevelCost) -> Replay:
    """Plan backwards, with two least times from each position on: without the draft model, and with it.

    A token that the draft has not read costs nothing before it is clear that the draft will be asked once more: then it
    is charged to the step that left it unread.
    """
    length, c = len(trace), cost.catch_up_seconds if trace.reads else 0.0
    without, best_without = np.zeros(length + 1), np.zeros(length, dtype=int)
    using, best_using, last = np.full(length + 1, np.inf), np.zeros(length, dtype=int), np.zeros(length, dtype=bool)
    for t in range(length - 1, -1, -1):
        # Rejected tokens, too: a wider verification may be the cheaper one.
        tokens, seconds = _steps(trace, t, cost, int(trace.available[t]))
        k, after = np.arange(len(tokens)), t + tokens
        n = np.minimum(k, int(trace.accepted[t]))
        paid, read = trace.forwards[t, k], trace.read[t, k]
        asked = paid > 0
        total = np.where(asked, np.inf, seconds + without[after])
        best_without[t] = int(np.argmin(total))
        without[t] = total[best_without[t]]
        unread = np.where(asked, n + 1 - np.minimum(read, n), tokens)
        later = using[after] + c * unread
        ends = asked & (without[after] <= later)
        total = seconds + np.where(asked, c * (read - paid), 0.0) + np.where(ends, without[after], later)
        best_using[t] = int(np.argmin(total))
        using[t], last[t] = total[best_using[t]], ends[best_using[t]]
    choice, t = {}, 0
    more = using[0] + c * len(trace.prompt) < without[0]
    while t < length:
        choice[t] = int((best_using if more else best_without)[t])
        more = more and not last[t]
        t = min(t + min(choice[t], int(trace.accepted[t])) + 1, length)
    return _replay(trace, choice, cost)


def _replay(trace: Trace, choice: dict[int, int], cost: LevelCost) -> Replay:
    """Steps that draft ``choice[t]`` tokens at position t."""
    plan = np.zeros(len(trace), dtype=int)
    plan[list(choice)] = list(choice.values())
    return replay_plan(trace, plan, plan, cost)
