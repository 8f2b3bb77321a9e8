"""What a worker takes over from earlier runs (``--remember``), and what it adds to that."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

from policies.base import Policy, State, reason
from policies.registry import canonical
from speckv_online.learned.identity import Identity
from speckv_online.learned.memory import start_run
from speckv_online.learned.record import Record
from speckv_online.learned.store import Store
from speckv_online.learned.sums import sums_of
from speckv_online.models.pairs import LoadedPair

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Learnt:
    """What a policy learnt in a unit, until it is written; and whether it ever handed something out."""

    record: Record
    deltas: list[State] = field(default_factory=list)
    shares: bool = False


class Remembered:
    """The states of one worker's level, as they were when the worker started; every order of a run starts from those.

    Parameters
    ----------
    pair : LoadedPair
        The worker's models.
    level : str
        The level's name.
    """

    def __init__(self, pair: LoadedPair, level: str) -> None:
        self.pair, self.level = pair, level
        self._store, self._identity = Store(), Identity()
        self._started: dict[str, tuple[State, int]] = {}
        self._failed = False

    def start(self, spec: str, policy: Policy) -> tuple[Learnt, State]:
        """Have a new policy start from what is stored; return where it learns to, and the sums in it."""
        name = canonical(spec)
        key = self._identity.key(name, self.pair.target, self.pair.drafter, self.level)
        names = {role: Path(self.pair.revision[role]).name for role in ("target", "draft")}
        record = Record(self._store, key, copy.deepcopy(policy), {"spec": spec, "names": names})
        if name not in self._started:
            self._started[name] = record.read(), record.steps
        state = self._started[name][0]
        if state:
            policy.load_state_dict(copy.deepcopy(state))
            start_run(policy)
        return Learnt(record), sums_of(state)

    def add(self, learnt: Learnt, state: State, steps: int, tokens: int) -> None:
        """Write what a unit taught. Where that fails the run goes on, and one line says so."""
        deltas, learnt.deltas = learnt.deltas, []
        learnt.shares |= bool(deltas)
        if self._failed or (learnt.shares and not deltas):
            return
        try:
            with self._store.locked():
                learnt.record.add(deltas, state, steps, tokens, exact=False)
        except Exception as error:  # files, and other people's policies
            self._failed = True
            log.warning("nothing more of what is learnt is remembered: %s", reason(error))

    def steps(self) -> dict[str, int]:
        """Return how many steps each policy had learnt from before the run."""
        return {name: steps for name, (_, steps) in self._started.items() if steps}
