"""Policies that decide a batch's rows together: what they are asked, what they are told, and what they cannot break."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from policies.base import LOOKUP, Context, Decision, Draft, Outcome
from policies.batches import Forward, JointPolicy
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import plain, prompt_of
from tests.support.tiny_models import TinyPair


class Together(JointPolicy):
    """Drafts more for later rows, turns one of them to lookups, trims each; rests at every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.alone = 0, 0
        self.forwards: list[Forward] = []
        self.seen: list[list[Context]] = []

    def rests(self, level: str, rows: int) -> bool:
        self.steps += 1
        return self.steps % 3 == 0

    def decide(self, context: Context) -> Decision:
        self.alone += 1
        return Decision(self.new_id(), 1)

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        self.seen.append(list(contexts))
        return [Decision(self.new_id(), min(2 + i, c.max_gamma), True, features=i) for i, c in enumerate(contexts)]

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        assert len(decisions) == len(drafts)
        return [LOOKUP if d.features == 2 and draft.lookup_alternative else True
                for d, draft in zip(decisions, drafts, strict=True)]  # fmt: skip

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        return [max(draft.drafted - 1, 1) for draft in drafts]

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        assert len(decisions) == len(outcomes) == forward.rows
        assert sum(o.drafted for o in outcomes) + forward.rows <= forward.tokens
        assert sum(o.forwards for o in outcomes) == forward.forwards
        assert all(o.drafted <= max(d.gamma - 1, 1) for d, o in zip(decisions, outcomes, strict=True))
        self.forwards.append(forward)


def test_rows_are_decided_together_and_as_if_alone(tiny_pair: TinyPair) -> None:
    policy, prompts = Together(), [prompt_of(n, n) for n in (1, 2, 40, 7)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=policy, target=tiny_pair.target)
    found = decoder.decode_batch(prompts, 30, eos_ids=())
    assert [g.tokens for g in found] == [plain(tiny_pair.target, p, 30) for p in prompts]
    assert not decoder.policy.faults
    assert {len(contexts) for contexts in policy.seen} >= {4, 1}  # to the last row
    assert all(c.rows == len(contexts) for contexts in policy.seen for c in contexts)
    assert [c.unread for c in policy.seen[0]] == [0, 1, 39, 6]
    assert policy.alone == 0
    assert max(f.rounds for f in policy.forwards) == 5
    # A step that reads prompts is no usual one; all others have their seconds.
    first, *rest = policy.forwards
    assert (first.read, first.seconds) == (46, 0.0)
    assert all(f.seconds > f.verify_seconds > 0 for f in rest)
    rested = [s for g in found for s in g.steps if not s.decision_id]
    assert rested
    assert all(s.drafted == s.decide_seconds == 0 for s in rested) or max(s.decide_seconds for s in rested) < 1e-3
    assert decoder.generate(prompts[2], 30, eos_ids=()).tokens == plain(tiny_pair.target, prompts[2], 30)
    assert policy.alone > 0


def test_drawn_rows_are_not_trimmed(tiny_pair: TinyPair) -> None:
    policy, prompts = Together(), [prompt_of(6, seed) for seed in range(3)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=policy, target=tiny_pair.target)
    found = decoder.decode_batch(prompts, 20, eos_ids=(), samplers=[Sampler(seed=i, top_k=1) for i in range(3)])
    assert [g.tokens for g in found] == [plain(tiny_pair.target, p, 20) for p in prompts]


class Broken(Together):
    """Does one thing wrong."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def rests(self, level: str, rows: int) -> bool:
        if self.where == "rests":
            raise RuntimeError("no")
        return False

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        found = super().decide_rows(contexts, pads, may_drop)
        if self.where == "few":
            return found[1:]
        if self.where == "gamma":
            found[0].gamma = 99
        return found

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        return ["nobody"] * len(drafts) if self.where == "answer" else [True] * (len(drafts) - (self.where == "short"))

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        return [99 if self.where == "submit" else draft.drafted for draft in drafts]

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        if self.where == "learn":
            raise RuntimeError("no")


@pytest.mark.parametrize("where", ["rests", "few", "gamma", "answer", "short", "submit", "learn"])
def test_no_fault_breaks_a_batch(tiny_pair: TinyPair, where: str) -> None:
    prompts = [prompt_of(8, seed) for seed in range(3)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Broken(where), target=tiny_pair.target)
    found = decoder.decode_batch(prompts, 16, eos_ids=())
    assert [g.tokens for g in found] == [plain(tiny_pair.target, p, 16) for p in prompts]
    assert decoder.policy.faults


@pytest.mark.parametrize("drafter", ["model", "ngram", "none"])
def test_online_in_batches(tiny_pair: TinyPair, drafter: str) -> None:
    own = {"model": tiny_pair.target, "ngram": NgramDrafter(), "none": None}[drafter]
    policy = make_policy("online")
    decoder = SpeculativeDecoder(own, policy=policy, target=tiny_pair.target, level="nf4")
    prompts = [prompt_of(9, seed) * 2 for seed in range(5)]
    for _ in range(3):
        found = decoder.decode_batch(prompts, 40, eos_ids=())
        assert [g.tokens for g in found] == [plain(tiny_pair.target, p, 40) for p in prompts]
    assert not decoder.policy.faults
    state = policy.state_dict()
    assert {"batch_costs.nf4.sums", "safety_batch.nf4@8"} <= state.keys()
    again = make_policy("online")
    again.load_state_dict(state)
    assert all((again.state_dict()[key] == value).all() for key, value in state.items())
