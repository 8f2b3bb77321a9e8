"""Prompts in parts, and what learned policies start from, fitted to some of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.train import TrainConfig, describe, write_acceptance, write_mlp16
from speckv_online.errors import UserError
from speckv_online.traces.trace import Trace


def split(traces: Sequence[Trace], count: int, seed: int) -> list[frozenset[str]]:
    """Return the prompt ids of each of ``count`` folds, all tasks spread evenly over them."""
    tasks: dict[str, set[str]] = {}
    for trace in traces:
        tasks.setdefault(trace.task, set()).add(trace.prompt_id)
    rng = np.random.default_rng(seed)
    order = [prompt for task in sorted(tasks) for prompt in rng.permutation(sorted(tasks[task])).tolist()]
    if len(order) < count:
        raise UserError(f"{len(order)} prompts are too few for {count} folds")
    return [frozenset(order[i::count]) for i in range(count)]


def fit_weights(traces: Sequence[Trace], seed: int, folder: Path, about: dict[str, Any]) -> dict[str, str]:
    """Fit to some traces what learned policies start from, and return the policies' options that name it."""
    import torch

    from speckv_online.training.mlp16 import data_from_traces

    torch.set_num_threads(1)
    config = TrainConfig(traces=str(folder), seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"data": describe(list(traces))} | about
    data = data_from_traces(traces, config.features, [int(g) for g in config.gammas], seed)
    write_mlp16(config, folder, data, about)
    write_acceptance(config, folder, list(traces), about)
    return {"weights": str(folder / "mlp16.npz"), "acceptance": str(folder / "online.npz")}
