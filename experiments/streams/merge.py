"""Workers that each walk over a stream of traces of their own, and merge what they learn every m steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.streams.walker import Walker, endless
from policies.acceptance.mlp16 import HIDDEN, Weights
from policies.base import Policy, State
from policies.registry import make_policy, options
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.traces.trace import Trace

#: Pseudo-records that an untrained start counts for: next to nothing.
UNTRAINED = 1.0
#: Typical spread of MLP16's inputs: entropies in bits, confidences, level code, gamma.
_SPREAD = np.array([2.0, 0.5, 4.0, 0.5, 1.0, 8.0])
#: What is on its way to the learner: when it was sent, and every worker's batch.
Sent = deque[tuple[int, list[State]]]


def cold(spec: str, seed: int) -> dict[str, Any]:
    """Return the options that make a policy start from nothing: no acceptance weights, or an untrained network."""
    if "acceptance" in options(spec.partition(":")[0]):
        return {"acceptance": "none"}
    rng = np.random.default_rng([seed, 16])
    # He et al. (2015): variance 2 / inputs; the head predicts one acceptance rate for everything.
    w1 = rng.normal(0.0, (2 / len(_SPREAD)) ** 0.5, (len(_SPREAD), HIDDEN)) / _SPREAD[:, None]
    weights = Weights(w1, rng.normal(0.0, 0.5, HIDDEN), np.zeros((HIDDEN, 1)), np.array([0.5]))
    return {"weights": weights, "strength": UNTRAINED}


def simulate(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    *,
    workers: int,
    every: int,
    steps: int,
    delay: int = 0,
    seed: int = 0,
) -> float:
    """Return the goodput of workers that start from nothing and merge every ``every`` steps, tokens/modelled second.

    What a worker gets from the learner holds all that it sent itself, and what the others sent at least ``delay``
    steps ago. The streams are the same whatever ``every`` and ``delay`` are; and one worker under 16 seeds, or four
    under 4, meet the same ones as sixteen.

    Parameters
    ----------
    spec : str
        See :mod:`policies.registry`.
    traces, cost
        What is replayed, and where the seconds come from.
    workers, every, steps, delay : int
        Number of workers, steps between exchanges, steps of each worker, and delay in steps.
    seed : int
        Of the streams and policies.
    """
    levels = {trace.level for trace in traces}
    cost = replace(cost, levels={level: cost.level(level) for level in levels})  # others would be told at each exchange
    start = cold(spec, seed)
    learner = make_policy(spec, seed=seed, **start)
    walkers = [
        Walker(make_policy(spec, seed=seed, worker=i, **start), endless(traces, seed * workers + i), cost)
        for i in range(workers)
    ]
    sent: Sent = deque()
    tokens, seconds, done = 0, 0.0, 0
    while done < steps:
        now = min(every, steps - done)
        for walker in walkers:
            more, took = walker.advance(now)
            tokens += more
            seconds += took
        done += now
        if done < steps:
            exchange(learner, walkers, sent, done, delay)
    return tokens / seconds


def exchange(learner: Policy, walkers: Sequence[Walker], sent: Sent, now: int, delay: int = 0) -> None:
    """Let walkers send what they learnt, and take over what all sent ``delay`` or more steps ago and all their own."""
    sent.append((now, [walker.policy.take_delta() for walker in walkers]))
    while sent and sent[0][0] <= now - delay:
        for delta in sent.popleft()[1]:
            learner.merge(delta)
    merged = learner.state_dict()
    for i, walker in enumerate(walkers):
        walker.policy.load_state_dict(merged)
        for _, deltas in sent:
            walker.policy.merge(deltas[i])
        if sent:
            walker.policy.take_delta()  # its own batches on their way must not be sent again
        tell_costs(walker.policy, walker.cost, walker.cost.levels)  # a worker's calibration is its own
