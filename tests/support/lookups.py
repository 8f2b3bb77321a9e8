"""A text that repeats itself, and gates with an opinion."""

from __future__ import annotations

import numpy as np

from speckv_online.lookup.gate import FEATURES, LOOKUP_FEATURES, Gate

REPEATING = [5, 17, 101, 44, 9, 5, 17, 101, 44, 9, 5, 17, 101]


def gate_that(prefers_lookup: bool, sure: float = 0.5) -> Gate:
    """A gate that always takes one side, with a constant sureness of the lookup."""
    weights, head = np.zeros(len(FEATURES)), np.zeros(len(LOOKUP_FEATURES))
    weights[0], head[0] = (1.0 if prefers_lookup else -1.0), np.log(sure / (1 - sure))
    return Gate(weights, head)
