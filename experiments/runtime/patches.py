"""What changed in a merged state since a worker took it over last: large arrays go back as their changed entries only.

A merge changes every entry of the small sums (they fade), but few of a large table's. So the learner keeps, for each
entry of the large arrays, the version at which it changed last, and a worker that says which version it has is sent
those after it. The worker puts them into its copy, which is then equal to the learner's, bit by bit. A worker for whom
nearly all has changed (it is new, or the learner was restarted meanwhile) gets whole arrays in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from policies.base import State

#: Arrays of fewer entries are always sent whole.
LARGE = 1024


class Patch(NamedTuple):
    """New values of some entries of an array; ``where`` counts entries in C order."""

    where: np.ndarray
    values: np.ndarray


#: A state in which patches stand for some of the arrays.
Reply: TypeAlias = dict[str, np.ndarray | Patch]


class Changes:
    """A policy's merged state, and when each entry of its large arrays changed last.

    Parameters
    ----------
    version : int
        Version of the state. What changed before it is not known, which is taken for all.
    state : State
        The arrays; they are kept and must not be written to.
    """

    def __init__(self, version: int, state: State) -> None:
        self.version, self.state = version, state
        self._changed: dict[str, np.ndarray] = {}

    def note(self, version: int, state: State) -> None:
        """Take in the state of the next version."""
        for name, new in state.items():
            if new.size >= LARGE:
                old, changed = self.state.get(name), self._changed.get(name)
                if changed is None:
                    changed = self._changed[name] = np.full(new.size, self.version, np.int32)
                if old is None or old.shape != new.shape or old.dtype != new.dtype:
                    self._changed[name] = np.full(new.size, version, np.int32)
                else:
                    changed[(old != new).ravel()] = version
        self.version, self.state = version, state

    def since(self, version: int) -> Reply:
        """Return the state, to be read only: for a worker that has ``version`` (0 for none), see :func:`patched`."""
        if not 0 < version <= self.version:
            return dict(self.state)
        return {name: self._patch(name, array, version) for name, array in self.state.items()}

    def _patch(self, name: str, array: np.ndarray, version: int) -> np.ndarray | Patch:
        if array.size < LARGE:
            return array
        changed = self._changed.get(name)
        if changed is None:  # nothing was merged since this object was made
            changed = np.full(array.size, self.version, np.int32)
        later, code = changed > version, np.min_scalar_type(array.size)
        if np.count_nonzero(later) * (code.itemsize + array.itemsize) >= array.nbytes:
            return array
        where = np.flatnonzero(later).astype(code)
        return Patch(where, array.ravel()[where])


def patched(known: State, reply: Mapping[str, np.ndarray | Patch]) -> State:
    """Return the merged state, given the one that came with the version before; neither argument is changed."""
    found: State = {}
    for name, part in reply.items():
        if isinstance(part, Patch):
            array = np.array(known[name])
            array.reshape(-1)[part.where] = part.values
            found[name] = array
        else:
            found[name] = part
    return found
