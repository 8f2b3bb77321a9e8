"""The n-gram and the hybrid drafter: lossless like any other, and what they propose is what their counts say."""

from __future__ import annotations

from collections import Counter
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import CONFIDENCE, ENTROPY, MARGIN, N_SIGNALS, NGRAM, Context, Decision
from policies.registry import BUILTIN, make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.lookup.gate import Gate
from speckv_online.lookup.ngram_index import MAX_N, SMOOTHING, NgramIndex
from speckv_online.modeling.sampling import Sampler, residual
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.lookups import REPEATING, gate_that
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


def drafters(pair: TinyPair) -> dict[str, Drafter]:
    model = pair.draft
    return {
        "ngram": NgramDrafter(),
        "hybrid": HybridDrafter(model, 260),
        "hybrid, always asks": HybridDrafter(model, 260, skip=1.0),
        "hybrid, never asks": HybridDrafter(model, 260, skip=0.0),
        "hybrid, takes the lookup": HybridDrafter(model, 260, gate=gate_that(True), skip=1.0),
        "hybrid, skips at random": HybridDrafter(model, 260, gate=gate_that(False), skip=0.5),
    }


# The index


def brute_force(context: list[int]) -> tuple[int, int, int, float, float] | None:
    """The proposal from its definition, by scanning the context once per suffix."""
    followers = []
    for n in range(1, min(MAX_N, len(context)) + 1):
        suffix = context[-n:]
        followers.append([context[i + n] for i in range(len(context) - n) if context[i : i + n] == suffix])
    lengths = [n for n, found in enumerate(followers, 1) if found]
    if not lengths:
        return None
    seen = followers[lengths[-1] - 1]
    token, p = seen[-1], 0.0
    for found in followers[: lengths[-1]]:
        p = (found.count(token) + SMOOTHING * p) / (len(found) + SMOOTHING)
    others = [count for t, count in Counter(seen).items() if t != token] + [SMOOTHING]
    shares = [p, *((1 - p) * count / sum(others) for count in others)]
    return token, lengths[-1], len(seen), p, -sum(s * log2(s) for s in shares)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_proposals_are_what_the_counts_say(context: list[int]) -> None:
    index, want = NgramIndex(context), brute_force(context)
    found = index.propose()
    if want is None:
        assert found is None
        assert index.lookup() == (-1, 0)
        return
    assert found is not None
    assert found[:3] == want[:3]
    assert (found.token, found.length) == index.lookup()
    assert found.confidence == pytest.approx(want[3])
    assert found.entropy == pytest.approx(want[4], abs=1e-9)
    assert 0 < found.confidence < 1
    assert found.margin >= 0


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=8))
def test_what_is_pushed_can_be_taken_back(context: list[int], drafted: list[int]) -> None:
    index, untouched, whole = NgramIndex(context), NgramIndex(context), NgramIndex([*context, *drafted])
    for _ in range(2):
        for token in drafted:
            index.push(token)
        assert index.propose() == whole.propose()
        index.undo()
        assert index._table.keys() == untouched._table.keys()
        for key, entry in untouched._table.items():
            assert index._table[key] == entry
    index.extend(drafted)
    assert index.propose() == whole.propose()


def test_one_sighting_is_no_certainty_and_longer_matches_count_for_more() -> None:
    confidences = []
    for n in range(1, MAX_N + 1):
        text = list(range(10, 10 + n))
        found = NgramIndex([*text, 7, *text]).propose()
        assert found is not None
        assert (found.token, found.length, found.hits) == (7, n, 1)
        confidences.append(found.confidence)
    assert confidences == sorted(confidences)
    assert confidences[-1] < 0.9
    assert NgramIndex([1, 2, 3]).propose() is None


# Greedy decoding


@pytest.mark.parametrize("gammas", [[4], list(range(17)), [0] * 9 + [8]], ids=str)
def test_greedy_identity(tiny_pair: TinyPair, gammas: list[int]) -> None:
    for name, drafter in drafters(tiny_pair).items():
        policy = Scripted(gammas)
        decoder = SpeculativeDecoder(drafter, policy=policy, target=tiny_pair.target)
        for prompt in (prompt_of(1), REPEATING):
            out = decoder.generate(prompt, 36)
            assert out.tokens == plain(tiny_pair.target, prompt, 36), name
            assert not decoder.policy.faults
        assert all(o.drafter == drafter.names[0] for o in policy.outcomes)
        assert any(o.drafted for o in policy.outcomes), name


def test_end_of_sequence_and_budget_inside_a_draft(tiny_pair: TinyPair) -> None:
    whole = plain(tiny_pair.target, REPEATING, 36)
    for drafter in drafters(tiny_pair).values():
        decoder = SpeculativeDecoder(drafter, policy=Scripted([7, 3]), target=tiny_pair.target)
        for n in (1, 5, 12):
            assert decoder.generate(REPEATING, n).tokens == whole[:n]
            first = whole.index(whole[n]) + 1
            out = decoder.generate(REPEATING, 36, eos_ids=[whole[n]])
            assert (out.tokens, out.finish) == (whole[:first], "eos")


def test_an_ngram_drafter_proposes_nothing_where_nothing_repeats(tiny_pair: TinyPair) -> None:
    drafter, signals = NgramDrafter(), np.full((3, N_SIGNALS), 9.0)
    drafter.begin([1, 2, 3], 10)
    assert drafter.draft(signals[0]) == NO_PROPOSAL
    assert (signals == 9.0).all()
    drafter.end(0)
    drafter.extend([1])
    assert [drafter.draft(row) for row in signals] == [2, 3, 1]
    assert signals[:, NGRAM].tolist() == [1, 2, 3]
    assert drafter.proposals == [None] * 3
    assert (signals[:, CONFIDENCE] < 1).all()
    assert (signals[:, [ENTROPY, MARGIN]] >= 0).all()
    policy = Scripted([6], ask_per_token=True)
    decoder = SpeculativeDecoder(NgramDrafter(), policy=policy, target=tiny_pair.target)
    assert decoder.generate([1, 2, 3], 12).tokens == plain(tiny_pair.target, [1, 2, 3], 12)
    assert policy.outcomes[0].drafted == policy.outcomes[0].labelled == 0


def test_hybrid_takes_whichever_the_gate_prefers(tiny_pair: TinyPair) -> None:
    def drafts(gate: Gate, skip: float) -> list[int]:
        drafter, signals = HybridDrafter(tiny_pair.draft, 260, gate=gate, skip=skip), np.zeros((6, N_SIGNALS))
        drafter.begin(REPEATING, 40)
        drafter.use("hybrid")
        found = [drafter.draft(row) for row in signals]
        assert skip == 1.0 or drafter.lag == len(REPEATING)  # the model has read nothing
        return found

    alone, signals = ModelDrafter(tiny_pair.draft, 260), np.zeros((6, N_SIGNALS))
    alone.begin(REPEATING, 40)
    modelled = [alone.draft(row) for row in signals]
    repeated = [44, 9, 5, 17, 101, 44]
    assert modelled != repeated
    assert drafts(gate_that(True), 1.0) == repeated
    assert drafts(gate_that(True), 0.2) == repeated  # without asking the model
    assert drafts(gate_that(False), 1.0) == modelled


class Chooser(Scripted):
    """Names another drafter in every step."""

    def __init__(self, names: list[str]) -> None:
        super().__init__([5, 0, 9])
        self.names = names

    def decide(self, context: Context) -> Decision:
        decision = super().decide(context)
        decision.drafter = self.names[context.step % len(self.names)]
        return decision


def test_a_policy_may_choose_the_drafter(tiny_pair: TinyPair) -> None:
    policy = Chooser(["ngram", "model", "", "hybrid"])
    drafter = HybridDrafter(tiny_pair.draft, 260)
    decoder = SpeculativeDecoder(drafter, policy=policy, target=tiny_pair.target)
    assert decoder.generate(REPEATING, 40).tokens == plain(tiny_pair.target, REPEATING, 40)
    assert not decoder.policy.faults
    used = [o.drafter for o in policy.outcomes]
    assert used == [["ngram", "model", "hybrid", "hybrid"][i % 4] for i in range(len(used))]
    assert len(set(used)) == 3


def test_an_unknown_drafter_is_a_fault_that_costs_nothing_else(tiny_pair: TinyPair) -> None:
    policy = Chooser(["hybrid"])
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target)
    assert decoder.generate(REPEATING, 12).tokens == plain(tiny_pair.target, REPEATING, 12)
    assert decoder.policy.faults["unknown drafter"] == len(policy.outcomes)
    assert {o.drafter for o in policy.outcomes} == {"model"}


@pytest.mark.parametrize("name", [n for n in BUILTIN if n not in ("fixed", "river")])
def test_every_policy_copes_with_a_drafter_that_has_nothing_to_say(tiny_pair: TinyPair, name: str) -> None:
    decoder = SpeculativeDecoder(NgramDrafter(), policy=make_policy(name), target=tiny_pair.target)
    assert decoder.generate(prompt_of(6), 24).tokens == plain(tiny_pair.target, prompt_of(6), 24)
    assert not decoder.policy.faults


# Sampled decoding


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), drawn=st.lists(st.booleans(), min_size=2, max_size=2))
def test_two_mixed_drafts_by_enumeration(seed: int, drawn: list[bool]) -> None:
    """Over every pair of drafts and every way to accept them, what is said is distributed as the target says.

    The second draft's kind depends on the first draft, as the gate's choice may: on the prefix, never on a draw.
    """
    vocab, rng = 3, np.random.default_rng(seed)
    p = torch.tensor(rng.normal(size=(vocab + 1, vocab)) * 2).softmax(-1)  # row 0, then the row after each token
    q = torch.tensor(rng.normal(size=(vocab + 1, vocab)) * 2).softmax(-1)
    one_hot = torch.nn.functional.one_hot(q.argmax(-1), vocab).double()
    said = torch.zeros(vocab, vocab, dtype=torch.double)
    for a in range(vocab):
        first = q[0] if drawn[0] else one_hot[0]
        if first[a] == 0:
            continue
        kept = min(1.0, float(p[0, a] / first[a]))
        if kept < 1:  # replaced: the second token is the target's own
            said += first[a] * (1 - kept) * residual(p[0], q[0] if drawn[0] else None, a)[:, None] * p[1:]
        by_model = drawn[1] != (a == 0)
        second = q[1 + a] if by_model else one_hot[1 + a]
        for b in range(vocab):
            if second[b] == 0:
                continue
            good = min(1.0, float(p[1 + a, b] / second[b]))
            said[a, b] += first[a] * kept * second[b] * good
            if good < 1:
                rest = residual(p[1 + a], q[1 + a] if by_model else None, b)
                said[a] += first[a] * kept * second[b] * (1 - good) * rest
    torch.testing.assert_close(said, p[0][:, None] * p[1:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["ngram", "hybrid, takes the lookup", "hybrid, asks the model"])
def test_sampling_follows_the_target(kind: str) -> None:
    """The first two tokens of many short runs against the target's own joint distribution."""
    vocab, n = 5, 600
    target = tiny_llama(vocab=vocab, layers=1)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.3)
    hybrid = HybridDrafter(perturbed(target, 0.4), vocab, gate=gate_that("takes" in kind), skip=1.0)
    prompt = [1, 2, 3, 4, 1, 2, 4, 3, 1, 2]
    with torch.inference_mode():
        first = target(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        rows = target(torch.tensor([[*prompt, a] for a in range(vocab)])).logits[:, -1].softmax(-1)
    truth = (first[:, None] * rows).numpy()
    policy = Scripted([3])
    decoder = SpeculativeDecoder(NgramDrafter() if kind == "ngram" else hybrid, policy=policy, target=target)
    sampler, seen = Sampler(seed=11), np.zeros((vocab, vocab))
    for _ in range(n):
        a, b = decoder.generate(prompt, 2, eos_ids=(), sampler=sampler).tokens
        seen[a, b] += 1
    assert sum(o.accepted for o in policy.outcomes) > n / 20
    assert sum(o.rejected for o in policy.outcomes) > n / 20
    chi2 = ((seen - n * truth) ** 2 / (n * truth)).sum()
    assert chi2 < 24 + 5 * np.sqrt(48)  # mean 24, standard deviation √48 under the truth


def test_seeded_runs_repeat(tiny_pair: TinyPair) -> None:
    def run(seed: int) -> list[int]:
        decoder = SpeculativeDecoder(HybridDrafter(tiny_pair.draft, 260), policy=Scripted([4]), target=tiny_pair.target)
        return decoder.generate(REPEATING, 24, sampler=Sampler(1.0, top_k=20, seed=seed)).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
