"""Policies against each other, and against what hindsight knows, on exact traces of one compression level.

Every policy that learns meets the prompts in several seeded orders and goes on learning from prompt to prompt; as
before real decoding, it is told the costs of a calibration first. A prompt's seconds are the mean over the orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from policies.base import MAX_GAMMA, Policy
from policies.guards.fault import FaultGuard
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.hindsight import best_fixed, clairvoyant, dynamic_programming_bound
from speckv_online.simulate.simulator import Replay, Simulator, replay_fixed, replay_plan
from speckv_online.simulate.threshold_oracles import tuned
from speckv_online.stats import Estimate, goodput, paired_ratio
from speckv_online.traces.trace import Trace

POLICY, HINDSIGHT, BOUND = "policy", "hindsight", "bound"


@dataclass(frozen=True)
class Score:
    """How one policy did on P prompts of one level; seconds are modelled.

    Attributes
    ----------
    name : str
        Spec of the policy, or what hindsight chose.
    kind : {'policy', 'hindsight', 'bound'}
    tokens, seconds : ndarray, shape (P,)
        Per prompt; seconds are means over the orders.
    steps, drafted, accepted, proposed : float
        Totals over all prompts, means over the orders.
    orders : ndarray, shape (orders,)
        Goodput of each order.
    learns : bool
        True for policies that change with what they observe.
    faults : int
        Times that the policy raised or answered nonsense, over all orders.
    note : str
        What hindsight picked.
    """

    name: str
    kind: str
    tokens: np.ndarray
    seconds: np.ndarray
    steps: float
    drafted: float
    accepted: float
    proposed: float
    orders: np.ndarray = field(default_factory=lambda: np.empty(0))
    learns: bool = False
    faults: int = 0
    note: str = ""

    @property
    def goodput(self) -> float:
        """Tokens per modelled second."""
        return goodput(self.tokens, self.seconds)

    def over(self, other: Score) -> Estimate:
        """Ratio of goodputs, paired by prompt, with its interval over prompts."""
        return paired_ratio(self.tokens, self.seconds, other.tokens, other.seconds)


def score(name: str, kind: str, orders: Sequence[Sequence[Replay]], **more: Any) -> Score:
    """Sum replays up: ``orders[r][p]`` is prompt p's replay in order r."""
    tokens = np.array([replay.tokens for replay in orders[0]], dtype=float)
    seconds = np.array([[float(replay.seconds.sum()) for replay in replays] for replays in orders])
    sums: dict[str, Any] = {
        column: sum(float(getattr(replay, column).sum()) for replays in orders for replay in replays) / len(orders)
        for column in ("drafted", "accepted", "proposed")
    }
    steps = sum(len(replay) for replays in orders for replay in replays) / len(orders)
    more |= {"orders": tokens.sum() / seconds.sum(axis=1), "steps": steps}
    return Score(name, kind, tokens, seconds.mean(axis=0), **sums, **more)


def prepared(spec: str, cost: CostTable, levels: Iterable[str], seed: int, **defaults: Any) -> Policy:
    """Make a guarded policy and tell it the costs of the levels, as a worker does that has calibrated."""
    policy = FaultGuard(make_policy(spec, seed=seed, **defaults), stall_seconds=math.inf)
    tell_costs(policy, cost, levels)
    return policy


def tell_costs(policy: Policy, cost: CostTable, levels: Iterable[str]) -> None:
    """Hand a cost table to a policy that weighs seconds; one that raises goes without."""
    guard = policy if isinstance(policy, FaultGuard) else FaultGuard(policy)
    for level in levels:
        guard.set_costs(level, cost.level(level))


def play(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    seeds: Iterable[int] = (0,),
    *,
    make: Callable[..., Policy] = prepared,
    **defaults: Any,
) -> Score:
    """Replay a policy over traces, afresh in each seeded order of them.

    Parameters
    ----------
    spec : str
        See :mod:`policies.registry`.
    traces : sequence of Trace
        One per prompt.
    cost : CostTable
        Where the seconds come from.
    seeds : iterable of int
        One order each; the seed is the policy's too.
    make : callable
        Makes the policy from (spec, cost, levels, seed).
    **defaults
        Options of the policy that the spec does not set.
    """
    levels = sorted({t.level for t in traces})
    orders, faults, learns = [], 0, False
    for seed in seeds:
        simulator = Simulator(make(spec, cost, levels, seed, **defaults), cost)
        replays: list[Replay | None] = [None] * len(traces)
        for p in np.random.default_rng(seed).permutation(len(traces)).tolist():
            replays[p] = simulator.replay(traces[p])
        orders.append([replay for replay in replays if replay is not None])
        faults += simulator.policy.faults.total()
        learns = simulator.policy.learns
    return score(spec, POLICY, orders, learns=learns, faults=faults)


class ReplayEvaluation:
    """Traces of one level with what hindsight knows of them.

    Parameters
    ----------
    traces : sequence of Trace
        One per prompt, all of one level.
    cost : CostTable
        Where the seconds come from.

    Raises
    ------
    UserError
        If there are several levels or drafts, a prompt twice, or no costs of the level.
    """

    def __init__(self, traces: Sequence[Trace], cost: CostTable) -> None:
        self.traces, self.cost = list(traces), cost
        levels = {t.level for t in self.traces}
        if len(levels) != 1:
            raise UserError(f"a contest needs traces of one level, got {sorted(levels) or 'none'}")
        self.level = levels.pop()
        cost.level(self.level)
        drafts = {str(t.meta.get("draft_fingerprint", "")) for t in self.traces}
        if len(drafts) > 1 or len({t.prompt_id for t in self.traces}) < len(self.traces):
            what = f"of {len(drafts)} drafts" if len(drafts) > 1 else "of a prompt more than once"
            raise UserError(f"there are traces {what} at {self.level}: name the folder of one pair's only")

    def fixed(self, gamma: int) -> Score:
        """A fixed gamma."""
        table = self.cost.level(self.level)
        name = f"fixed:{gamma}" if gamma else "autoregressive"
        return score(name, POLICY, [[replay_fixed(t, gamma, table) for t in self.traces]])

    @cached_property
    def plain(self) -> Score:
        """Decoding without a draft."""
        return self.fixed(0)

    @cached_property
    def best(self) -> Score:
        """The best fixed gamma in hindsight."""
        gamma = best_fixed(self.traces, self.cost)[self.level].gamma
        return replace(self.fixed(gamma), name="best fixed gamma", kind=HINDSIGHT, note=f"γ {gamma}")

    @cached_property
    def best_lookup(self) -> Score | None:
        """The best fixed gamma of lookups alone in hindsight; None where the traces' drafter offers none."""
        if any(t.switch is None for t in self.traces):
            return None
        table, found = self.cost.level(self.level), []
        for gamma in range(1, MAX_GAMMA + 1):
            plans = [np.full((2, len(t)), [[gamma], [0]]) for t in self.traces]
            replays = [replay_plan(t, g, g, table, none) for t, (g, none) in zip(self.traces, plans, strict=True)]
            found.append(score("best fixed gamma of lookups", HINDSIGHT, [replays], note=f"γ {gamma}"))
        return max(found, key=lambda s: s.goodput)

    @cached_property
    def task_oracle(self) -> Score:
        """The best fixed gamma of each task in hindsight."""
        table, gammas = self.cost.level(self.level), {}
        for task in sorted({t.task for t in self.traces}):
            gammas[task] = best_fixed([t for t in self.traces if t.task == task], self.cost)[self.level].gamma
        replays = [replay_fixed(t, gammas[t.task], table) for t in self.traces]
        note = ", ".join(f"{task} {gamma}" for task, gamma in gammas.items())
        return score("best fixed gamma per task", HINDSIGHT, [replays], note=note)

    @cached_property
    def thresholds(self) -> list[Score]:
        """The best threshold rule of each kind in hindsight, best kind first."""
        found = [
            score(f"{r.kind} tuned", HINDSIGHT, [r.replays], note=r.setting) for r in tuned(self.traces, self.cost)
        ]
        return sorted(found, key=lambda s: -s.goodput)

    @cached_property
    def clairvoyant(self) -> Score:
        """Knows every accepted length beforehand, weighs each step at its own rate."""
        return self._bound("clairvoyant", clairvoyant(self.traces, self.cost)[self.level])

    @cached_property
    def dynamic_programming_bound(self) -> Score:
        """The least modelled time over all sequences of decisions."""
        return self._bound("dynamic programming", dynamic_programming_bound(self.traces, self.cost)[self.level])

    def _bound(self, name: str, replay: Replay) -> Score:
        return score(name, BOUND, [replay.split()])

    def hindsight(self) -> list[Score]:
        """All that only hindsight knows."""
        lookup = [] if self.best_lookup is None else [self.best_lookup]
        return [
            self.best,
            *lookup,
            self.task_oracle,
            *self.thresholds,
            self.clairvoyant,
            self.dynamic_programming_bound,
        ]
