"""transformers' usual warpers in one pass over a row of scores, and draws from what they leave, on the host.

A sampled step softmaxes and draws over the whole vocabulary. With torch's operators that takes milliseconds: a draw
makes a random number for every token, a cut sorts all of them, and each operator wakes all threads. Here a draw takes
one random number, a cut looks at the likeliest tokens only, and one thread does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

#: Processors that look at one row's scores alone.
PREFIX_FREE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
#: Weights that are summed together before one is drawn.
BLOCK = 256
#: Likeliest tokens that a top-p cut looks at first; four times as many each time they do not hold enough.
FIRST = 256


def is_usual(processor: LogitsProcessor) -> bool:
    """Whether :class:`Warpers` does what a processor does: one of :data:`PREFIX_FREE`, as sampling has it."""
    if type(processor) not in PREFIX_FREE:
        return False
    keep, fill = getattr(processor, "min_tokens_to_keep", 1), getattr(processor, "filter_value", -float("inf"))
    return keep == 1 and fill == -float("inf")


class Warpers:
    """Does what a chain of :data:`PREFIX_FREE` processors and a softmax do, in their order, up to rounding.

    Parameters
    ----------
    chain : sequence of LogitsProcessor
        Processors that :func:`is_usual` knows.
    """

    def __init__(self, chain: Sequence[LogitsProcessor]) -> None:
        self.chain = list(chain)

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        """Return the distribution, shape (vocab,), fp32, of scores (vocab,); NaN where they have none."""
        kept: np.ndarray | None = None  # which tokens are left, if not all
        left = scores
        with np.errstate(invalid="ignore", over="ignore"):
            for warper in self.chain:
                if isinstance(warper, TemperatureLogitsWarper):
                    left = left / np.float32(warper.temperature)
                    continue
                if isinstance(warper, TopKLogitsWarper):
                    inside = np.flatnonzero(~(left < kth_largest(left, warper.top_k)))  # those that are no number too
                elif isinstance(warper, TopPLogitsWarper):
                    inside = nucleus(weights_of(left), warper.top_p)
                elif isinstance(warper, MinPLogitsWarper):
                    weights = weights_of(left)
                    inside = np.flatnonzero(~(weights < np.float32(warper.min_p) * weights.max()))
                else:
                    raise TypeError(f"{type(warper).__name__} is no usual warper")
                kept, left = inside if kept is None else kept[inside], left[inside]
            p = weights_of(left)
            p /= p.sum()
        if kept is None:
            return p
        whole = np.zeros(len(scores), np.float32)
        whole[kept] = p
        return whole


def weights_of(scores: np.ndarray) -> np.ndarray:
    """Return what probabilities are in proportion to: 1 for the best score."""
    weights = scores - scores.max()
    return np.exp(weights, out=weights)


def kth_largest(scores: np.ndarray, k: int) -> float:
    """Return the k-th largest score, or the least where there are fewer."""
    return torch.from_numpy(scores).topk(min(k, len(scores))).values[-1].item()


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return where the likeliest tokens are, in ascending order, up to the first that completes ``top_p``.

    A token is kept if those before it hold less than that. At least one is kept.
    """
    n, total = len(weights), float(weights.sum(dtype=np.float64))
    if not 0.0 < total < float("inf"):
        return np.arange(n)  # they have no distribution: whoever draws will say so
    enough, most = top_p * total, min(FIRST, n)
    while True:
        values, order = torch.from_numpy(weights).topk(most)
        before = np.cumsum(values.numpy(), dtype=np.float64)
        count = 1 + int(np.searchsorted(before[:-1], enough))  # the first of them that is enough ends it
        if before[-1] >= enough or most == n:
            return np.sort(order.numpy()[:count])
        most = min(4 * most, n)


def draw_from(weights: np.ndarray, point: float) -> int:
    """Draw an index in proportion to weights, shape (n,), by a number that is uniform in [0, 1).

    Raises
    ------
    RuntimeError
        If they are no numbers, or none is above zero.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    total = float(sums[-1])
    if not 0.0 < total < float("inf"):
        raise RuntimeError("cannot draw a token: the probabilities are inf or nan, or all of them are zero")
    block = int(sums.searchsorted(point * total, side="right"))
    rest = point * total - (float(sums[block - 1]) if block else 0.0)
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    # Rounding must not lead past the block's last token with a weight.
    at = inside.searchsorted(min(rest, np.nextafter(inside[-1], 0.0)), side="right")
    return block * BLOCK + int(at)
