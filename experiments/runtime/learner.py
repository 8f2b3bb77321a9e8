"""The learner: adds up what workers observed, each batch exactly once, and hands the merged statistics back."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Condition, Lock
from time import sleep
from typing import NamedTuple

import numpy as np

from experiments.runtime.call_watch import CallWatch, PolicyGivenUp
from experiments.runtime.patches import Changes, Reply
from policies.base import Policy, PolicyError, State
from policies.registry import make_policy, policy_class
from speckv_online.errors import UserError
from speckv_online.io.run_directory import load_arrays, save_arrays


class Key(NamedTuple):
    """A policy in one seeded order of the prompts; ``scope`` is who learns together: all (empty), a level, a worker."""

    spec: str
    seed: int
    scope: str = ""


class Merged(NamedTuple):
    """Version (number of batches in it) and state of a policy, for :func:`~experiments.runtime.patches.patched`."""

    version: int
    state: Reply


class Batches:
    """Which batches were added: by source, how many from 0 on without a gap, and those that came ahead of others.

    Adding and asking take the same time however many there are.
    """

    def __init__(self, packed: Mapping[str, list[int]] | None = None) -> None:
        self.counts = {source: first for source, (first, *_) in (packed or {}).items()}
        self.ahead = {source: set(rest) for source, (_, *rest) in (packed or {}).items() if rest}
        self.total = sum(self.counts.values()) + sum(map(len, self.ahead.values()))

    def __len__(self) -> int:
        return self.total

    def __contains__(self, batch: tuple[str, int]) -> bool:
        source, i = batch
        return 0 <= i < self.counts.get(source, 0) or i in self.ahead.get(source, ())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for source, (first, *rest) in self.packed().items():
            yield from ((source, i) for i in [*range(first), *rest])

    def add(self, source: str, i: int) -> None:
        """Note a batch that was not there."""
        self.total += 1
        first, ahead = self.counts.get(source, 0), self.ahead.setdefault(source, set())
        ahead.add(i)
        while first in ahead:
            ahead.remove(first)
            first += 1
        self.counts[source] = first
        if not ahead:
            del self.ahead[source]

    def packed(self) -> dict[str, list[int]]:
        """Return what makes this object again, ready for JSON."""
        return {source: [first, *sorted(self.ahead.get(source, ()))] for source, first in self.counts.items()}


#: Source of the batch that is the state which a policy starts from.
START = "start"
#: Seconds that a checkpoint waits for more batches, where several workers call at a time.
GATHER = 0.01
#: Marks the learner's own arrays in a checkpoint, beside those of the policy.
_OWN = "learner."


class Learner:
    """Merges the statistics of all workers, and writes a checkpoint before it confirms a batch.

    A batch is named by its source (a level and a prompt) and a sequence number, so that a batch which is sent twice
    (a call that was retried, a prompt that another worker decoded again) counts once.

    Several threads may call at a time. While one of them writes a checkpoint, others merge; the next checkpoint then
    confirms all of theirs (group commit), so that a busy learner does not wait for the disk once per batch. What it
    hands back is the state of the latest checkpoint: workers never hold anything that a crash could take back, and the
    work of making a state out of the sums is shared as well.

    Parameters
    ----------
    folder : Path
        Where checkpoints ``policy-*.npz`` go; those that are there are taken up.
    watch : CallWatch, optional
        Is told of each call of a policy.

    Attributes
    ----------
    refused : dict
        Specs of policies whose methods failed here, and how: nothing of theirs is merged any more, and who asks for it
        is told by :class:`~experiments.runtime.call_watch.PolicyGivenUp`.
    """

    def __init__(self, folder: str | Path, watch: CallWatch | None = None) -> None:
        self.folder, self.watch = Path(folder), watch
        self.refused: dict[str, str] = {}
        self.policies: dict[Key, Policy] = {}
        self.applied: dict[Key, Batches] = {}
        self.changes: dict[Key, Changes] = {}
        self._merging, self._saving, self._busy = Lock(), Condition(), False
        self._merges = 0  # of all policies
        self._saved = 0  # how many of them are on disk, or known to be lost
        self._lost: deque[tuple[int, int, UserError]] = deque(maxlen=64)  # first and last merge, and why
        self._dirty: set[Key] = set()
        self._crowded = False  # whether the last checkpoint confirmed more than one batch

    def sync(
        self,
        source: str,
        sequence: int,
        deltas: Mapping[Key, State],
        whole: bool = False,
        known: Mapping[Key, int] | None = None,
    ) -> dict[Key, Merged]:
        """Add a batch, unless it was added before, and return the merged state of every policy in it.

        Parameters
        ----------
        source, sequence : str, int
            Name of the batch. One whose source is :data:`START` is a state to start from, whatever its number: it is
            taken only by a policy that nothing was added to.
        deltas : mapping of Key to State
            What :meth:`~policies.base.Policy.take_delta` gave; empty to ask for the state only.
        whole : bool
            The arrays are whole states that replace what is there, not sums that are added to it.
        known : mapping of Key to int, optional
            The version that the caller has of a policy: of large arrays it is sent what changed since.

        Returns
        -------
        dict
            For each policy the version of its latest checkpoint, which is the number of batches in it, this one
            included, and its state (``{}`` at version 0). Where no version is known to the caller, the state holds
            whole arrays only.
        """
        with self._merging:
            self._check(deltas)
            for key, delta in deltas.items():
                if not delta or (source == START and len(self._applied(key))):
                    continue
                if (source, sequence) not in self._applied(key):
                    policy = self.policies[key]
                    with self._calling(key, "load_state_dict" if whole else "merge"):
                        (policy.load_state_dict if whole else policy.merge)(delta)
                    self.applied[key].add(source, sequence)
                    self._dirty.add(key)
                    self._merges += 1
            # A batch that was there before may not be on disk yet either.
            ticket = self._merges if self._merges > self._saved else 0
        if ticket:
            self._confirm(ticket)
        merged: dict[Key, Merged] = {}
        with self._merging:
            self._check(deltas)
            for key in deltas:
                if key in self.changes or (self.folder / checkpoint_name(key)).exists():
                    self._applied(key)  # another batch's failure may have dropped it
                    changes = self.changes[key]
                    reply = changes.since((known or {}).get(key, 0)) if changes.version else {}
                    merged[key] = Merged(changes.version, reply)
                else:
                    merged[key] = Merged(0, {})
        return merged

    def _applied(self, key: Key) -> Batches:
        """Return what was added to a policy, which is taken up from its checkpoint at first use."""
        if key not in self.policies:
            with contextlib.suppress(PolicyError):  # making it says the same
                policy_class(key.spec)  # what it imports may take its time
            with self._calling(key, "its constructor"):
                policy, applied = make_policy(key.spec, seed=key.seed), Batches()
            file = self.folder / checkpoint_name(key)
            if file.exists():
                state, applied = read_checkpoint(file)
                with self._calling(key, "load_state_dict"):
                    policy.load_state_dict(state)
            with self._calling(key, "state_dict"):
                known = own_state(policy)
            self.policies[key], self.applied[key] = policy, applied
            self.changes[key] = Changes(len(applied), known)
        return self.applied[key]

    @contextlib.contextmanager
    def _calling(self, key: Key, name: str) -> Iterator[None]:
        """Note a call of a policy. If it fails, the policy is refused from now on, and others go on."""
        calling = self.watch.calling(name) if self.watch else contextlib.nullcontext()
        if self.watch and self.watch.policy != key.spec:
            self.watch.about(key.spec, "in the learner")
        try:
            with calling:
                yield
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())[:300]
            self._refuse(key.spec, f"{name} raised {type(error).__name__} in the learner: {said}")
            raise PolicyGivenUp(key.spec, self.refused[key.spec]) from error
        except BaseException:
            self._refuse(key.spec, f"{name} did not end as it should")
            raise

    def _refuse(self, spec: str, reason: str) -> None:
        self.refused.setdefault(spec, reason)
        self._dirty = {key for key in self._dirty if key.spec != spec}

    def _check(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if key.spec in self.refused:
                raise PolicyGivenUp(key.spec, self.refused[key.spec])

    def _confirm(self, ticket: int) -> None:
        """Return once the first ``ticket`` merges are on disk; raises :class:`UserError` if they cannot be."""
        with self._saving:
            # All that a checkpoint confirms go on at once; one of the others writes the next, for all that came since.
            self._saving.wait_for(lambda: ticket <= self._saved or not self._busy)
            mine = ticket > self._saved
            self._busy |= mine
        if mine:
            try:
                self._save()
            finally:
                with self._saving:
                    self._busy = False
                    self._saving.notify_all()
        for first, last, error in list(self._lost):
            if first <= ticket <= last:
                raise error

    def _save(self) -> None:
        """Write checkpoints of all policies that changed; from then on they are what workers are sent."""
        if self._crowded:
            sleep(GATHER)
        with self._merging:
            first, last = self._saved + 1, self._merges
            states: dict[Key, tuple[int, State]] = {}
            for key in sorted(self._dirty):
                with contextlib.suppress(PolicyGivenUp), self._calling(key, "state_dict"):
                    states[key] = len(self.applied[key]), own_state(self.policies[key])
            names = {key: json.dumps(self.applied[key].packed()).encode() for key in states}
            self._dirty.clear()
        try:
            for key, (_, state) in states.items():
                own = {f"{_OWN}applied": np.frombuffer(names[key], np.uint8)}
                save_arrays(self.folder / checkpoint_name(key), state | own)
        except UserError as error:
            with self._merging:  # memory and disk differ now: start again from the checkpoints
                last = self._merges
                self._lost.append((first, last, error))
                self.policies.clear()
                self.applied.clear()
                self.changes.clear()
                self._dirty.clear()
        else:
            with self._merging:
                for key, (version, state) in states.items():
                    self.changes[key].note(version, state)
        self._saved, self._crowded = last, last > first


def own_state(policy: Policy) -> State:
    """Return a policy's state in arrays that nobody writes to: several versions and workers may share them."""
    state = {name: np.array(value) for name, value in policy.state_dict().items()}
    for name, array in state.items():
        if array.dtype.hasobject:
            raise PolicyError(f"its state {name!r} holds Python objects and cannot be saved")
        array.flags.writeable = False
    return state


def checkpoint_name(key: tuple[str, int] | Key) -> str:
    """Return the file name of a policy's checkpoint."""
    key = Key(*key)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", key.spec).strip("-")
    if name != key.spec:  # two specs may read alike once their punctuation is gone
        name += f"-{zlib.crc32(key.spec.encode()):08x}"
    return f"policy-{name}-{key.scope + '-' if key.scope else ''}seed-{key.seed}.npz"


def read_checkpoint(path: str | Path) -> tuple[State, Batches]:
    """Return a policy's state from a checkpoint, and the names of the batches that went into it."""
    arrays = load_arrays(path)
    own = arrays.get(f"{_OWN}applied")
    batches = Batches(json.loads(own.tobytes().decode()) if own is not None else None)
    return {k: v for k, v in arrays.items() if not k.startswith(_OWN)}, batches
