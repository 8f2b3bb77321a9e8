"""What a drafter is, and the signals of a drafted token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from policies.base import CONFIDENCE, ENTROPY, MARGIN
from speckv_online.modeling.sampling import Sampler

#: What :meth:`Drafter.draft` returns where it has nothing to propose: the step drafts no further.
NO_PROPOSAL = -1


#: Entropy in bits of a draft that knows nothing.
CLUELESS = 10.0


class Drafter(Protocol):
    """Interface of a drafter: ``begin``, then in each step ``draft`` as often as wanted, ``end`` and ``extend``."""

    #: Most tokens (context and drafts together) that the drafter can hold.
    max_length: int
    #: What a policy may ask for by ``Decision.drafter``; the first is what it gets without asking.
    names: tuple[str, ...]

    @property
    def lag(self) -> int:
        """Context tokens that the drafter has not read yet; at least 1, the latest, when a step begins."""

    #: For each draft of the step the distribution that it was drawn from, shape (vocab,); None for a deterministic one.
    proposals: list[torch.Tensor | None]

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence with these context tokens, which may grow to about ``capacity``; draw with ``sampler``."""

    def use(self, name: str) -> str:
        """Draft what comes of the step as the drafter of this name, by default the first; return the name."""

    def draft(self, signals: np.ndarray) -> int:
        """Propose the token after the context and this step's drafts, or :data:`NO_PROPOSAL`.

        Writes the proposal's (N_SIGNALS,) signals. In greedy decoding a proposal depends on the tokens before it alone
        (exact traces rest on that, unless a drafter learns).
        """

    def lookup_confidence(self) -> float:
        """Return how likely the coming proposal is right where it takes no forward of a model, 0 where it does."""

    def lookup_alternative(self) -> float:
        """Return how likely a lookup is right that could be had, as the drafter ``ngram``, in place of a forward."""

    def end(self, accepted: int) -> None:
        """Forget this step's drafts, of which the first ``accepted`` are about to be confirmed by ``extend``."""

    def extend(self, tokens: list[int]) -> None:
        """Append tokens that the target settled on to the context."""


def draft_signals(logits: torch.Tensor) -> list[tuple[int, float, float, float, float]]:
    """Return for each of some logits, shape (n, rows of the head), what their signals are made of.

    Each is the likeliest row, its logit, the second largest one, the entropy in nats and the confidence.
    """
    top, likeliest = logits.topk(2).values, logits.argmax(-1)  # the first of equals, as the target's choice is
    p = logits.softmax(-1)
    # One transfer for everything that the host needs; a row index is exact in fp32.
    wanted = torch.stack((likeliest.float(), top[:, 0], top[:, 1], torch.special.entr(p).sum(-1), p.amax(-1)), dim=1)
    return [(int(row), *rest) for row, *rest in wanted.tolist()]


def write_draft_signals(found: Sequence[float], signals: np.ndarray) -> None:
    """Write a model's (N_SIGNALS,) signals, but for the n-gram's.

    Parameters
    ----------
    found : sequence of float
        As from :func:`draft_signals`: the two largest logits, the entropy in nats and the confidence. Where they are no
        numbers, as of a model whose logits overflow, the signals are those of one that knows nothing.
    signals : ndarray
        To write to.
    """
    first, second, nats, confidence = found
    known = math.isfinite(first - second + nats + confidence)
    signals[ENTROPY] = nats / math.log(2) if known else CLUELESS
    signals[CONFIDENCE] = confidence if known else 0.0
    signals[MARGIN] = first - second if known else 0.0
