"""Drafting for several sequences at once."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from policies.base import LOOKUP, NGRAM
from speckv_online.drafters.base import NO_PROPOSAL, Drafter, write_draft_signals
from speckv_online.drafters.model import ModelDrafter, is_pure
from speckv_online.lookup.ngram_index import NgramIndex, Proposal, write_signals
from speckv_online.lookup.text_chances import TextChances
from speckv_online.modeling.sampling import Sampler


class RowDrafter(Protocol):
    """Drafts for rows of a batch; as :class:`~speckv_online.drafters.Drafter`, with a row number."""

    def use(self, row: int, name: str) -> str:
        """Draft what comes of the row's step as the drafter of this name, by default the first; return the name."""

    def lag(self, row: int) -> int:
        """Context tokens of a row that are not read yet."""

    def draft(self, rows: list[int], signals: list[np.ndarray]) -> list[tuple[int, float]]:
        """Propose one more token, or ``NO_PROPOSAL``, for each of these rows, and write its signals.

        Returns each row's token, and the seconds that it took: its own, or its share of a forward for all.
        """

    def lookup_confidence(self, row: int) -> float:
        """Return how likely the row's coming proposal is right where it takes no forward of a model, else 0."""

    def lookup_alternative(self, row: int) -> float:
        """Return how likely a lookup is right that the row could have in place of a forward."""

    def proposals(self, row: int) -> list[torch.Tensor | None]:
        """Return the distributions that the row's drafts of this step were drawn from."""

    def end(self, row: int, accepted: int, tokens: list[int]) -> None:
        """Forget the row's drafts but the first ``accepted``, and append the tokens that were settled on."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""


class RowProposer:
    """One row of a batch as a step sees it (:class:`speckv_online.speculation.Proposer`)."""

    __slots__ = ("drafter", "row")

    def __init__(self, drafter: RowDrafter, row: int) -> None:
        self.drafter, self.row = drafter, row

    def lookup_confidence(self) -> float:
        """See :class:`RowDrafter`."""
        return self.drafter.lookup_confidence(self.row)

    def lookup_alternative(self) -> float:
        """See :class:`RowDrafter`."""
        return self.drafter.lookup_alternative(self.row)

    def use(self, name: str) -> str:
        """See :class:`RowDrafter`."""
        return self.drafter.use(self.row, name)


def row_drafter(
    drafter: Drafter, prompts: list[list[int]], capacity: int, samplers: list[Sampler | None]
) -> RowDrafter:
    """Return a drafter for a batch: one forward for all rows where it is a plain model, else one copy for each row."""
    if is_pure(drafter):
        return ModelRows(drafter, prompts, capacity, samplers)
    return Copies(drafter, prompts, capacity, samplers)


class Copies:
    """A copy of a drafter for every row; what it has learnt or loaded is shared."""

    def __init__(
        self, drafter: Drafter, prompts: list[list[int]], capacity: int, samplers: list[Sampler | None]
    ) -> None:
        self.drafters = [copy.copy(drafter) for _ in prompts]
        for own, prompt, sampler in zip(self.drafters, prompts, samplers, strict=True):
            own.begin(list(prompt), capacity, sampler)

    def use(self, row: int, name: str) -> str:
        """See :class:`RowDrafter`."""
        return self.drafters[row].use(name)

    def lag(self, row: int) -> int:
        """See :class:`RowDrafter`."""
        return self.drafters[row].lag

    def draft(self, rows: list[int], signals: list[np.ndarray]) -> list[tuple[int, float]]:
        """See :class:`RowDrafter`."""
        found = []
        for row, own in zip(rows, signals, strict=True):
            t = perf_counter()
            token = self.drafters[row].draft(own)
            found.append((token, perf_counter() - t))
        return found

    def lookup_confidence(self, row: int) -> float:
        """See :class:`RowDrafter`."""
        return self.drafters[row].lookup_confidence()

    def lookup_alternative(self, row: int) -> float:
        """See :class:`RowDrafter`."""
        return self.drafters[row].lookup_alternative()

    def proposals(self, row: int) -> list[torch.Tensor | None]:
        """See :class:`RowDrafter`."""
        return self.drafters[row].proposals

    def end(self, row: int, accepted: int, tokens: list[int]) -> None:
        """See :class:`RowDrafter`."""
        self.drafters[row].end(accepted)
        self.drafters[row].extend(tokens)

    def keep(self, rows: list[int]) -> None:
        """See :class:`RowDrafter`."""
        self.drafters = [self.drafters[r] for r in rows]


class ModelRows:
    """Drafts with a model, one forward for all rows; rows that do not draft any more in a step sit it out."""

    def __init__(
        self, drafter: ModelDrafter, prompts: list[list[int]], capacity: int, samplers: list[Sampler | None]
    ) -> None:
        self.drafter, self.samplers = drafter, samplers
        self.model = drafter.backend.batch(prompts, capacity, drafter.last_id)
        self.contexts = [list(p) for p in prompts]
        self.drafted: list[list[int]] = [[] for _ in prompts]
        self.drawn: list[list[torch.Tensor | None]] = [[] for _ in prompts]
        self.ngrams = [NgramIndex(p) for p in prompts]
        self.text_chances = [TextChances(drafter.chances, sampler is not None) for sampler in samplers]
        self.kinds = [drafter.names[0]] * len(prompts)

    def use(self, row: int, name: str) -> str:
        """See :class:`RowDrafter`."""
        names = self.drafter.names
        self.kinds[row] = name if name in names else names[0]
        return self.kinds[row]

    def lag(self, row: int) -> int:
        """See :class:`RowDrafter`."""
        return len(self.contexts[row]) - self.model.cached[row]

    def draft(self, rows: list[int], signals: list[np.ndarray]) -> list[tuple[int, float]]:
        """See :class:`RowDrafter`."""
        wanted = dict(zip(rows, signals, strict=True))
        found = {row: self._look_up(row, wanted.pop(row)) for row in rows if self.kinds[row] == LOOKUP}
        if wanted:
            found |= zip(wanted, self._forward(list(wanted), list(wanted.values())), strict=True)
        return [found[row] for row in rows]

    def _look_up(self, row: int, signals: np.ndarray) -> tuple[int, float]:
        """Draft a row's lookup."""
        t = perf_counter()
        found = self._found(row)
        if found is None:
            return NO_PROPOSAL, perf_counter() - t
        write_signals(found, signals)
        self.drafted[row].append(found.token)
        self.drawn[row].append(None)
        return found.token, perf_counter() - t

    def _found(self, row: int) -> Proposal | None:
        return self.ngrams[row].propose(self.drafted[row])

    def _forward(self, rows: list[int], signals: list[np.ndarray]) -> list[tuple[int, float]]:
        """Draft these rows' next tokens with the model."""
        t = perf_counter()
        feed: list[list[int]] = [[] for _ in self.contexts]
        for row in rows:
            context, have = self.contexts[row], self.model.cached[row]
            feed[row] = context[have:] + self.drafted[row][max(have - len(context), 0) :]
        logits = self.model.feed(feed, last=True)[rows, 0, : self.drafter.rows].float()
        tokens = []
        for i, (index, *found) in enumerate(self.drafter.draft_signals(logits)):
            row, head_ids, sampler = rows[i], self.drafter.head_ids, self.samplers[rows[i]]
            token = index if head_ids is None else head_ids[index]
            proposal = None
            if sampler is not None:
                token, proposal = self.drafter.propose(logits[i], sampler, self.contexts[row], self.drafted[row])
            write_draft_signals(found, signals[i])
            signals[i][NGRAM] = self.ngrams[row].signal(self.drafted[row], token)
            self.drafted[row].append(token)
            self.drawn[row].append(proposal)
            tokens.append(token)
        share = (perf_counter() - t) / len(rows)
        return [(token, share) for token in tokens]

    def lookup_confidence(self, row: int) -> float:
        """See :class:`RowDrafter`."""
        return self._chance(row) if self.kinds[row] == LOOKUP else 0.0

    def lookup_alternative(self, row: int) -> float:
        """See :class:`RowDrafter`."""
        return 0.0 if self.kinds[row] == LOOKUP else self._chance(row)

    def _chance(self, row: int) -> float:
        return self.text_chances[row].of(self._found(row))

    def proposals(self, row: int) -> list[torch.Tensor | None]:
        """See :class:`RowDrafter`."""
        return self.drawn[row]

    def end(self, row: int, accepted: int, tokens: list[int]) -> None:
        """See :class:`RowDrafter`."""
        self.model.cached[row] = min(self.model.cached[row], len(self.contexts[row]) + accepted)
        self.drafted[row], self.drawn[row], self.kinds[row] = [], [], self.drafter.names[0]
        self.contexts[row] += tokens
        self.text_chances[row].extend(self.ngrams[row], tokens)

    def keep(self, rows: list[int]) -> None:
        """See :class:`RowDrafter`."""
        self.model.keep(rows)
        for name in ("contexts", "drafted", "drawn", "ngrams", "text_chances", "samplers", "kinds"):
            setattr(self, name, [getattr(self, name)[r] for r in rows])
