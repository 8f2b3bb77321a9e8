"""check_policy finds the policies that break a promise, and says which."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from policies.base import ARMS, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.testing import PROMISES, check_policy


class Good(Policy):
    """Moves its gamma by what is accepted, with a little chance; the others each break one promise of it."""

    summary = "for tests"
    learns = True

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.mean, self.new = np.array([2.0, 1.0]), np.zeros(2)

    def decide(self, context: Context) -> Decision:
        gamma = int(self.mean[0] / self.mean[1]) + int(self.rng.integers(2))
        return Decision(self.new_id(), min(gamma, context.max_gamma), ask_per_token=True)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id):
            self.add(np.array([outcome.accepted + 1.0, 1.0]))

    def add(self, more: np.ndarray) -> None:
        self.mean = self.mean + more
        self.new = self.new + more

    def state_dict(self) -> State:
        return {"mean": self.mean.copy()}

    def load_state_dict(self, state: State) -> None:
        if np.shape(state.get("mean", ())) != (2,):
            raise PolicyError("the state lacks two numbers")
        self.mean, self.new = np.array(state["mean"], dtype=float), np.zeros(2)

    def take_delta(self) -> State:
        new, self.new = self.new, np.zeros(2)
        return {"mean": new} if new.any() else {}

    def merge(self, delta: State) -> None:
        self.mean = self.mean + delta.get("mean", 0.0)


class LiveState(Good):
    def add(self, more: np.ndarray) -> None:
        self.mean += more
        self.new = self.new + more

    def state_dict(self) -> State:
        return {"mean": self.mean}


class KeepsUnsent(Good):
    def load_state_dict(self, state: State) -> None:
        new = self.new
        super().load_state_dict(state)
        self.new = new


class WritesIn(Good):
    def merge(self, delta: State) -> None:
        if delta:
            delta["mean"] += self.mean
            self.mean = delta["mean"].copy()


class Secretive(Good):
    def take_delta(self) -> State:
        return {"mean": np.zeros(2)}


class TooLong(Good):
    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 4)


class NoNumber(Good):
    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 0.5)  # type: ignore[arg-type]


class OneId(Good):
    def decide(self, context: Context) -> Decision:
        return Decision(7, 0)


class OddDrafter(Good):
    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 0, drafter="ngram")


class Maybe(Good):
    def proceed(self, decision: Decision, draft: Draft) -> Any:
        return "perhaps"


class Greedy(Good):
    def submit(self, decision: Decision, draft: Draft) -> int:
        return draft.drafted + 1


class Writer(Good):
    def decide(self, context: Context) -> Decision:
        context.context_length += 1
        return super().decide(context)


class Scribbler(Good):
    def proceed(self, decision: Decision, draft: Draft) -> bool:
        draft.signals[:] = 0.0
        return True


class Warns(Good):
    def begin(self, context: Context) -> None:
        warnings.warn("old", DeprecationWarning, stacklevel=1)


class Raises(Good):
    def begin(self, context: Context) -> None:
        raise KeyError("nf4")


class Chance(Good):
    calls: Iterator[int] = itertools.count()

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(next(self.calls) % 7, context.max_gamma))


class Twice(Good):
    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.add(np.array([outcome.accepted + 1.0, 1.0]))


class Spoiler(Good):
    def learn(self, decision: Decision, outcome: Outcome) -> None:
        super().learn(decision, outcome)
        outcome.signals[:] = 0.0


class InOrder(Good):
    latest = 0

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if decision.id < self.latest and decision.id not in self._learnt:
            raise RuntimeError("too late")
        self.latest = decision.id
        super().learn(decision, outcome)


class Objects(Good):
    def state_dict(self) -> State:
        return {"mean": np.array([None, {}])}


class Forgetful(Good):
    def load_state_dict(self, state: State) -> None:
        pass


class Half(Good):
    """Its state lacks what it decides by."""

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.seen = 0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.seen // 10, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.seen += self.first_time(decision.id)


class Trusting(Good):
    def load_state_dict(self, state: State) -> None:
        self.mean, self.new = np.array(state["mean"], dtype=float), np.zeros(2)


class HandsOutTwice(Good):
    def take_delta(self) -> State:
        return {"mean": self.new}


class Table:
    total = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self


class Shares(Good):
    """Its copies learn into one table."""

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.table = Table()

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.table.total % 7, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.table.total += self.first_time(decision.id)

    def state_dict(self) -> State:
        return {"mean": np.array([self.table.total, 0])}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.table.total = int(self.mean[0])


class Liar(Good):
    def pmf(self, context: Context) -> np.ndarray:
        return np.full(len(ARMS), 1.0 / len(ARMS))


class NotOne(Good):
    def pmf(self, context: Context) -> np.ndarray:
        return np.ones(len(ARMS))


#: What breaks, and a part of what is said.
BROKEN: dict[type[Policy], tuple[str, str]] = {
    TooLong: ("legal answers", "gamma 4 where 0 to 3 is allowed"),
    NoNumber: ("legal answers", "gamma 0.5"),
    OneId: ("legal answers", "two decisions have the id 7"),
    OddDrafter: ("legal answers", "the drafter 'ngram', not one of ()"),
    Maybe: ("legal answers", "proceed answered 'perhaps'"),
    Greedy: ("legal answers", "submit answered"),
    Writer: ("legal answers", "decide changed context.context_length"),
    Scribbler: ("legal answers", "the policy changed the signals"),
    Warns: ("legal answers", "it raised DeprecationWarning: old"),
    Raises: ("legal answers", "it raised KeyError: 'nf4'"),
    Chance: ("one seed, one run", "draw from self.rng alone"),
    LiveState: ("states are copies", "what state_dict returned changed"),
    KeepsUnsent: ("states are copies", "keeps what was not handed out yet"),
    WritesIn: ("states are copies", "it raised ValueError"),
    Secretive: ("merges", "changes nothing in another copy"),
    Twice: ("duplicates teach once", "'mean' differs"),
    Spoiler: ("late outcomes", "learn changed an outcome's signals"),
    InOrder: ("late outcomes", "it raised RuntimeError: too late"),
    Objects: ("state of arrays", "'mean', an array of object"),
    Forgetful: ("state of arrays", "'mean' differs"),
    Half: ("restores", "state_dict lacks something"),
    Trusting: ("refuses states", "a state without 'mean' must be refused with a PolicyError, got KeyError"),
    HandsOutTwice: ("merges", "take_delta hands out the same twice"),
    Shares: ("deep copies", "shares something with the original"),
    Liar: ("pmf", "but pmf says 0.125"),
    NotOne: ("pmf", "chances that sum to 1"),
}


def test_a_good_policy_passes() -> None:
    check_policy(Good)
    check_policy(f"{__name__}:Good")


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_promise_is_named(cls: type[Policy]) -> None:
    promise, said = BROKEN[cls]
    with pytest.raises(AssertionError) as found:
        check_policy(cls)
    text = str(found.value)
    assert text.startswith(f"{cls.__name__} breaks the promise {promise!r}: ")
    assert said in text


def test_every_promise_has_a_policy_that_breaks_it() -> None:
    assert {promise for promise, _ in BROKEN.values()} == set(PROMISES)


def test_promises_may_be_skipped() -> None:
    check_policy(Trusting, skip=("refuses states",))
    with pytest.raises(ValueError, match="there is no promise 'magic'"):
        check_policy(Good, skip=("magic",))
    with pytest.raises(PolicyError, match="unknown policy"):
        check_policy("no-such-policy")


def test_no_test_runner_is_needed() -> None:
    code = (
        "import sys; from policies.testing import check_policy; check_policy('online'); print('pytest' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
