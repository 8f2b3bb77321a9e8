"""Prompt lookup: which token followed the longest suffix of the context when it occurred before.

The idea is prompt-lookup decoding (Saxena, 2023): text often repeats its own n-grams. Here it serves as a signal for
policies: whether the lookup proposes the token that the draft model proposes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Longest suffix that is looked up.
MAX_N = 4


class NgramIndex:
    """For every n-gram (n = 1 … 4) of a growing context, the token that followed its latest occurrence."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._tail: tuple[int, ...] = ()
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the context."""
        table, tail = self._next, self._tail
        for token in tokens:
            for i in range(len(tail)):
                table[tail[i:]] = token
            tail = (*tail[1 - MAX_N :], token) if len(tail) == MAX_N else (*tail, token)
        self._tail = tail

    def lookup(self, drafted: Sequence[int] = ()) -> tuple[int, int]:
        """Return (token, n) proposed after the context followed by ``drafted``; n is the match length, 0 for none."""
        tail = (*self._tail, *drafted)[-MAX_N:] if drafted else self._tail
        for i in range(len(tail)):
            token = self._next.get(tail[i:])
            if token is not None:
                return token, len(tail) - i
        return -1, 0

    def signal(self, drafted: Sequence[int], token: int) -> float:
        """Signal of a drafted ``token``: match length n if the lookup proposes it too, −n if another, 0 if none."""
        proposed, n = self.lookup(drafted)
        return float(n if proposed == token else -n)
