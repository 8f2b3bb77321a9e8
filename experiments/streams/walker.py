"""Endless streams of traces: policies that walk over them step by step, share what they learn, and meet changes.

What adaptation, drift and merging have in common. Seconds are modelled. A policy is measured against a *settled* copy
of itself, which has met the same kind of traces for long and replays the very same traces: so prompts that happen to
be hard do not look like a policy that has not learnt yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from policies.base import Policy
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace


def endless(traces: Sequence[Trace], seed: int | Sequence[int]) -> Iterator[Trace]:
    """Yield traces for ever, in a new random order each time round."""
    rng = np.random.default_rng(seed)
    while True:
        for i in rng.permutation(len(traces)).tolist():
            yield traces[i]


class Walker:
    """One policy on an endless stream of traces, which can be stopped after any number of steps.

    Parameters
    ----------
    policy : Policy
        Told the costs of every level of the table first.
    stream : iterator of Trace
        What it meets.
    cost : CostTable
        Where the seconds come from.
    """

    def __init__(self, policy: Policy, stream: Iterator[Trace], cost: CostTable) -> None:
        tell_costs(policy, cost, cost.levels)
        self.policy, self.cost = policy, cost
        simulator = Simulator(policy, cost)
        self._steps = (step for trace in stream for step in simulator.steps(trace))

    def advance(self, steps: int) -> tuple[int, float]:
        """Take some steps; return the tokens and the seconds of them all."""
        tokens, seconds = 0, 0.0
        for _ in range(steps):
            more, took = next(self._steps)
            tokens += more
            seconds += took
        return tokens, seconds


@dataclass(frozen=True)
class Visit:
    """Traces of one kind that a policy met between two changes of the stream.

    Attributes
    ----------
    kind : str
        What the stream had changed to.
    traces : list of Trace
    steps : ndarray of int, shape (N,)
        Steps that each trace took.
    seconds : ndarray, shape (N,)
        Modelled seconds of each trace.
    """

    kind: str
    traces: list[Trace]
    steps: np.ndarray
    seconds: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each trace, shape (N,)."""
        return np.array([len(trace) for trace in self.traces])


def visit(simulator: Simulator, kind: str, traces: Iterator[Trace], least_steps: int, least_tokens: int = 0) -> Visit:
    """Replay traces until a number of steps, and of tokens, is reached; the last trace is finished."""
    met, steps, seconds = list[Trace](), list[int](), list[float]()
    while sum(steps) < least_steps or sum(map(len, met)) < least_tokens:
        trace = next(traces)
        replay = simulator.replay(trace)
        met.append(trace)
        steps.append(len(replay))
        seconds.append(float(replay.seconds.sum()))
    return Visit(kind, met, np.array(steps), np.array(seconds))


def settle(policy: Policy, traces: Sequence[Trace], cost: CostTable, steps: int, seed: int) -> Policy:
    """Let a policy meet one kind of traces for a number of steps, and return it."""
    tell_costs(policy, cost, cost.levels)
    visit(Simulator(policy, cost), "", endless(traces, [seed, 1]), steps)
    return policy


def again(policy: Policy, traces: Sequence[Trace], cost: CostTable) -> np.ndarray:
    """Return the seconds that a copy of a policy takes for each of some traces; the policy itself stays as it is."""
    simulator = Simulator(copy.deepcopy(policy), cost)
    return np.array([float(simulator.replay(trace).seconds.sum()) for trace in traces])


def change(
    policy: Policy, kinds: Mapping[str, Sequence[Trace]], cost: CostTable, period: int, rounds: int, seed: int
) -> list[Visit]:
    """Walk a policy over a stream that goes round all kinds, and changes when at least ``period`` steps were taken.

    It ends where it began, so that it changes to every kind equally often.

    Parameters
    ----------
    policy : Policy
        Told the costs of every level first; learns throughout.
    kinds : mapping of str to sequence of Trace
        What the stream changes between, in this order.
    cost : CostTable
        Where the seconds come from.
    period, rounds, seed : int
        Steps between changes, times that it changes to every kind, seed of the order of the traces.
    """
    tell_costs(policy, cost, cost.levels)
    simulator = Simulator(policy, cost)
    streams = {kind: endless(traces, [seed, i]) for i, (kind, traces) in enumerate(kinds.items())}
    order = islice(cycle(streams), rounds * len(kinds) + 1)
    return [visit(simulator, kind, streams[kind], period) for kind in order]


def relative(steps: np.ndarray, seconds: np.ndarray, settled: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sum seconds of a policy and of its settled copy by the number of steps before each trace.

    Parameters
    ----------
    steps, seconds, settled : ndarray, shape (N,)
        Steps and seconds of each trace in turn, and the seconds of the settled copy for the same traces.
    bins : ndarray, shape (B + 1,)
        Edges.

    Returns
    -------
    seconds, settled : ndarray, shape (B,)
        Sums; ``settled / seconds`` is the policy's goodput relative to its stationary one.
    """
    before = np.cumsum(steps) - steps
    return tuple(np.histogram(before, bins, weights=w)[0] for w in (seconds, settled))
