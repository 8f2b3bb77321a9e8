"""The learner: adds up what workers observed, each batch exactly once, and hands the merged statistics back."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from policies.base import Policy, State
from policies.registry import make_policy
from speckv_online.rundir import load_arrays, save_arrays

#: A policy in one seeded order of the prompts: (spec, seed).
Key = tuple[str, int]
#: Version (batches merged so far) and state of a policy.
Merged = tuple[int, State]
#: Marks the learner's own arrays in a checkpoint, beside those of the policy.
_OWN = "learner."


class Learner:
    """Merges the statistics of all workers, and writes a checkpoint after each batch.

    A batch is named by its worker and a sequence number, so that a batch which is sent twice (a worker that was
    restarted, a call that was retried) counts once.

    Parameters
    ----------
    folder : Path
        Where checkpoints ``policy-*.npz`` go; those that are there are taken up.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.policies: dict[Key, Policy] = {}
        self.applied: dict[Key, set[tuple[str, int]]] = {}

    def sync(self, worker: str, sequence: int, deltas: Mapping[Key, State]) -> dict[Key, Merged]:
        """Add a worker's batch, unless it was added before, and return the merged state of every policy in it.

        Parameters
        ----------
        worker, sequence : str, int
            Name of the batch.
        deltas : mapping of (spec, seed) to State
            What :meth:`~policies.base.Policy.take_delta` gave; empty to ask for the state only.

        Returns
        -------
        dict
            For each policy its version, which is the number of batches merged so far, and its state for
            :meth:`~policies.base.Policy.load_state_dict`, which is ``{}`` at version 0.
        """
        merged: dict[Key, Merged] = {}
        for key, delta in deltas.items():
            policy, applied = self._policy(key), self.applied[key]
            if delta and (worker, sequence) not in applied:
                policy.merge(delta)
                applied.add((worker, sequence))
                self._save(key)
            merged[key] = len(applied), policy.state_dict() if applied else {}
        return merged

    def versions(self) -> dict[str, int]:
        """Return the number of batches merged so far, per policy and seed."""
        return {f"{spec} seed {seed}": len(applied) for (spec, seed), applied in self.applied.items()}

    def _policy(self, key: Key) -> Policy:
        if key not in self.policies:
            spec, seed = key
            self.policies[key], self.applied[key] = make_policy(spec, seed=seed), set()
            file = self.folder / checkpoint_name(key)
            if file.exists():
                state, applied = read_checkpoint(file)
                self.policies[key].load_state_dict(state)
                self.applied[key] = {(str(worker), int(sequence)) for worker, sequence in applied}
        return self.policies[key]

    def _save(self, key: Key) -> None:
        names = json.dumps(sorted(self.applied[key]))
        own = {f"{_OWN}applied": np.frombuffer(names.encode(), np.uint8)}
        save_arrays(self.folder / checkpoint_name(key), self.policies[key].state_dict() | own)


def checkpoint_name(key: Key, level: str = "") -> str:
    """Return the file name of a policy's checkpoint; ``level`` for policies whose workers share nothing."""
    spec, seed = key
    name = re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-")
    if name != spec:  # two specs may read alike once their punctuation is gone
        name += f"-{zlib.crc32(spec.encode()):08x}"
    return f"policy-{name}-{level + '-' if level else ''}seed-{seed}.npz"


def read_checkpoint(path: str | Path) -> tuple[State, list[tuple[str, int]]]:
    """Return a policy's state from a checkpoint, and the names of the batches that went into it."""
    arrays = load_arrays(path)
    own = arrays.get(f"{_OWN}applied")
    applied = json.loads(own.tobytes().decode()) if own is not None else []
    return {k: v for k, v in arrays.items() if not k.startswith(_OWN)}, [(w, s) for w, s in applied]
