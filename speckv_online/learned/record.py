"""One key's state: taken up by a process, and added to by any number of them."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import speckv_online
from policies.base import Policy, PolicyError, State
from speckv_online.io.manifest import now
from speckv_online.learned.key import Key
from speckv_online.learned.store import Damaged, Entry, Store
from speckv_online.learned.sums import ledgers

log = logging.getLogger(__name__)


class Record:
    """A key's place in a store, as one process sees it.

    Parameters
    ----------
    store : Store
    key : Key
    fresh : Policy
        A policy of the key's spec that has learnt nothing. It is copied, never changed.
    facts : mapping
        What else the header shall say, for people.
    """

    def __init__(self, store: Store, key: Key, fresh: Policy, facts: Mapping[str, Any]) -> None:
        self.store, self.key, self.fresh, self.facts = store, key, fresh, dict(facts)
        #: The version that this process has read or written last; empty if there was none.
        self.seen = ""
        #: Steps in it.
        self.steps = 0

    def read(self) -> State:
        """Return the stored state, empty if there is none. One that does not fit is set aside."""
        with self.store.locked():
            found = self._read()[0]
        self.seen, self.steps = (found.header["write"], found.header["steps"]) if found else ("", 0)
        return found.state if found else {}

    def _read(self, trial: bool = True) -> tuple[Entry | None, Policy | None]:
        """Return what is stored, and, for a trial, a policy that has taken it up."""
        try:
            found = self.store.read(self.key)
            if found is None or not (trial or found.header["write"] != self.seen):
                return found, None
            policy = copy.deepcopy(self.fresh)
            policy.load_state_dict(copy.deepcopy(found.state))
        except (Damaged, PolicyError) as reason:
            self.store.set_aside(self.key, reason)
            self.seen = ""
            return None, None
        return found, policy

    def add(self, deltas: Iterable[State], state: State, steps: int, tokens: int, *, exact: bool) -> State:
        """Add what a process learnt; call it under :meth:`Store.locked`.

        Parameters
        ----------
        deltas : iterable of State
            What :meth:`~policies.base.Policy.take_delta` gave since the last call; empty ones are left out.
        state : State
            The process's own state.
        steps, tokens : int
            How many it learnt from since the last call.
        exact : bool
            Whether ``state`` is the version seen last with these deltas, and nothing else. It is then written as it
            is, unless others wrote meanwhile. So it always is where there are no deltas: such a policy does not add up.

        Returns
        -------
        State
            The merged state where others wrote meanwhile; empty else.
        """
        found, policy = self._read(trial=not exact)
        deltas = [delta for delta in deltas if delta]
        before: dict[str, Any] = found.header if found else {"write": "", "steps": 0, "tokens": 0, "created": now()}
        merged: State = {}
        if deltas and not (exact and before["write"] == self.seen):
            merged = self._merged(policy, deltas)
        if not (merged or state):  # a policy that learns nothing
            return {}
        header: dict[str, Any] = self.facts | {
            "write": uuid.uuid4().hex, "steps": before["steps"] + steps, "tokens": before["tokens"] + tokens,
            "created": before["created"], "updated": now(), "version": speckv_online.__version__,
        }  # fmt: skip
        self.store.write(self.key, header, merged | ledgers(state) if merged else state)
        self.seen, self.steps = header["write"], header["steps"]
        return merged

    def _merged(self, policy: Policy | None, deltas: list[State]) -> State:
        """Return the state of a policy with deltas added."""
        policy = copy.deepcopy(self.fresh) if policy is None else policy
        for delta in deltas:
            policy.merge(delta)
        return policy.state_dict()
