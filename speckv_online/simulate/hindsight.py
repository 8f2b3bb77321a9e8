"""What could have been reached, known only in hindsight: the best fixed gamma, and two bounds that see the future.

None of these is a policy: each has looked at the outcomes that it is scored on. Label them as hindsight wherever they
are shown. Goodput is tokens per modelled second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from policies.base import MAX_GAMMA
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.simulator import Replay, replay_fixed, replay_plan
from speckv_online.traces.trace import Trace


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


def dynamic_programming_bound(traces: Iterable[Trace], cost: CostTable) -> dict[str, Replay]:
    """Replay, per level, the sequence of k that takes the least modelled time of all, by dynamic programming.

    A true bound: unlike :func:`clairvoyant` it also weighs where a step leaves off, and what the draft has to read.
    """
    return {
        level: Replay.join([_shortest(trace, cost.level(level)) for trace in group])
        for level, group in by_level(traces).items()
    }


@dataclass(frozen=True)
class _Steps:
    """What a step at one position may do: arrays with an entry for each way.

    ``k`` tokens are drafted, ``n`` of them right; those from ``switch_at`` on are lookups in place of the drafter's
    choice."""

    k: np.ndarray
    switch_at: np.ndarray
    n: np.ndarray
    tokens: np.ndarray
    paid: np.ndarray
    seconds: np.ndarray


def _steps(trace: Trace, t: int, cost: LevelCost, most: int) -> _Steps:
    """Return all drafts of up to ``most`` tokens at position t, and all right ones that end in lookups."""
    limit, right = min(MAX_GAMMA, trace.budget - t - 1), int(trace.accepted[t])
    ways = [(k, k, min(k, right)) for k in range(min(most, limit) + 1)]
    if trace.switch is not None:
        for switch_at in range(min(right, limit, trace.gamma - 1) + 1):
            if trace.switch.lookup_alternative(t, switch_at):
                tail = min(trace.switch.switched(t, switch_at).accepted, limit)
                ways += [(k, switch_at, k) for k in range(switch_at + 1, tail + 1)]
    k, switches, n = np.array(ways).T
    paid, context = trace.forwards[t, switches], len(trace.prompt) + t
    seconds = [cost.seconds(j, context, forwards) for j, forwards in zip(k.tolist(), paid.tolist(), strict=True)]
    return _Steps(k, switches, n, np.minimum(n + 1, len(trace) - t), paid, np.array(seconds))


def _oracle(trace: Trace, cost: LevelCost, rate: float) -> Replay:
    choice, t = {}, 0
    while t < len(trace):
        steps = _steps(trace, t, cost, int(trace.accepted[t]))
        best = int(np.argmax(steps.tokens - rate * steps.seconds))
        choice[t] = int(steps.k[best]), int(steps.switch_at[best])
        t += int(steps.tokens[best])
    return _replay(trace, choice, cost)


def _shortest(trace: Trace, cost: LevelCost) -> Replay:
    """Plan backwards, with two least times from each position on: without the draft model, and with it.

    A token that the draft has not read costs nothing before it is clear that the draft will be asked once more: then it
    is charged to the step that left it unread.
    """
    length, c = len(trace), cost.catch_up_seconds if trace.reads else 0.0
    without, best_without = np.zeros(length + 1), [(0, 0, 0)] * length  # k, turn and tokens of the best way
    using, best_using, last = np.full(length + 1, np.inf), [(0, 0, 0)] * length, np.zeros(length, dtype=bool)
    for t in range(length - 1, -1, -1):
        # Rejected tokens, too: a wider verification may be the cheaper one.
        steps = _steps(trace, t, cost, int(trace.ended[t]))
        after, read, asked = t + steps.tokens, trace.read[t, steps.switch_at], steps.paid > 0
        ways = list(zip(steps.k.tolist(), steps.switch_at.tolist(), steps.tokens.tolist(), strict=True))
        total = np.where(asked, np.inf, steps.seconds + without[after])
        best = int(np.argmin(total))
        without[t], best_without[t] = total[best], ways[best]
        unread = np.where(asked, steps.n + 1 - np.minimum(read, steps.n), steps.tokens)
        later = using[after] + c * unread
        ends = asked & (without[after] <= later)
        total = steps.seconds + np.where(asked, c * (read - steps.paid), 0.0) + np.where(ends, without[after], later)
        best = int(np.argmin(total))
        using[t], best_using[t], last[t] = total[best], ways[best], ends[best]
    choice, t = {}, 0
    more = using[0] + c * len(trace.prompt) < without[0]
    while t < length:
        k, switch_at, tokens = (best_using if more else best_without)[t]
        choice[t] = k, switch_at
        more = more and not last[t]
        t += tokens
    return _replay(trace, choice, cost)


def _replay(trace: Trace, choice: dict[int, tuple[int, int]], cost: LevelCost) -> Replay:
    """Steps that draft so many tokens at position t, lookups from the second number on."""
    plan, switches = np.zeros((2, len(trace)), dtype=int)
    plan[list(choice)], switches[list(choice)] = zip(*choice.values(), strict=True)
    return replay_plan(trace, plan, plan, cost, switches)
