"""A long prompt is read by the draft model only where that pays, in what is left of the text."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from policies.base import Context, Draft, Outcome
from policies.costs.level_costs import LevelCosts
from policies.costs.prior import CostPrior
from policies.costs.reading import Reading, Readings
from policies.guards.safety import SafetyGuard
from policies.learned.online import Online
from policies.registry import make_policy
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace
from tests.support.made_traces import made_trace

#: A token that the draft reads takes a twentieth of a step without drafting.
COST = LevelCost(0.0005, (0.01, 0.0102), 0.0002, catch_up_seconds=0.0005)
PRIOR = CostPrior(0.0005, (0.01, 0.0102), 0.0002, catch_up_seconds=0.0005)


def text(prompt: int, budget: int, number: int = 6) -> Trace:
    """A made trace with a prompt of so many tokens that no lookup finds anything in."""
    return replace(made_trace(number, length=budget), prompt=np.arange(10_000, 10_000 + prompt, dtype=np.int32))


def told(spec: str = "online") -> SafetyGuard:
    policy = make_policy(spec)
    assert isinstance(policy, SafetyGuard)
    policy.set_costs("fp16", PRIOR)
    return policy


def play(policy: SafetyGuard, trace: Trace) -> tuple[int, float]:
    """Return in how many steps tokens were drafted, and the seconds of the draft's reading."""
    replay = Simulator(policy, CostTable("made", {"fp16": COST})).replay(trace)
    drafting = replay.proposed > 0
    spent = COST.draft_seconds * replay.proposed + np.array(COST.verify_seconds)[np.minimum(replay.drafted, 16)]
    return int(drafting.sum()), float((replay.seconds - spent - COST.overhead_seconds).sum())


@pytest.mark.parametrize(("prompt", "budget", "read"), [(1000, 64, False), (1000, 900, True), (50, 64, True)])
def test_a_long_prompt_is_read_only_for_a_long_output(prompt: int, budget: int, read: bool) -> None:
    policy = told()
    for number in (3, 7):  # texts with short prompts come before
        play(policy, text(20, 40, number))
    drafted, reading = play(policy, text(prompt, budget))
    assert (drafted > 5) == read
    assert reading == pytest.approx(
        COST.catch_up_seconds * prompt if read else 0.0, abs=0.1 * COST.catch_up_seconds * prompt
    )


def test_what_was_not_worth_reading_costs_nothing() -> None:
    """No probe reads it either, however many there are, and nothing is held against the policy."""
    policy = told("online:lookups=off")
    assert [play(policy, text(1000, 64, number)) for number in range(20)] == [(0, pytest.approx(0.0))] * 20
    assert policy.ledger("fp16").interventions == 0
    assert play(policy, text(20, 64, 9))[0] > 10  # a short prompt is still read


def test_where_nothing_is_known_of_reading_the_draft_is_asked() -> None:
    policy = make_policy("online")
    drafted, _ = play(policy, text(1000, 64))  # type: ignore[arg-type]
    assert drafted > 0


@pytest.mark.parametrize(("catch_up", "tokens"), [(0.0005, 60.0), (0.01, 8.0), (0.0, math.inf)])
def test_reading_is_weighed_where_it_is_dear(catch_up: float, tokens: float) -> None:
    """But not that of a few tokens, which is within the noise of a forward."""
    assert LevelCosts(CostPrior(0.0005, (0.01, 0.0102), catch_up_seconds=catch_up)).dear == pytest.approx(tokens)


def test_it_is_learnt_what_the_draft_brings() -> None:
    """A text of 64 tokens is worth a reading of some 13 steps beforehand, of more with a better draft."""
    reading = Reading()
    assert reading.pays(8.0, 64)
    assert not reading.pays(16.0, 64)
    assert reading.pays(16.0, 1 << 62)
    assert not reading.pays(100.0, 1 << 62)  # a text does not go on for ever
    good, bad, found = Reading(), Reading(), Reading()
    for _ in range(100):
        good.add(False, 2, 1.0)
        bad.add(False, 1, 1.1)
        found.add(True, 3, 2.0)  # lookups bring as much as a usual draft
    assert good.pays(16.0, 64)
    assert not bad.pays(8.0, 64)
    assert not found.pays(8.0, 64)
    for _ in range(2000):  # of texts that nobody read nothing is known for ever
        bad.add(True, 1, 1.0)
    assert bad.pays(8.0, 64)


def test_what_was_learnt_of_reading_is_kept_and_shared() -> None:
    """Two workers that exchange what they saw know, about, what one would that saw it all; nothing is told twice."""
    rng, one, workers, shared = np.random.default_rng(0), Readings(), (Readings(), Readings()), Readings()
    for step in range(600):
        unread, tokens, steps = bool(rng.random() < 0.4), int(rng.integers(1, 5)), float(rng.uniform(0.9, 2.0))
        one.level("nf4").add(unread, tokens, steps)
        workers[step % 2].level("nf4").add(unread, tokens, steps)
        if step % 20 == 19:
            deltas = [worker.take_delta() for worker in workers]
            for i, delta in enumerate(deltas):
                workers[1 - i].merge(delta)
                shared.merge(delta)
    (expected,) = one.state().values()
    for known in (*workers, shared):
        (found,) = known.state().values()
        assert found == pytest.approx(expected, rel=0.03)
    assert not np.any(shared.take_delta()["reading.nf4"][[0, 1, 3, 4]])  # that is others', who know it
    again = Readings()
    again.load(one.state())
    assert again.state()["reading.nf4"] == pytest.approx(expected)
    assert not again.take_delta()["reading.nf4"].any()


def test_a_policy_keeps_what_it_learnt_of_reading() -> None:
    policy = Online()
    policy.set_costs("fp16", PRIOR)
    for number in range(10):
        Simulator(SafetyGuard(policy), CostTable("made", {"fp16": COST})).replay(text(20, 40, number))
    copy, other = Online(), Online()
    copy.load_state_dict(policy.state_dict())
    other.set_costs("fp16", PRIOR)
    other.merge(policy.take_delta())
    kept = policy.readings.level("fp16")
    assert kept.asked.tokens > 100
    for found in (copy, other):
        assert found.readings.level("fp16").asked.tokens == pytest.approx(kept.asked.tokens)


def test_lookups_are_drafted_all_the_same() -> None:
    policy = Online()
    policy.set_costs("fp16", PRIOR)
    context = Context("fp16", remaining=64, unread=1000, drafters=("model", "ngram"), lookup_alternative=0.9)
    decision = policy.decide(context)
    assert (decision.drafter, decision.ask_at_submit) == ("ngram", True)
    assert policy.decide(replace(context, lookup_alternative=0.0)).gamma == 0
    # A drafter that looks up by itself: until it would ask its model.
    decision = policy.decide(replace(context, lookup_confidence=0.9, lookup_alternative=0.0))
    assert decision.ask_per_token
    assert policy.proceed(decision, Draft(1, np.zeros((1, 4)), [5], [0.9, 0.9]))
    assert not policy.proceed(decision, Draft(2, np.zeros((2, 4)), [5, 6], [0.9, 0.9, 0.0]))
    policy.learn(decision, Outcome(2, 2, 2, 3, 0.011, 0.0, 0.0103, signals=np.zeros((2, 4)), forwards=0))
