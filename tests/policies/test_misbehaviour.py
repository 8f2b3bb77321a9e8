"""Nothing that a policy does changes a token, or ends a text."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.base import Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.guards.fault import FaultGuard
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from tests.support.decoding import plain, prompt_of
from tests.support.tiny_models import TinyPair, perturbed

NONSENSE = (None, -1, 2.5, 10**9, float("nan"), "ngram", "nobody", [], np.array([1, 2]), True, object())
ACTS = st.tuples(st.sampled_from(("raise", "exit", "nonsense", "write", "fine")), st.integers(0, 10))


class Vandal(Policy):
    """Does what it is told: raises, exits, answers nonsense, or writes to all that it is given."""

    def __init__(self, acts: list[tuple[str, int]]) -> None:
        super().__init__()
        self.acts, self.calls = acts or [("fine", 0)], 0

    def act(self, fine: Any, *given: Any) -> Any:
        act, number = self.acts[self.calls % len(self.acts)]
        self.calls += 1
        if act == "raise":
            raise (ValueError, KeyError, AttributeError, MemoryError, RecursionError)[number % 5]("on purpose")
        if act == "exit":
            sys.exit(number)
        if act == "nonsense":
            return NONSENSE[number]
        if act == "write":
            for thing in given:
                for name in getattr(thing, "__dataclass_fields__", ()):
                    setattr(thing, name, NONSENSE[number])
                for name in ("tokens", "lookups"):
                    if isinstance(found := getattr(thing, name, None), list):
                        found.clear()
        return fine

    def begin(self, context: Context) -> None:
        self.act(None, context)

    def decide(self, context: Context) -> Decision:
        limit, drafters = context.max_gamma, context.drafters
        decision = Decision(self.new_id(), min(5, limit), ask_per_token=True)
        found = self.act(decision, context)
        if found is decision or self.calls % 2:
            return found
        return Decision(self.new_id(), found, True, drafter=drafters[-1] if drafters else "")

    def proceed(self, decision: Decision, draft: Draft) -> Any:
        return self.act(True, decision, draft)

    def submit(self, decision: Decision, draft: Draft) -> Any:
        return self.act(draft.drafted, decision, draft)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.act(None, decision, outcome)

    def state_dict(self) -> Any:
        return self.act({"x": np.zeros(2)})

    def take_delta(self) -> Any:
        return self.act({})

    def info(self) -> Any:
        return self.act({})

    def merge(self, delta: State) -> None:
        self.act(None)

    def load_state_dict(self, state: State) -> None:
        self.act(None)

    def pmf(self, context: Context) -> Any:
        return self.act(None, context)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(ACTS, min_size=1, max_size=12), batch=st.booleans())
def test_random_misbehaviour_changes_no_token(tiny_pair: TinyPair, acts: list[tuple[str, int]], batch: bool) -> None:
    drafter, prompts = ModelDrafter(perturbed(tiny_pair.target, 0.02), 260), [prompt_of(9, 4), prompt_of(12, 1)]
    decoder = SpeculativeDecoder(drafter, policy=Vandal(acts), target=tiny_pair.target)
    if batch:
        found = decoder.decode_batch(prompts, 14, eos_ids=())
    else:
        found = [decoder.generate(p, 14, eos_ids=()) for p in prompts]
    assert [out.tokens for out in found] == [plain(tiny_pair.target, p, 14) for p in prompts]
    for out in found:
        assert sum(step.produced for step in out.steps) == 14
        assert all(0 <= step.accepted <= step.drafted <= 16 for step in out.steps)


@settings(max_examples=300, deadline=None)
@given(acts=st.lists(ACTS, min_size=1, max_size=6))
def test_states_of_a_policy_that_misbehaves(acts: list[tuple[str, int]]) -> None:
    guard = FaultGuard(Vandal(acts))
    for _ in range(3):
        for state in (guard.state_dict(), guard.take_delta()):
            assert all(np.asarray(value).dtype.kind in "fiub" for value in state.values())
        assert isinstance(guard.info(), dict)
        guard.merge({})
        guard.pmf(Context())
        with suppress(PolicyError):
            guard.load_state_dict({"x": np.zeros(2)})


def test_an_interrupt_is_the_user_s() -> None:
    class Interrupted(Policy):
        def decide(self, context: Context) -> Decision:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FaultGuard(Interrupted()).decide(Context())
