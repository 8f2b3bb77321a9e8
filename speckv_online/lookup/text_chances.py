"""How likely lookups are right in one text; in sampled decoding the text itself has a say."""

from __future__ import annotations

from collections.abc import Sequence

from speckv_online.lookup.gate import chance_of
from speckv_online.lookup.ngram_index import NgramIndex, Proposal

#: By how much log-odds are moved before a text begins, and the information, sums of p (1 - p), that this counts for.
#: Fitted to the training prompts: -0.26 at a temperature of 0.7, -0.73 at 1, over all texts of each.
START, PRIOR = -0.3, 8.0
#: Least that a token tells: keeps one surprise from moving the odds by much.
LEAST = 0.02


class TextChances:
    """Estimates how likely a lookup is right.

    The weights were fitted to greedy decoding. A draw agrees with a lookup less often than the likeliest token does,
    and less often the higher the temperature. The odds differ by nearly a constant factor. In sampled decoding that
    factor is learnt from all tokens of the text so far. They are distributed as the target says, whatever was drafted,
    so each of them tells without bias whether the lookup was right. Every text begins anew, so that a seeded run
    repeats itself.

    Parameters
    ----------
    weights : sequence of float
        As of :func:`~speckv_online.lookup.gate.chance_of`.
    sampled : bool
        Whether tokens are drawn; else the weights stay as they are.
    """

    def __init__(self, weights: Sequence[float], sampled: bool) -> None:
        self.weights, self.sampled = list(weights), sampled
        self.weights[0] += START if sampled else 0.0
        self._information = PRIOR

    def of(self, found: Proposal | None) -> float:
        """Return how likely a lookup is right, 0 where there is none."""
        return 0.0 if found is None else chance_of(found, self.weights)

    def extend(self, index: NgramIndex, tokens: Sequence[int]) -> None:
        """Append settled tokens to the index of the text, and learn from them."""
        if not self.sampled:
            index.extend(tokens)
            return
        for token in tokens:
            found = index.propose()
            if found is not None:
                p = chance_of(found, self.weights)
                self._information += max(p * (1.0 - p), LEAST)
                self.weights[0] += ((found.token == token) - p) / self._information
            index.extend((token,))
