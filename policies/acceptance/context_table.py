"""How often drafts were accepted after the same tokens: lately in this text, and on the whole in all texts.

Before a token is drafted its own signals do not exist, but the tokens that come before it do. Of those this file
remembers (a) in the sequence's own scratch space, for every suffix of 1 to 4 tokens, whether the latest draft after it
was accepted, and (b) over all texts, for the last token and for the last two, how many drafts were tested and accepted:
hashed into a table of sums that forget exponentially and add up over workers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from policies.base import PolicyError, State
from policies.estimators.bayesian_linear import check_array

#: Longest suffix.
TAIL = 4
#: Buckets of the last token, and of the last two.
SINGLES, PAIRS = 4096, 8192
SHAPE = (2, SINGLES + PAIRS)
#: A bucket's acceptance counts n / (n + SHRINK) after n tested drafts: of the last token, of the last two.
SHRINK_SINGLE, SHRINK_PAIR = 8.0, 4.0
#: Features: 1 or -1 for the longest suffix seen, and both excesses, see :meth:`TokenHistory.look_up`.
FEATURES = TAIL + 2

Tail = Sequence[int]
#: Where a token's history is kept: a number for each suffix that it follows, the shortest first, and its buckets.
Place = tuple[tuple[int, ...], int, int]
#: More than any token: a suffix's number has its tokens, plus one, as digits to this base.
BASE = 1 << 22
#: That of a token that nothing is known to come before.
NOWHERE: Place = (), -1, -1
#: What is known of drafts there, see :meth:`TokenHistory.look_up`.
Seen = tuple[int, float, float]


def buckets(tail: Tail) -> tuple[int, int]:
    """Return where the last token, and the last two, are counted; -1 where there is no such token."""
    if len(tail) < 2:
        return ((tail[0] * 2654435761 & 0xFFFFFFFF) >> 20, -1) if tail else (-1, -1)
    hashed = tail[-1] * 2654435761 & 0xFFFFFFFF
    return hashed >> 20, SINGLES + ((hashed + tail[-2] * 2246822519 & 0xFFFFFFFF) >> 19)


def place(tail: Tail) -> Place:
    """Return where the history of a token that follows ``tail``, the last tokens up to four, is kept."""
    if len(tail) < TAIL:
        keys, key = [], 0
        for token in reversed(tail):
            key = key * BASE + token + 1
            keys.append(key)
        return tuple(keys), *buckets(tail)
    # The usual case, written out: this is asked for every token.
    d, c, b, a = tail
    one = a + 1
    two = one * BASE + b + 1
    three = two * BASE + c + 1
    hashed = a * 2654435761 & 0xFFFFFFFF
    j = SINGLES + ((hashed + b * 2246822519 & 0xFFFFFFFF) >> 19)
    return (one, two, three, three * BASE + d + 1), hashed >> 20, j


class TokenHistory:
    """The table over all texts, and what is read from and noted in it and in a sequence's scratch space.

    Parameters
    ----------
    table : ndarray, shape (2, SINGLES + PAIRS), optional
        Tested and accepted drafts per bucket that are known beforehand.
    discount : float
        Forgetting per step.
    """

    def __init__(self, table: np.ndarray | None = None, discount: float = 1.0) -> None:
        self._prior = np.zeros(SHAPE) if table is None else table.astype(float)
        self.discount = discount
        self.forget()

    def forget(self) -> None:
        """Return to what was known beforehand; what was not handed out yet is dropped too."""
        self._set(self._prior.copy(), 1.0)

    def _set(self, table: np.ndarray, weight: float) -> None:
        """Start from entries that are stored times ``weight``, none of them this copy's own."""
        self._table, self._weight, self._steps = table, weight, 0
        self.__dict__.pop("_counts", None)

    @cached_property
    def _counts(self) -> tuple[array[float], list[float]]:
        """Tested and accepted, bucket by bucket, and their totals over the last token's: the table and what was noted
        since.

        The hot path reads and writes Python's arrays far quicker than numpy's. They are made at its first step, so that
        a copy that only merges never makes any; until the next exchange the table stays as it was handed out last.
        """
        return _opened(self._table)

    def _now(self) -> np.ndarray:
        """The table with what was noted since the last exchange; may be the table itself."""
        if "_counts" not in self.__dict__:
            return self._table
        return np.ascontiguousarray(np.array(self._counts[0]).reshape(-1, 2).T)

    def _fade(self, keep: float) -> None:
        """Multiply everything by ``keep``.

        Entries are stored times a weight, which grows as they fade, so that what only fades does not change. Past a
        million it starts anew.
        """
        if self._weight <= 1e6 * keep:
            self._weight /= keep
            return
        scale, self._weight = keep / self._weight, 1.0
        noted, now = "_counts" in self.__dict__, self._now()
        self._table = self._table * scale
        if noted:
            self._counts = _opened(now * scale)

    def step(self) -> None:
        """Let everything fade by one step."""
        self._steps += 1
        self._weight /= self.discount
        if self._weight > 1e6:
            self._fade(1.0)

    def look_up(self, memory: dict[Any, Any], place: Place) -> Seen:
        """Return what is known of drafts at a place; all zero where no token comes before.

        That is the length of the longest suffix seen before in this sequence, negative if the latest draft after it was
        not accepted; then the shrunk excess acceptance after the last token and the last two.
        """
        longest, latest = 0, True
        keys, i, j = place
        for key in keys:
            found = memory.get(key)
            if found is None:
                break
            longest += 1
            latest = found
        weight, (counts, totals) = self._weight, self._counts
        mean = totals[1] / totals[0] if totals[0] else 0.0
        one = two = 0.0
        if i >= 0:
            n = counts[2 * i]
            one = (counts[2 * i + 1] - mean * n) / (n + SHRINK_SINGLE * weight)
        if j >= 0:
            n = counts[2 * j]
            two = (counts[2 * j + 1] - mean * n) / (n + SHRINK_PAIR * weight)
        return longest if latest else -longest, one, two

    @staticmethod
    def remember(memory: dict[Any, Any], place: Place, hit: bool) -> None:
        """Note whether the draft at a place was accepted, for the sequence alone."""
        for key in place[0]:
            memory[key] = hit

    def note(self, memory: dict[Any, Any], place: Place, hit: bool) -> None:
        """Note whether the draft at a place was accepted."""
        keys, i, j = place
        for key in keys:
            memory[key] = hit
        weight, (counts, totals) = self._weight, self._counts
        if i >= 0:
            counts[2 * i] += weight
            totals[0] += weight
            if hit:
                counts[2 * i + 1] += weight
                totals[1] += weight
        if j >= 0:
            counts[2 * j] += weight
            if hit:
                counts[2 * j + 1] += weight

    def table(self) -> np.ndarray:
        """Tested and accepted drafts per bucket, shape (2, SINGLES + PAIRS)."""
        return self._now() / self._weight

    def state(self) -> State:
        """The table and what its entries have to be divided by: so a merge changes no more entries than it adds to."""
        return {"history.table": self._now().copy(), "history.weight": np.array(self._weight)}

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        table = check_array(state, "history.table", SHAPE)
        weight = float(check_array(state, "history.weight", ())) if "history.weight" in state else 1.0
        if not weight > 0.0:
            raise PolicyError(f"the state's 'history.weight' must be above zero, got {weight}")
        self._set(np.array(table, dtype=float), weight)

    def take_delta(self) -> State:
        """Buckets that changed since the last call, by how much, and over how many steps."""
        now = self._now()
        delta = (now - self._table) / self._weight
        index = np.flatnonzero(np.abs(delta[0]) > 1e-12).astype(np.uint16)
        steps, self._steps, self._table = self._steps, 0, now
        return {"history.index": index, "history.sums": delta[:, index], "history.count": np.array(float(steps))}

    def merge(self, delta: State) -> None:
        """Add what another copy handed out, as if its steps had come after this one's."""
        index, sums, count = _read(delta)
        noted = "_counts" in self.__dict__
        own = (self._now() - self._table) / self._weight if noted else 0.0
        self._fade(self.discount**count)
        now = self._now()
        index = index.astype(np.intp)
        for row, more in zip(now, sums * self._weight, strict=True):  # both at once take many times as long
            row[index] += more
        if noted:  # what is not handed out yet fades by others' steps here, and where it is added later
            self._table = now - own * self._weight
            self._counts = _opened(now)


def _opened(table: np.ndarray) -> tuple[array[float], list[float]]:
    return array("d", table.T.tobytes()), table[:, :SINGLES].sum(axis=1).tolist()


def _read(delta: State) -> tuple[np.ndarray, np.ndarray, float]:
    """Return buckets, sums and the number of steps of a delta; nothing for one without them."""
    if "history.index" not in delta:
        return np.empty(0, dtype=int), np.empty((2, 0)), 0.0
    index = np.asarray(delta["history.index"])
    if (
        index.ndim != 1
        or index.dtype.kind not in "iu"
        or (len(index) and not 0 <= index.min() <= index.max() < SHAPE[1])
    ):
        raise PolicyError(
            "the delta's 'history.index' holds no buckets of the table: merge deltas of the same policy only"
        )
    return index, check_array(delta, "history.sums", (2, len(index))), float(check_array(delta, "history.count", ()))
