"""Replaying a cell on traces, with modelled seconds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adaptation.cells import setting
from experiments.adaptation.config import AdaptationConfig
from experiments.adaptation.contest import COLD, Tally, settled
from experiments.common.cached_cells import Cell
from experiments.common.code_digest import digest
from experiments.streams.walker import again, endless, visit
from experiments.train import TrainConfig, describe, write_acceptance, write_mlp16
from policies.base import Policy
from speckv_online.console import say
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace

#: Options that name the weights to start from, by what they were fitted without.
Fitted = Mapping[str, Mapping[str, str]]


def learn(policy: Policy, traces: Sequence[Trace], cost: CostTable, seed: int) -> None:
    """Tell a policy the calibration, and let it meet all traces once, in a seeded order."""
    tell_costs(policy, cost, {t.level for t in traces})
    order = np.random.default_rng([seed, 2]).permutation(len(traces)).tolist()
    Simulator(policy, cost).run([traces[i] for i in order])


def fit(config: AdaptationConfig, todo: Sequence[Cell], folder: Path, held: str) -> dict[str, dict[str, str]]:
    """Fit the weights of all cells that leave something out, into a folder; those that are there are taken up.

    The few traces that ship are too few to fit to: with them every policy starts from the shipped weights.
    """
    import torch

    from speckv_online.training.mlp16 import data_from_traces

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    folder /= digest(["experiments.train"], held)
    for cell in todo if config.traces else ():
        here = setting(config, cell)
        if not here.weights or here.weights in found:
            continue
        place = folder / here.weights.replace(" ", "-")
        found[here.weights] = {"weights": str(place / "mlp16.npz"), "acceptance": str(place / "online.npz")}
        if all(Path(name).is_file() for name in found[here.weights].values()):
            continue
        say(f"{here.weights}: fitting to {len(here.source)} traces")
        place.mkdir(parents=True, exist_ok=True)
        how = TrainConfig(traces=str(place), seed=config.seed, seeds=1)
        about = {"data": describe(here.source), "left_out": here.weights}
        with redirect_stdout(sys.stderr):  # what a fit says of itself is no result
            data = data_from_traces(here.source, how.features, [int(g) for g in how.gammas], config.seed)
            write_mlp16(how, place, data, about)
            write_acceptance(how, place, here.source, about)
    return found


def play(config: AdaptationConfig, fitted: Fitted, cell: Cell) -> dict[str, Any]:
    """Replay a cell in all orders; the result is ready for JSON."""
    here, long = setting(config, cell), cell[0] == "long"
    tally = Tally(config.tokens if long else config.steps)
    for seed in range(config.seed, config.seed + config.orders):
        teach = partial(learn, traces=here.source, cost=here.told, seed=seed)
        policies = settled(config.policy, seed, teach, **fitted.get(here.weights, {}))
        for name, policy in policies.items():
            if name == COLD or cell[0] == "level":  # who settled here was told already
                tell_costs(policy, here.told, [cell[3]])
        enough = (0, config.tokens) if long else (config.steps, 0)
        met = visit(Simulator(policies.pop(""), here.true), "", endless(here.stream, seed), *enough)
        seconds = {"": met.seconds} | {name: again(policy, met.traces, here.true) for name, policy in policies.items()}
        tokens = met.tokens.tolist()
        keys, sizes = [(t.task, t.prompt_id) for t in met.traces], tokens if long else met.steps.tolist()
        tally.add(keys, tokens, sizes, {name: taken.tolist() for name, taken in seconds.items()})
    return tally.as_json()
