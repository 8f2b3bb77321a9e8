"""What a policy gets, on the traces of a drafter with a model, when it leaves that and goes on with the lookup alone.

Up to where it turns, a draft is the trace's own; from there on it depends on tokens and the gate's weights only, so
that a replay looks up what the decoder would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from speckv_online.lookup.gate import chance_of
from speckv_online.lookup.ngram_index import MAX_N, NgramIndex, Proposal, write_signals

if TYPE_CHECKING:
    from speckv_online.traces.rows import Rows


class SwitchedDraft(NamedTuple):
    """A draft with a tail of lookups.

    Attributes
    ----------
    drafts : list of int
        Tokens, as many as there are.
    signals : ndarray of float, shape (len(drafts), N_SIGNALS)
    lookups : list of float
        How sure the drafter was of each token that took no forward, 0 of the others; one more for what would follow.
    accepted : int
        Leading tokens that agree with the output.
    """

    drafts: list[int]
    signals: np.ndarray
    lookups: list[float]
    accepted: int


class SwitchToLookup:
    """Lookups at every point of a trace's drafts.

    Parameters
    ----------
    prompt : list of int
        The context before the output.
    rows : Rows
        The trace's, of L positions and drafts of up to G tokens.
    weights : list of float
        The drafter's, of :func:`~speckv_online.lookup.gate.chance_of`.
    counts : bool
        Whether its lookups count what a step has drafted so far, as a hybrid's do.
    """

    def __init__(self, prompt: list[int], rows: Rows, weights: list[float], counts: bool) -> None:
        self.prompt, self.rows, self.weights, self.counts = prompt, rows, weights, counts
        none = [0.0] * (len(rows.drafts[0]) if rows.drafts else 0)
        self.lookups = rows.lookups or [none] * len(rows.drafts)  # of the trace's own drafts
        self._switched: dict[tuple[int, int], SwitchedDraft] = {}
        # Worked out where a replay comes by: it sees a small part of all drafts.
        self._offers: list[list[float | None]] = [[None] * len(drafts) for drafts in rows.drafts]
        self._at, self._context = 0, NgramIndex(prompt)  # of the prompt and so many tokens

    def lookup_alternative(self, t: int, j: int) -> float:
        """Return how sure the drafter is of the lookup after j tokens of the draft from position t.

        0 where the trace's next token is a lookup itself.
        """
        found = self._offers[t][j]
        if found is None:
            found = 0.0
            if not self.lookups[t][j]:
                drafts = self.rows.drafts[t][:j]
                index = self._index(t, drafts)
                found = self._sure(self._propose(index, drafts))
                index.undo()
            self._offers[t][j] = found
        return found

    def _propose(self, index: NgramIndex, drafts: list[int]) -> Proposal | None:
        """What follows the context of an index, and the drafts, which it has where they count."""
        return index.propose(() if self.counts else drafts[-MAX_N:])

    def _sure(self, found: Proposal | None) -> float:
        return 0.0 if found is None else chance_of(found, self.weights)

    def _index(self, t: int, drafts: list[int]) -> NgramIndex:
        """The index of everything before position t, and until it is undone of the drafts, where they count."""
        if t < self._at:
            self._at, self._context = 0, NgramIndex(self.prompt)
        self._context.extend(self.rows.tokens[self._at : t])
        self._at = t
        for drafted in drafts if self.counts else ():
            self._context.push(drafted)
        return self._context

    def switched(self, t: int, j: int) -> SwitchedDraft:
        """Return the draft from position t that leaves the trace's after j tokens."""
        found = self._switched.get((t, j))
        if found is None:
            found = self._switched[t, j] = self._switch(t, j)
        return found

    def _switch(self, t: int, j: int) -> SwitchedDraft:
        rows = self.rows
        drafts, lookups, signals = rows.drafts[t][:j], self.lookups[t][:j], rows.signals[t]
        if self.counts and 0 < j <= rows.accepted[t] and t + j < len(rows.tokens):  # as if the step had begun there
            tail, left = self.switched(t + j, 0), len(signals) - j
            signals = np.concatenate((signals[:j], tail.signals[:left]))
            n = min(tail.accepted, left)
            return SwitchedDraft([*drafts, *tail.drafts[:left]], signals, [*lookups, *tail.lookups[: left + 1]], j + n)
        index, signals = self._index(t, drafts), signals.copy()
        while (found := self._propose(index, drafts)) is not None and len(drafts) < len(signals):
            write_signals(found, signals[len(drafts)])
            drafts.append(found.token)
            lookups.append(self._sure(found))
            if self.counts:
                index.push(found.token)
        index.undo()
        agree = [drafted == token for drafted, token in zip(drafts, rows.tokens[t:], strict=False)]
        accepted = agree.index(False) if False in agree else len(agree)
        return SwitchedDraft(drafts, signals[: len(drafts)], [*lookups, self._sure(found)], accepted)
