"""Proposals that cost no forward: the policy is told of them beforehand, and prices them as what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies.base import Context, Decision, Draft, Outcome, Policy
from policies.costs.prior import CostPrior
from policies.guards.safety import SafetyGuard
from policies.learned.online import Online
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.simulate.cost_table import LevelCost
from speckv_online.simulate.simulator import replay_plan
from tests.support.lookups import REPEATING, gate_that
from tests.support.replays import made
from tests.support.tiny_models import TinyPair

SURE, UNSURE = [0.1, 0.97, 9.0, 3.0], [5.0, 0.03, 0.1, -3.0]


class Watching(Policy):
    """Asks to be told of every token, and keeps what it was told."""

    learns = True

    def __init__(self, drafter: str = "") -> None:
        super().__init__(seed=0)
        self.drafter, self.told, self.outcomes = drafter, list[list[float]](), list[Outcome]()

    def decide(self, context: Context) -> Decision:
        self.told.append([context.lookup_confidence])
        return Decision(self.new_id(), 4, ask_per_token=True, drafter=self.drafter, features=len(self.told) - 1)

    def draft_signals(self, decision: Decision, draft: Draft) -> None:
        assert len(draft.lookups) == draft.drafted + 1
        self.told[decision.features] = list(draft.lookups)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        self.draft_signals(decision, draft)
        return True

    def submit(self, decision: Decision, draft: Draft) -> int:
        self.draft_signals(decision, draft)
        return min(draft.drafted, 2)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class Counting(HybridDrafter):
    """Counts the tokens for which the model was asked."""

    asked = 0

    def logits(self) -> Any:
        self.asked += 1
        return super().logits()


def watch(pair: TinyPair, drafter: Drafter, policy: Watching, batch: bool = False) -> Watching:
    decoder = SpeculativeDecoder(drafter, policy=policy, target=pair.target, level="fp32")
    if batch:
        decoder.decode_batch([REPEATING, REPEATING[2:]], 20, eos_ids=())
    else:
        decoder.generate(REPEATING, 24, eos_ids=())
    return policy


@pytest.mark.parametrize("batch", [False, True])
def test_the_policy_is_told_and_forwards_are_counted(tiny_pair: TinyPair, batch: bool) -> None:
    drafter = Counting(tiny_pair.draft, 260, gate=gate_that(False, sure=0.7), skip=0.5)
    policy = watch(tiny_pair, drafter, Watching(), batch)
    told = [p for row in policy.told for p in row]
    assert {round(p, 6) for p in told} == {0.0, 0.7}
    drafted = [row[:-1] for row in policy.told]
    assert [o.forwards for o in policy.outcomes] == [row.count(0.0) for row in drafted]
    if not batch:  # a batch drafts with copies
        assert sum(o.forwards for o in policy.outcomes) == drafter.asked > 0


def test_without_a_gate_or_a_lookup_there_is_nothing_to_tell(tiny_pair: TinyPair) -> None:
    for drafter in (ModelDrafter(tiny_pair.draft, 260), HybridDrafter(tiny_pair.draft, 260, skip=1.0)):
        policy = watch(tiny_pair, drafter, Watching())
        assert not any(p for row in policy.told for p in row)
        assert all(o.forwards >= o.drafted for o in policy.outcomes)
        assert any(o.forwards > o.drafted for o in policy.outcomes)  # dropped ones are counted too
    policy = watch(tiny_pair, NgramDrafter(), Watching())
    assert any(row[0] for row in policy.told)
    assert not any(o.forwards for o in policy.outcomes)


def test_another_drafter_than_the_default_one_is_told_of_itself(tiny_pair: TinyPair) -> None:
    drafter = HybridDrafter(tiny_pair.draft, 260, gate=gate_that(False, sure=0.7), skip=0.5)
    policy = watch(tiny_pair, drafter, Watching("model"))
    assert all(not any(row) for row, o in zip(policy.told, policy.outcomes, strict=True) if o.drafted)
    never = HybridDrafter(tiny_pair.draft, 260, gate=gate_that(False, sure=0.3), skip=0.5)
    policy = watch(tiny_pair, never, Watching("ngram"))
    assert {round(p, 6) for row in policy.told for p in row} == {0.0, 0.3}


def policy_of(prior: CostPrior) -> Online:
    policy = Online(acceptance="none")
    policy.set_costs("nf4", prior)
    return policy


def test_a_free_token_is_drafted_where_a_dear_one_is_not() -> None:
    policy = policy_of(CostPrior(0.2, (0.1, 0.11)))
    for confidence, gamma in ((0.0, 0), (0.9, 16), (0.05, 0)):
        assert policy.decide(Context(level="nf4", lookup_confidence=confidence)).gamma == gamma


def test_the_next_token_is_priced_by_who_proposes_it() -> None:
    table = np.array([SURE] * 16)
    policy = policy_of(CostPrior(0.2, (0.1, 0.11)))
    lookups = [0.9]
    decision = policy.decide(Context(level="nf4", lookup_confidence=lookups[0]))
    for p, goes_on in ((0.8, True), (0.8, True), (0.0, False)):
        lookups = [*lookups, p]
        drafted = len(lookups) - 1
        assert policy.proceed(decision, Draft(drafted, table[:drafted], lookups=lookups)) == goes_on
    assert decision.features.survival == pytest.approx([1.0, 0.9, 0.72, 0.576])


def test_only_what_the_model_proposed_is_learnt_of_it() -> None:
    table = np.array([SURE, UNSURE] * 8)
    fresh = Online(acceptance="none").acceptance_model.weights("nf4")
    for lookups, same in (([0.9] * 4, True), ([0.9, 0.8, 0.0, 0.6], False)):
        policy = policy_of(CostPrior(0.001, (0.1, 0.1)))
        for _ in range(3):
            decision = policy.decide(Context(level="nf4", lookup_confidence=lookups[0]))
            policy.submit(decision, Draft(3, table[:3], lookups=lookups))
            outcome = Outcome(3, 2, 3, 3, 0.1, 0.0, 0.1, "nf4", 50, 0, table[:3], forwards=lookups[:3].count(0.0))
            policy.learn(decision, outcome)
        policy.acceptance_model.refresh()
        before, after, (_, _, head) = policy.acceptance_model.weights("nf4")
        assert ((before, after) == fresh[:2]) == same
        assert np.array_equal(head, fresh[2][2]) == same


def test_the_guard_charges_what_was_paid() -> None:
    """Four free tokens, one right: worth it at no cost, not at that of four forwards."""
    for forwards, held in ((0, False), (4, True)):
        policy = SafetyGuard(policy_of(CostPrior(0.1, (0.1, 0.1))), burn_in=20.0)
        context = Context(level="nf4")
        for i in range(150):
            context.step = i
            context.lookup_confidence = 0.0 if forwards else 0.9
            decision = policy.decide(context)
            k = 4 if policy.ledger("nf4").budget >= 0.0 and decision.id not in policy._taken else decision.gamma
            n = min(k, 1)
            seconds = (0.1 * k if forwards else 0.0) + 0.1
            signals = np.array([SURE] * k).reshape(k, 4)
            paid = k if forwards else 0
            outcome = Outcome(k, n, min(2, k), n + 1, seconds, seconds - 0.1, 0.1, "nf4", 50, 0, signals, forwards=paid)
            outcome.lookups = [] if forwards else [0.9] * 5
            policy.learn(decision, outcome)
        assert (policy.ledger("nf4").interventions > 0) == held


def test_forwards_and_catching_up_are_charged_by_hand() -> None:
    """Model, lookup, lookup, model: the second forward reads four tokens; what was free is read later."""
    cost = LevelCost(0.01, (0.1,) * 17, catch_up_seconds=0.001, first_draft_seconds=0.005)
    trace = made([4, 0, 0, 0, 0, 1, 0])
    trace = replace(trace, lookups=np.zeros(trace.drafts.shape, np.float32))
    trace.lookups[0, 1:3] = 0.9
    trace.lookups[5, 0] = 0.9
    assert trace.forwards[0, :5].tolist() == [0, 1, 1, 1, 2]
    assert trace.read[0, :5].tolist() == [0, 0, 0, 0, 3]
    prompt = len(trace.prompt)
    for j, draft in ((4, 0.025 + 0.001 * (prompt + 3 - 2)), (3, 0.015 + 0.001 * (prompt - 1)), (0, 0.0)):
        plan = np.full(len(trace), 0)
        plan[0] = j
        assert replay_plan(trace, plan, plan, cost).seconds[0] == pytest.approx(draft + 0.1)
    # Three drafted, all right, of which the model has read none: the step at 4 reads those and the newest token.
    plan = np.array([3, 0, 0, 0, 1, 1, 1])
    seconds = replay_plan(trace, plan, plan, cost).seconds
    assert seconds[1] == pytest.approx(0.1 + 0.015 + 0.001 * 3)
    assert seconds[2] == pytest.approx(0.1)  # a lookup's token alone
