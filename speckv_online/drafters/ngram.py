"""Drafting by looking up the text's own n-grams."""

from __future__ import annotations

import numpy as np
import torch

from policies.base import LOOKUP
from speckv_online.drafters.base import NO_PROPOSAL
from speckv_online.lookup.ngram_index import NgramIndex, write_signals
from speckv_online.lookup.text_chances import TextChances
from speckv_online.modeling.sampling import Sampler

#: Weights of :func:`~speckv_online.lookup.gate.chance_of` with which a chance is the lookup's own confidence.
CONFIDENT = (0.0, 1.0, 0.0, 0.0, 0.0)


class NgramDrafter:
    """Drafts what followed the longest suffix of the context when it occurred before: no model, any target.

    Where no suffix occurred before it proposes nothing, and the step drafts no further. Its signals are the estimate's
    entropy (bits), its confidence, the log-odds of that as margin, and the length of the match.
    """

    names: tuple[str, ...] = (LOOKUP,)
    max_length = 1 << 30
    #: Nothing is read late: there is no cache to fill.
    lag = 1

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence; with a sampler the proposals stay the same, what is told of their chance does not."""
        self.ngrams = NgramIndex(tokens)
        self.text_chances = None if sampler is None else TextChances(CONFIDENT, True)
        self.proposals: list[torch.Tensor | None] = []

    def use(self, name: str) -> str:
        """There is one drafter here."""
        return self.names[0]

    def draft(self, signals: np.ndarray) -> int:
        """Propose one token, or nothing."""
        found = self.ngrams.propose()
        if found is None:
            return NO_PROPOSAL
        write_signals(found, signals)
        self.ngrams.push(found.token)
        self.proposals.append(None)
        return found.token

    def lookup_confidence(self) -> float:
        """Return the coming proposal's confidence, 0 where there is none; moved by the text where tokens are drawn."""
        found = self.ngrams.propose()
        if self.text_chances is not None:
            return self.text_chances.of(found)
        return 0.0 if found is None else found.confidence

    def lookup_alternative(self) -> float:
        """Return 0: no proposal takes a forward."""
        return 0.0

    def end(self, accepted: int) -> None:
        """Take this step's drafts out of the index."""
        self.ngrams.undo()
        self.proposals = []

    def extend(self, tokens: list[int]) -> None:
        """Append settled tokens to the context."""
        if self.text_chances is None:
            self.ngrams.extend(tokens)
        else:
            self.text_chances.extend(self.ngrams, tokens)
