"""Drafting one token at a time."""

from __future__ import annotations

import numpy as np

from policies.base import N_SIGNALS
from speckv_online.drafters.model import ModelDrafter


def one_by_one(
    drafter: ModelDrafter, prompt: list[int], tokens: list[int], gamma: int
) -> tuple[np.ndarray, np.ndarray]:
    """The table as the decoder's own drafter gives it, one start and one token at a time."""
    drafts = np.empty((len(tokens), gamma), dtype=np.int32)
    signals = np.empty((len(tokens), gamma, N_SIGNALS))
    drafter.begin(prompt, len(prompt) + len(tokens) + gamma)
    for t, token in enumerate(tokens):
        drafts[t] = [drafter.draft(signals[t, j]) for j in range(gamma)]
        drafter.end(0)
        drafter.extend([token])
    return drafts, signals
