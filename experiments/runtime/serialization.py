"""What goes between workers and the learner on Ray: each state as one block of bytes.

A message of a dozen small arrays costs Ray several times what one of a single block does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runtime.call_watch import CallWatch, note_path
from experiments.runtime.learner import Key, Learner, Merged
from experiments.runtime.patches import Patch, Reply
from policies.base import State

#: Name of the learner actor; Ray keeps the names of different jobs apart.
LEARNER = "learner"
#: Arrays start at multiples of so many bytes.
ALIGN = 8
#: Name of an array, what it is (itself, or a part of a patch), its type and its shape.
Entry = tuple[str, str, str, tuple[int, ...]]


class Packed(NamedTuple):
    """The arrays of a state one behind the other, and what they are."""

    layout: tuple[Entry, ...]
    data: bytes


def pack(state: Mapping[str, np.ndarray | Patch]) -> Packed:
    """Return a state as one block."""
    layout: list[Entry] = []
    data: list[Any] = []
    for name, value in state.items():
        parts = value._asdict() if isinstance(value, Patch) else {"whole": value}
        for part, given in parts.items():
            array = np.asarray(given)
            if array.dtype.hasobject:
                raise ValueError(f"array {name!r} holds Python objects and cannot be shared")
            layout.append((name, part, array.dtype.str, array.shape))
            data += np.ascontiguousarray(array), bytes(-array.nbytes % ALIGN)
    return Packed(tuple(layout), b"".join(data))


def unpack(packed: Packed) -> Reply:
    """Return the state again, in arrays that cannot be written to."""
    found: Reply = {}
    start, waiting = 0, None
    for name, part, code, shape in packed.layout:
        dtype = np.dtype(code)
        array = np.ndarray(shape, dtype, packed.data, start)
        start += array.nbytes + -array.nbytes % ALIGN
        if part == "whole":
            found[name] = array
        elif waiting is None:
            waiting = array
        else:
            found[name], waiting = Patch(waiting, array), None
    return found


class LearnerActor(Learner):
    """The learner as an actor: its messages hold a block of bytes for each state.

    A policy that ends its process, or does not come back, is refused: at once if it did not come back, else at the
    second time. Ray restarts the learner in between, and the note of its calls outlives it.

    Parameters
    ----------
    folder : Path
        Where checkpoints go.
    call_seconds : float
        Seconds that a call of a policy may take.
    """

    def __init__(self, folder: str | Path, call_seconds: float = math.inf) -> None:
        if math.isinf(call_seconds):
            super().__init__(folder)
            return
        watch = CallWatch(note_path(folder, LEARNER), call_seconds, interrupts=False, outlived=True)
        super().__init__(folder, watch)
        counts = Counter(call.policy for call in watch.ended)
        for call in watch.ended:
            if call.late or counts[call.policy] > 1:
                self.refused[call.policy] = call.reason(call_seconds)
        watch.__enter__()  # until the process ends

    def exchange(
        self, source: str, sequence: int, deltas: Mapping[Key, Packed], whole: bool, known: Mapping[Key, int]
    ) -> dict[Key, tuple[int, Packed]]:
        """:meth:`~experiments.runtime.learner.Learner.sync` with packed states."""
        states: dict[Key, Any] = {key: unpack(delta) for key, delta in deltas.items()}
        merged = self.sync(source, sequence, states, whole, known)
        return {key: (version, pack(state)) for key, (version, state) in merged.items()}


class RemoteSync:
    """The learner's ``sync`` as a worker calls it: every so many steps, never in each.

    Parameters
    ----------
    learner : actor handle, optional
        A :class:`LearnerActor`; by default the run's own, by its name.
    """

    def __init__(self, learner: Any = None) -> None:
        self.learner = learner

    def __call__(
        self, source: str, sequence: int, deltas: Mapping[Key, State], whole: bool, known: Mapping[Key, int]
    ) -> dict[Key, Merged]:
        import ray

        learner: Any = self.learner or ray.get_actor(LEARNER)
        packed = {key: pack(delta) for key, delta in deltas.items()}
        found = ray.get(learner.exchange.remote(source, sequence, packed, whole, known))
        return {key: Merged(version, unpack(state)) for key, (version, state) in found.items()}
