"""Prompt lookup: which token followed the longest suffix of the context when it occurred before, and how surely.

The idea is prompt-lookup decoding (Saxena, 2023): text often repeats its own n-grams. The lookup is a drafter of its
own, half of the hybrid drafter, and a signal for policies: whether it proposes what the draft model proposes.

All of it is plain ints, tuples and dicts: a few microseconds per token, independent of the context's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log, log2
from typing import NamedTuple

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, NGRAM

#: Longest suffix that is looked up.
MAX_N = 4

#: Pseudo-sightings of the next shorter suffix's estimate in a suffix's own (Dirichlet smoothing; MacKay & Peto, 1995).
SMOOTHING = 2.0


class Proposal(NamedTuple):
    """What the lookup proposes.

    Attributes
    ----------
    token : int
        Latest follower of the longest suffix that occurred before.
    length : int
        Tokens of that suffix, 1 to 4.
    hits : int
        How often it was seen with a follower.
    confidence : float
        Estimated probability of the token: at each length (count + a p) / (hits + a), with p the estimate of the next
        shorter suffix and zero below one token. Never 1: 0.33, 0.56, 0.70 or 0.80 for one sighting after 1 to 4 tokens.
    entropy : float
        Bits, of the token with that probability, the suffix's other followers in proportion to their counts, and one
        outcome for all that was never seen.
    """

    token: int
    length: int
    hits: int
    confidence: float
    entropy: float

    @property
    def margin(self) -> float:
        """Log-odds of the token against everything else, zero or more: what a margin between two logits is at least."""
        return max(log(self.confidence / (1.0 - self.confidence)), 0.0)


class NgramIndex:
    """For every n-gram (n = 1 … 4) of a growing context, the tokens that followed it.

    ``extend`` appends for good; ``push`` appends one token until ``undo`` takes all pushed ones back.

    >>> found = NgramIndex([5, 6, 7, 5, 6]).propose()
    >>> found.token, found.length
    (7, 2)
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        # n-gram -> [latest follower, followers in all, sum of count * log2(count), counts by follower]
        self._table: dict[tuple[int, ...], list] = {}
        self._tail: tuple[int, ...] = ()
        self._pushed: list[tuple[int, tuple[int, ...], list[tuple[int, float]]]] = []
        # What was proposed last, and after what, since the context last changed.
        self._found: tuple[tuple[int, ...], Proposal | None] | None = None
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the context."""
        self._found = None
        table, tail = self._table, self._tail
        for token in tokens:
            for i in range(len(tail)):
                key = tail[i:]
                entry = table.get(key)
                if entry is None:
                    table[key] = [token, 1, 0.0, {token: 1}]
                else:
                    _count(entry, token)
            tail = (*tail[1 - MAX_N :], token) if len(tail) == MAX_N else (*tail, token)
        self._tail = tail

    def push(self, token: int) -> None:
        """Append a token for now."""
        self._found = None
        table, tail = self._table, self._tail
        before = []
        for i in range(len(tail)):
            entry = table.setdefault(tail[i:], [-1, 0, 0.0, {}])
            before.append((entry[0], entry[2]))
            _count(entry, token)
        self._pushed.append((token, tail, before))
        self._tail = (*tail[1 - MAX_N :], token) if len(tail) == MAX_N else (*tail, token)

    def undo(self) -> None:
        """Take all pushed tokens back."""
        if self._pushed:
            self._found = None
        while self._pushed:
            token, tail, before = self._pushed.pop()
            for i, (latest, total) in enumerate(before):
                entry = self._table[tail[i:]]
                if entry[1] == 1:
                    del self._table[tail[i:]]
                    continue
                entry[0], entry[2] = latest, total
                entry[1] -= 1
                counts = entry[3]
                counts[token] -= 1
                if not counts[token]:
                    del counts[token]
            self._tail = tail

    def lookup(self, drafted: Sequence[int] = ()) -> tuple[int, int]:
        """Return (token, n) proposed after the context followed by ``drafted``; n is the match length, 0 for none."""
        tail = (*self._tail, *drafted)[-MAX_N:] if drafted else self._tail
        for i in range(len(tail)):
            entry = self._table.get(tail[i:])
            if entry is not None:
                return entry[0], len(tail) - i
        return -1, 0

    def propose(self, drafted: Sequence[int] = ()) -> Proposal | None:
        """Return what follows the context and ``drafted``, how surely, or None where no suffix occurred before."""
        tail = (*self._tail, *drafted)[-MAX_N:] if drafted else self._tail
        if self._found is None or self._found[0] != tail:
            self._found = tail, self._propose(tail)
        return self._found[1]

    def _propose(self, tail: tuple[int, ...]) -> Proposal | None:
        table = self._table
        entry, i = None, 0
        for i in range(len(tail)):
            entry = table.get(tail[i:])
            if entry is not None:
                break
        if entry is None:
            return None
        token, hits, total, counts = entry
        p = 0.0
        for j in range(len(tail) - 1, i - 1, -1):  # every suffix of one that was seen was seen
            _, seen, _, followers = table[tail[j:]]
            p = (followers.get(token, 0) + SMOOTHING * p) / (seen + SMOOTHING)
        count = counts[token]
        rest = hits - count + SMOOTHING
        entropy = -p * log2(p) - (1.0 - p) * log2(1.0 - p)
        others = total - count * log2(count) + SMOOTHING * log2(SMOOTHING)
        entropy += (1.0 - p) * max(log2(rest) - others / rest, 0.0)
        return Proposal(token, len(tail) - i, hits, p, entropy)

    def signal(self, drafted: Sequence[int], token: int) -> float:
        """Signal of a drafted ``token``: match length n if the lookup proposes it too, −n if another, 0 if none."""
        proposed, n = self.lookup(drafted)
        return float(n if proposed == token else -n)


def _count(entry: list, token: int) -> None:
    """Count one more follower."""
    counts = entry[3]
    count = counts.get(token, 0)
    counts[token] = count + 1
    entry[0] = token
    entry[1] += 1
    if count:
        entry[2] += (count + 1) * log2(count + 1) - count * log2(count)


def write_signals(found: Proposal, signals: np.ndarray) -> None:
    """Write a lookup's (N_SIGNALS,) signals."""
    signals[ENTROPY] = found.entropy
    signals[CONFIDENCE] = found.confidence
    signals[MARGIN] = found.margin
    signals[NGRAM] = found.length
