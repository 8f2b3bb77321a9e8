"""What a decoder with ``remember=`` does: its policy starts from what is stored, and what it learns is stored."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from policies.base import Policy, reason
from policies.guards.fault import FaultGuard, Wrapper
from policies.guards.safety import SafetyGuard
from policies.registry import canonical
from speckv_online.decoding.generation import Generation
from speckv_online.drafters.base import Drafter
from speckv_online.errors import UserError
from speckv_online.learned.identity import Identity
from speckv_online.learned.key import Key
from speckv_online.learned.record import Record
from speckv_online.learned.store import Store
from speckv_online.learned.sums import sums_of

log = logging.getLogger(__name__)

#: Seconds between writes. What came after the latest one is written when the decoder or the process ends.
EVERY = 5.0


class Memory:
    """Keeps what a decoder's policy learns.

    Nothing that goes wrong here stops decoding: then nothing more is remembered, and one line says why.

    Parameters
    ----------
    policy : FaultGuard
        The decoder's policy; it belongs to this decoder alone.
    name : str
        The policy's part of the key, see :func:`policy_name`.
    spec : str
        How to build the policy, for people; may be empty.
    """

    def __init__(self, policy: FaultGuard, name: str, spec: str = "") -> None:
        self._identity = Identity()
        self._name = name
        self._keeper = Keeper(policy, spec)
        # The keeper lives on until then, and this object does not: it may go earlier than the process.
        weakref.finalize(self, self._keeper.save)

    @property
    def steps(self) -> int:
        """Steps in the stored state that the policy last read or wrote."""
        return 0 if self._keeper.record is None else self._keeper.record.steps

    @property
    def key(self) -> str:
        """Name of that state; empty before the first call."""
        return "" if self._keeper.record is None else self._keeper.record.key.name

    def begin(
        self,
        target: PreTrainedModel,
        draft: Drafter | PreTrainedModel | None,
        level: str,
        rows: int = 1,
        engine: str = "",
    ) -> None:
        """Have the policy start from what is stored for a call with these models, unless it did already."""
        with _harmless(self._keeper):
            key = self._identity.key(self._name, target, draft, level, rows, engine)
            names = {"target": _source(target), "draft": _source(getattr(draft, "model", draft))}
            self._keeper.begin(key, names)

    def end(self, answers: Iterable[Generation]) -> None:
        """Note what a call gave, and write if the latest write is some seconds ago."""
        for answer in answers:
            self._keeper.steps += len(answer.steps)
            self._keeper.tokens += len(answer.tokens)
        if time.monotonic() - self._keeper.saved >= EVERY:
            self.save()

    def save(self) -> None:
        """Write what is not written yet."""
        self._keeper.save()


class Keeper:
    """The part of a memory that outlives it, until all is written."""

    def __init__(self, policy: FaultGuard, spec: str) -> None:
        self.policy, self.spec, self.store = policy, spec, Store()
        self.record: Record | None = None
        self.fresh: Policy | None = None
        self.process = os.getpid()
        self.off = False
        self.saved = time.monotonic()
        self.steps = self.tokens = 0  # since the latest write

    def begin(self, key: Key, names: dict[str, str]) -> None:
        """Change over to a key."""
        if self.off:
            return
        if self.process != os.getpid():  # a fork: its parent writes what came before
            self.policy.take_delta()
            self.process, self.steps, self.tokens = os.getpid(), 0, 0
            if self.record is not None:
                self.record.seen = "before the fork"
        if self.record is not None and self.record.key == key:
            return
        if self.fresh is None:
            self.fresh = copy.deepcopy(self.policy)
        self.save()
        record = Record(self.store, key, self.fresh, {"spec": self.spec, "names": names})
        state = record.read()
        if state:
            self.policy.load_state_dict(state)
            start_run(self.policy)
        elif self.record is not None and not _alike(self.record.key, key):
            self.policy.load_state_dict(self.fresh.state_dict())
        self.record = record

    def save(self) -> None:
        """Write what is not written yet."""
        record = self.record
        if record is None or self.off or not self.steps or self.process != os.getpid():
            return
        self.saved = time.monotonic()
        with _harmless(self):
            with self.store.locked():
                delta, state = self.policy.take_delta(), self.policy.state_dict()
                merged = record.add([delta], state, self.steps, self.tokens, exact=True)
            self.steps = self.tokens = 0
            if merged:
                self.policy.load_state_dict(sums_of(merged))


@contextlib.contextmanager
def _harmless(keeper: Keeper) -> Iterator[None]:
    """Remember nothing more where something goes wrong: decoding goes on."""
    try:
        yield
    except Exception as error:  # files, and other people's policies
        keeper.off = True
        why = reason(error) or type(error).__name__
        log.warning("nothing more of what is learnt is remembered: %s", why)


def start_run(policy: Policy) -> None:
    """Tell the safety guard, where there is one, that a run begins with a state of an earlier one."""
    while isinstance(policy, Wrapper):
        if isinstance(policy, SafetyGuard):
            policy.start_run()
        policy = policy.policy


def _alike(a: Key, b: Key) -> bool:
    """Whether two keys differ in the number of rows only."""
    return replace(a, rows=b.rows) == b


def _source(model: Any) -> str:
    """Name of a model, or of another drafter, for people."""
    if isinstance(model, PreTrainedModel):
        return Path(str(model.config._name_or_path)).name or type(model).__name__
    return "none" if model is None else type(model).__name__


def policy_name(given: Policy | str, policy: FaultGuard, remember: bool | str) -> str:
    """Return the policy's part of keys.

    Parameters
    ----------
    given : Policy or str
        What the decoder was given.
    policy : FaultGuard
        What it made of that.
    remember : bool or str
        As for :class:`~speckv_online.decoding.decoder.SpeculativeDecoder`.

    Raises
    ------
    UserError
        If a policy of one's own has no name.
    """
    if isinstance(remember, str) and remember.strip():
        inner: Policy = policy
        while isinstance(inner, Wrapper):
            inner = inner.policy
        return f"{remember.strip()} ({type(inner).__module__}.{type(inner).__qualname__})"
    if not isinstance(given, str):
        raise UserError('remember=True needs the policy\'s spec: give policy="online", or a name, remember="NAME"')
    return canonical(given)


def make_memory(given: Policy | str, policy: FaultGuard, remember: bool | str) -> Memory | None:
    """Return a decoder's memory, None where ``remember`` is False or empty; see :func:`policy_name`."""
    if not remember:
        return None
    return Memory(policy, policy_name(given, policy, remember), given if isinstance(given, str) else "")
