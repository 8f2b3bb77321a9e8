"""A sequence that is being decoded: how its tokens are judged, how it ends, and what is recorded of each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from speckv_online.modeling.choices import likeliest
from speckv_online.modeling.sampling import Sampler


@dataclass(slots=True)
class TokenSequence:
    """All tokens of a sequence, the prompt's included, how new ones are drawn, and what ends it.

    Attributes
    ----------
    eos : collection of int
        Tokens that end it.
    sampler : Sampler or None
        None is greedy decoding.
    should_stop : callable or None
        Called with all tokens after each new one; True ends the sequence there.
    finish : str
        Why it ended; empty while it goes on.
    """

    tokens: list[int]
    eos: Collection[int]
    sampler: Sampler | None = None
    should_stop: Callable[[list[int]], bool] | None = None
    finish: str = ""

    def verify(
        self, logits: torch.Tensor, drafts: list[int], proposals: Sequence[torch.Tensor | None]
    ) -> tuple[int, int]:
        """Return how many drafts the target accepts, and the token that follows them.

        ``logits`` are the target's, shape (k + 1, vocab), row i after the first i of the k drafts.
        """
        if self.sampler is not None:
            return self.sampler.verify(logits, self.tokens, drafts, proposals)
        return matching(drafts, likeliest(logits))

    def settle(
        self, logits: torch.Tensor, drafts: list[int], proposals: Sequence[torch.Tensor | None]
    ) -> tuple[int, list[int]]:
        """Verify and append: return how many drafts the target accepts, and the new tokens.

        Where processors have to be asked in order, each sees a prefix only after all of it was settled, and nobody is
        asked about what follows a rejected draft or the end.
        """
        sampler = self.sampler
        if sampler is None or not sampler.in_order:
            n, following = self.verify(logits, drafts, proposals)
            return n, self.append([*drafts[:n], following])
        n, new = 0, list[int]()
        for i in range(len(drafts) + 1):
            target = sampler.next_distribution(logits[i : i + 1], self.tokens)
            if i < len(drafts):
                token, accepted = sampler.judge(target, drafts[i], proposals[i])
            else:
                token, accepted = sampler.draw(target), False
            n += accepted
            new += self.append([token])
            if self.finish or not accepted:
                break
        return n, new

    def append(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first that ends the sequence, and return those."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            # Asked about an end of sequence too, as by transformers.
            if self.should_stop is not None and self.should_stop(self.tokens):
                self.finish = "stop"
            if token in self.eos:
                self.finish = "eos"
            if self.finish:
                return tokens[: i + 1]
        return tokens


def matching(drafts: list[int], choices: list[int]) -> tuple[int, int]:
    """Return the number of leading drafts that are the target's choices too, and the choice after them."""
    n = 0
    while n < len(drafts) and drafts[n] == choices[n]:
        n += 1
    return n, choices[n]
