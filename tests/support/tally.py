"""A process that keeps what it learns: ``python -m tests.support.tally FOLDER COUNT``. It loads nothing heavy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from policies.base import Context, Decision, Policy, State
from speckv_online.learned.key import Key
from speckv_online.learned.record import Record
from speckv_online.learned.store import Store

KEY = Key("tally", "a" * 16, "b" * 16, "nf4", 1, "a processor, 2 threads", "plain modules")


class Tally(Policy):
    """Counts, in a form that adds up."""

    total = fresh = 0.0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 0)

    def count(self) -> None:
        self.total += 1.0
        self.fresh += 1.0

    def state_dict(self) -> State:
        return {"total": np.array(self.total)}

    def load_state_dict(self, state: State) -> None:
        self.total, self.fresh = float(state["total"]), 0.0

    def take_delta(self) -> State:
        delta, self.fresh = {"total": np.array(self.fresh)}, 0.0
        return delta

    def merge(self, delta: State) -> None:
        self.total += float(delta["total"])


def main(folder: Path, count: int) -> None:
    """Count one step after the other, write each, and say so."""
    record, policy = Record(Store(folder), KEY, Tally(), {}), Tally()
    if state := record.read():
        policy.load_state_dict(state)
    for i in range(count):
        policy.count()
        with record.store.locked():
            merged = record.add([policy.take_delta()], policy.state_dict(), 1, 2, exact=True)
        if merged:
            policy.load_state_dict(merged)
        print(i + 1, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
