"""How MLP16's output layer differs from draft to draft: the directions in which a learned head may move at once.

The hidden layer stays; the output layer is fitted to another draft's rows by ridge regression towards its own weights
(empirical Bayes over drafts: what separates the heads of known drafts is where a new one's is likely to lie).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from policies.learned.mlp16 import Weights
from speckv_online.traces.trace import Trace
from speckv_online.training.acceptance import draft_of
from speckv_online.training.mlp16 import Data

#: How many rows of another draft MLP16's own weights are worth.
STRENGTH = 200.0


@dataclass(frozen=True)
class HeadShift:
    """A head fitted to another draft, less MLP16's own.

    Attributes
    ----------
    rows : int
        Rows that it was fitted to.
    shift : ndarray, shape (17,)
        Difference of [W2; b2].
    before, after : float
        Mean squared error of the acceptance rate on the other draft's rows, with MLP16's head and with the fitted one.
    """

    rows: int
    shift: np.ndarray
    before: float
    after: float


def head_shift(weights: Weights, data: Data) -> HeadShift:
    """Fit the head to another draft's rows."""
    phi = np.c_[weights.hidden(data.x), np.ones(len(data))]
    left = data.y - phi @ weights.head
    shift = np.linalg.solve(phi.T @ phi + STRENGTH * weights.moments, phi.T @ left)
    return HeadShift(len(data), shift, float(np.mean(left**2)), float(np.mean((left - phi @ shift) ** 2)))


def other_drafts(traces: Iterable[Trace], more: Iterable[Trace]) -> dict[tuple[str, str], list[Trace]]:
    """Return those traces of ``more`` whose draft is named and none of ``traces``' own, by draft and level."""
    known = {draft_of(trace) for trace in traces}
    found: dict[tuple[str, str], list[Trace]] = {}
    for trace in more:
        draft = draft_of(trace)
        if draft and draft not in known:
            found.setdefault((draft, trace.level), []).append(trace)
    return dict(sorted(found.items()))
