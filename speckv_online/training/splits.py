"""Ways of holding rows out: whole prompts, tasks, or compression levels; never single rows of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.training.mlp16 import Data

#: Folds of prompts in every cross-validation.
FOLDS = 5


def folds(prompt: np.ndarray, task: np.ndarray, count: int = FOLDS) -> list[np.ndarray]:
    """Return masks (N,) of held-out rows, one per fold; every prompt is held out once, the tasks spread evenly.

    Prompts are dealt out in the order of their names, task by task, so that the folds do not depend on a seed.

    Raises
    ------
    UserError
        If there are fewer than two prompts.
    """
    names = sorted({(str(t), str(p)) for t, p in zip(task, prompt, strict=True)})
    if len({p for _, p in names}) < 2:
        raise UserError("held-out figures need at least two prompts: profile more prompts")
    count = min(count, len(names))
    fold = {p: i % count for i, (_, p) in enumerate(names)}
    number = np.array([fold[str(p)] for p in prompt])
    return [number == i for i in range(count)]


def held_out_splits(data: Data) -> dict[str, list[np.ndarray]]:
    """Return masks of held-out rows by the name of the split; a split that would leave nothing is left out."""
    splits = {"prompts": folds(data.prompt, data.task)}
    for name, labels in (("task", data.task), ("level", data.level)):
        values = np.unique(labels)
        if len(values) > 1:
            splits |= {f"{name} {value}": [labels == value] for value in values}
    return splits
