"""A cell of the simulated part of ``python -m experiments.scale``."""

from __future__ import annotations

import numpy as np

from experiments.streams.merge import simulate
from speckv_online.simulate.cost_table import load_cost
from speckv_online.traces.trace import load_traces


def play(
    cell: tuple[str, ...], *, traces: str, cost: str, level: str, every: int, steps: int, seed: int, walkers: int
) -> float:
    """Return the tokens per second of a worker.

    Parameters
    ----------
    cell : tuple of str
        Policy, delay in steps, number of workers.
    traces, cost, level
        What is replayed, with which costs.
    every, steps : int
        Steps between exchanges, and steps of each worker.
    seed, walkers : int
        First seed, and least number of streams; few workers are run with several seeds.
    """
    policy, delay, workers = cell
    setting = {"workers": int(workers), "delay": int(delay), "every": every, "steps": steps}
    read, table = load_traces(traces, levels=[level]), load_cost(cost)
    seeds = range(seed, seed + -(-walkers // int(workers)))
    return float(np.mean([simulate(policy, read, table, **setting, seed=one) for one in seeds]))
