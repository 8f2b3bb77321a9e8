"""The causal context of each step, made of the outcomes of earlier ones; and summaries of draft signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, overload

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MAX_GAMMA, Context, Outcome

#: Weight of the latest step in the sequence's exponentially weighted acceptance.
ACCEPTANCE_WEIGHT = 0.2


class ReadOnlyTokens(Sequence[int]):
    """A view of a list of tokens that cannot change it; slices are copies."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __repr__(self) -> str:
        return repr(self._tokens)


class History:
    """What a sequence's earlier steps came to, from which each step's :class:`~policies.base.Context` is made.

    Parameters
    ----------
    level, task : str
        Compression level of the target and task label of the prompt.
    prompt_length : int
        Tokens in the target's context before anything was produced.
    tokens : list of int, optional
        All tokens of the sequence. The caller appends to it; policies get a read-only view.
    drafters : tuple of str
        Names that a decision's ``drafter`` may take.

    Attributes
    ----------
    step, position, context_length : int
        As in the coming step's context.
    """

    def __init__(
        self,
        level: str,
        task: str = "",
        prompt_length: int = 0,
        tokens: list[int] | None = None,
        drafters: tuple[str, ...] = (),
    ) -> None:
        self.level, self.task, self.drafters = level, task, drafters
        self.step = self.position = 0
        self.context_length = prompt_length
        self._tokens: Sequence[int] = () if tokens is None else ReadOnlyTokens(tokens)
        self._memory: dict[Any, Any] = {}
        self._drafted = self._accepted = self._idle = 0
        neutral = Context()
        self._acceptance = neutral.acceptance
        self._signals = (
            neutral.mean_entropy, neutral.max_entropy, neutral.mean_confidence, neutral.min_confidence,
        )  # fmt: skip

    def context(
        self,
        max_gamma: int = MAX_GAMMA,
        remaining: int = 1 << 62,
        lookup_confidence: float = 0.0,
        lookup_alternative: float = 0.0,
        rows: int = 1,
        unread: int = 0,
    ) -> Context:
        """Return a new context of the coming step; the arguments are as there."""
        mean_entropy, max_entropy, mean_confidence, min_confidence = self._signals
        return Context(
            self.level, self.task, self.step, self.position, self.context_length, max_gamma, remaining, self._drafted,
            self._accepted, self._idle, self._acceptance, mean_entropy, mean_confidence, max_entropy, min_confidence,
            self.drafters, self._tokens, lookup_confidence, lookup_alternative, self._memory,
            rows, unread,
        )  # fmt: skip

    def update(self, outcome: Outcome) -> None:
        """Advance past a step."""
        produced = outcome.produced
        self.step += 1
        self.position += produced
        self.context_length += produced
        self._drafted, self._accepted = outcome.drafted, outcome.accepted
        if outcome.labelled:
            self._acceptance += ACCEPTANCE_WEIGHT * (outcome.accepted / outcome.labelled - self._acceptance)
        self._idle += 1
        if outcome.drafted:
            self._idle = 0
            found = summarise(outcome.signals)
            if isfinite(sum(found)):  # what is no number would stay until the next draft, and spoil each decision
                self._signals = found


def summarise(signals: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean entropy, max entropy, mean confidence and min confidence of drafted tokens (zeros for none)."""
    if not len(signals):
        return 0.0, 0.0, 0.0, 0.0
    # Python floats on a handful of rows are faster here than four numpy reductions.
    columns, n = signals.T.tolist(), len(signals)
    entropy, confidence = columns[ENTROPY], columns[CONFIDENCE]
    if n == 1:
        return entropy[0], entropy[0], confidence[0], confidence[0]
    return sum(entropy) / n, max(entropy), sum(confidence) / n, min(confidence)
