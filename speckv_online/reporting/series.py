"""What step records say beyond totals: regret and gamma over time, calibration, and modelled against measured time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speckv_online.io.run_directory import UnitResult
from speckv_online.reporting.verdict import never_learns

#: Drafted tokens per step, grouped as the charts show them: label and largest number.
GROUPS = (("0", 0), ("1", 1), ("2", 2), ("3–4", 4), ("5–8", 8), ("9+", 1 << 30))
WINDOWS = 24
#: Fewest steps that a window of the gamma shares, or a point of a reliability curve, may hold.
FEWEST = 8
#: Policies that choose nothing: they draft less than they want only where the budget ends.
PLAIN = ("autoregressive", "fixed")


@dataclass(frozen=True)
class Regret:
    """Seconds lost by a policy against the fastest policy of its level, which is known only in hindsight (measured).

    ``seconds[i]`` is the sum over the first i + 1 prompts, in the order in which they were decoded, of the policy's
    seconds less what the fastest one took per token of the same prompt; the mean over seeded orders.
    """

    level: str
    policy: str
    against: str
    seconds: list[float]


@dataclass(frozen=True)
class Shares:
    """How many tokens a policy drafted, over time.

    Attributes
    ----------
    steps : list of float
        Middle of each window, in steps since the policy started afresh.
    shares : dict
        Label of :data:`GROUPS` -> share of the window's steps, the mean over seeded orders.
    acceptance : list of float
        Accepted / drafted tokens of each window, all orders together; NaN where nothing was drafted.
    """

    level: str
    policy: str
    steps: list[float]
    shares: dict[str, list[float]]
    acceptance: list[float]


@dataclass(frozen=True)
class Gain:
    """What learning has gained so far over a policy that never learns (measured).

    ``ratios[i]`` is how many times as fast the policy was as ``against`` over the first i + 1 prompts, all seeded
    orders together.
    """

    level: str
    policy: str
    against: str
    ratios: list[float]


@dataclass(frozen=True)
class Reliability:
    """Steps grouped by the draft's mean confidence: what it promised, and accepted / tested tokens."""

    level: str
    confidence: list[float]
    accepted: list[float]
    steps: list[int]


@dataclass(frozen=True)
class Modelled:
    """Tokens per second by the clock, and by the cost model of the calibration before the run (T(k) per step)."""

    level: str
    policy: str
    measured: float
    modelled: float


def regrets(groups: Mapping[tuple[str, str], Sequence[UnitResult]]) -> list[Regret]:
    """Return every policy's regret over prompts; levels where only one policy ran have none."""
    found = []
    for level in dict.fromkeys(level for level, _ in groups):
        rates = {
            policy: sum(r.tokens for r in results) / sum(r.seconds for r in results)
            for (own, policy), results in groups.items()
            if own == level
        }
        best = max(rates, key=lambda policy: rates[policy])
        pace = {(r.unit.prompt, r.unit.seed): r.seconds / r.tokens for r in groups[level, best]}
        for policy in rates if len(rates) > 1 else ():
            by_seed: dict[int, list[float]] = {}
            for r in groups[level, policy]:
                if (key := (r.unit.prompt, r.unit.seed)) in pace:
                    by_seed.setdefault(r.unit.seed, []).append(r.seconds - r.tokens * pace[key])
            if by_seed:
                curves = [np.cumsum(values) for values in by_seed.values()]
                shared = min(map(len, curves))  # orders that a stopped run has not finished are cut to the shortest
                mean = np.mean([curve[:shared] for curve in curves], axis=0)
                found.append(Regret(level, policy, best, mean.tolist()))
    return found


def shares(groups: Mapping[tuple[str, str], Sequence[UnitResult]]) -> list[Shares]:
    """Return the gamma shares over time of every policy that chooses."""
    edges = [most for _, most in GROUPS]
    found = []
    for (level, policy), results in groups.items():
        if policy.split(":")[0] in PLAIN:
            continue
        by_seed: dict[int, list[tuple[int, int]]] = {}
        for r in results:
            by_seed.setdefault(r.unit.seed, []).extend((s.drafted, s.accepted) for s in r.steps)
        length = min(len(steps) for steps in by_seed.values())
        windows = max(1, min(WINDOWS, length // FEWEST))
        bounds = np.linspace(0, length, windows + 1).astype(int)
        table, tokens = np.zeros((windows, len(GROUPS))), np.zeros((windows, 2))
        for steps in by_seed.values():
            drafted = np.array(steps[:length])
            group = np.searchsorted(edges, drafted[:, 0])
            for w in range(windows):
                tokens[w] += drafted[bounds[w] : bounds[w + 1]].sum(axis=0)
                counts = np.bincount(group[bounds[w] : bounds[w + 1]], minlength=len(GROUPS))
                table[w] += counts / counts.sum() / len(by_seed)
        middles = ((bounds[:-1] + bounds[1:]) / 2).tolist()
        rates = [accepted / drafted if drafted else math.nan for drafted, accepted in tokens.tolist()]
        by_group = {g[0]: table[:, i].tolist() for i, g in enumerate(GROUPS)}
        found.append(Shares(level, policy, middles, by_group, rates))
    return found


def gains(groups: Mapping[tuple[str, str], Sequence[UnitResult]]) -> list[Gain]:
    """Return what every policy that learns has gained over prompts, where one ran that never learns."""
    found = []
    for (level, policy), results in groups.items():
        against = never_learns(policy, [other for own, other in groups if own == level])
        if not against:
            continue
        theirs = {(r.unit.prompt, r.unit.seed): r for r in groups[level, against]}
        orders: dict[int, list[tuple[float, float]]] = {}
        for r in results:
            if other := theirs.get((r.unit.prompt, r.unit.seed)):  # in seconds per token of ours
                orders.setdefault(r.unit.seed, []).append((r.seconds, other.seconds * r.tokens / other.tokens))
        if orders:
            shared = min(map(len, orders.values()))
            sums = np.cumsum(sum(np.array(rows[:shared]) for rows in orders.values()), axis=0)
            found.append(Gain(level, policy, against, (sums[:, 1] / sums[:, 0]).tolist()))
    return found


def reliability(groups: Mapping[tuple[str, str], Sequence[UnitResult]], bins: int = 10) -> list[Reliability]:
    """Return, per level, how often drafts are accepted where the draft is how sure (all policies together)."""
    found = []
    for level in dict.fromkeys(level for level, _ in groups):
        rows = np.array(
            [
                (s.mean_draft_confidence, s.accepted, s.labelled)
                for (own, _), results in groups.items() if own == level
                for r in results for s in r.steps if s.labelled
            ]
        ).reshape(-1, 3)  # fmt: skip
        where = np.minimum((rows[:, 0] * bins).astype(int), bins - 1)
        kept = [i for i in range(bins) if np.count_nonzero(where == i) >= FEWEST]
        if kept:
            parts = [rows[where == i] for i in kept]
            found.append(
                Reliability(
                    level,
                    [float(p[:, 0].mean()) for p in parts],
                    [float(p[:, 1].sum() / p[:, 2].sum()) for p in parts],
                    [len(p) for p in parts],
                )
            )
    return found


def modelled(groups: Mapping[tuple[str, str], Sequence[UnitResult]], manifest: Mapping[str, Any]) -> list[Modelled]:
    """Return measured and modelled goodput of every policy at the levels whose worker wrote down its calibration."""
    from speckv_online.simulate.cost_table import (
        LevelCost,  # imports the policies' package, which nothing else of a report does
    )

    costs: dict[str, LevelCost] = {}
    for key, worker in manifest.get("workers", {}).items():
        try:
            costs.setdefault(worker.get("level", key), LevelCost(**worker["calibration"]))
        except (KeyError, TypeError, AttributeError, ValueError):
            continue  # a worker that had not calibrated yet when the run stopped
    found = []
    for (level, policy), results in groups.items():
        if (cost := costs.get(level)) is not None:
            steps = [s for r in results for s in r.steps]
            tokens = sum(s.produced for s in steps)
            seconds = sum(cost.seconds(s.drafted, s.context_length, s.forwards) for s in steps)
            found.append(Modelled(level, policy, tokens / sum(s.seconds for s in steps), tokens / seconds))
    return found
