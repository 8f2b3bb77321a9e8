"""Lookups in sampled decoding: offered as in greedy decoding, lossless over every way to go, and well told."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies.base import LOOKUP, Context, Decision, Draft, Outcome, Policy
from policies.costs.prior import CostPrior
from policies.registry import make_policy
from speckv_online.cpu_engine.pack import pack
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.lookup.gate import chance_of, shipped_chances
from speckv_online.lookup.ngram_index import NgramIndex
from speckv_online.lookup.text_chances import START, TextChances
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import plain
from tests.support.engine import SUPPORTED, small_llama
from tests.support.enumeration import Enumerated, Tape, every_way
from tests.support.lookups import REPEATING, gate_that
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama

VOCAB = 3
PROMPT = [0, 1, 2, 0, 1, 1, 2, 0, 1]
NEW = 4


class Swayed(Policy):
    """Does what it can to bias the output: all that it chooses depends on the tokens drafted so far.

    By the latest token modulo 3 it goes on (0), turns to lookups (1) or stops (2). It submits all of a draft whose
    first token is a multiple of 3, and none of any other, as far as it may.
    """

    def __init__(self, first: str = "") -> None:
        super().__init__()
        self.first, self.submitted, self.outcomes = first, list[tuple[int, int]](), list[Outcome]()

    def decide(self, context: Context) -> Decision:
        turns = self.first if context.lookup_alternative else ""
        return Decision(self.new_id(), 3, ask_per_token=not turns, drafter=turns, ask_at_submit=bool(turns))

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        latest = draft.tokens[-1] % 3
        return LOOKUP if latest == 1 and draft.lookup_alternative else latest != 2

    def submit(self, decision: Decision, draft: Draft) -> int:
        wanted = draft.drafted if draft.tokens[0] % 3 == 0 else 0
        self.submitted.append((decision.id, wanted))
        return wanted

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    model = tiny_llama(vocab=VOCAB, layers=1)
    model.lm_head.weight.data.mul_(0.3)
    return model


def truth_of(target: PreTrainedModel, warped: Sampler) -> np.ndarray:
    """The target's own joint distribution of the next tokens."""
    found = np.ones((VOCAB,) * NEW)
    for tokens in product(range(VOCAB), repeat=NEW):
        with torch.inference_mode():
            logits = target(torch.tensor([[*PROMPT, *tokens[:-1]]])).logits[0, len(PROMPT) - 1 :]
        p = warped.probabilities(logits, [])
        found[tokens] = float(p[range(NEW), list(tokens)].double().prod())
    return found


KINDS: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "model": lambda draft: ModelDrafter(draft, VOCAB),
    "hybrid, asked": lambda draft: HybridDrafter(draft, VOCAB, gate=gate_that(True, 0.4), skip=1.0),
    "hybrid, skips": lambda draft: HybridDrafter(draft, VOCAB, gate=gate_that(False, 0.5), skip=0.5),
    "ngram": lambda draft: NgramDrafter(),
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "batch"])
@pytest.mark.parametrize("first", ["", LOOKUP], ids=["drafts first", "looks up first"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_adds_up_to_the_target(target: PreTrainedModel, kind: str, first: str, together: bool) -> None:
    """All outcomes of whole texts with their exact probabilities: drafted, looked up, dropped, accepted, replaced."""
    policy, sampler = Swayed(first), Enumerated(0.8, top_p=0.97)
    decoder = SpeculativeDecoder(KINDS[kind](perturbed(target, 0.4)), policy=policy, target=target)
    greedy = plain(target, [2, 0, 1], NEW)

    def run(tape: Tape) -> tuple[int, ...]:
        sampler.tape = tape
        if not together:
            return tuple(decoder.generate(PROMPT, NEW, eos_ids=(), sampler=sampler).tokens)
        one, other = decoder.decode_batch([PROMPT, [2, 0, 1]], NEW, eos_ids=(), samplers=[sampler, None])
        assert other.tokens == greedy
        return tuple(one.tokens)

    found, ways = np.zeros((VOCAB,) * NEW), 0
    for tokens, probability in every_way(run):
        found[tokens] += probability
        ways += 1
    assert ways >= (found > 0).sum()
    np.testing.assert_allclose(found, truth_of(target, Sampler(0.8, top_p=0.97)), atol=2e-6)
    assert not decoder.policy.faults
    looked_up = [o for o in policy.outcomes if any(o.lookups[: o.drafted])]
    assert any(o.accepted for o in looked_up)
    assert any(o.rejected for o in looked_up)
    assert {0} < {wanted for _, wanted in policy.submitted}


@pytest.mark.parametrize(
    ("kind", "rows", "least"),
    [
        *(pytest.param(*case, 100_000, marks=pytest.mark.slow) for case in (("hybrid, skips", 1), ("model", 16))),
        *((kind, *size) for kind in ("model", "ngram", "hybrid, skips") for size in ((1, 2_000), (16, 6_000))),
    ],
)  # fmt: skip
def test_many_samples_follow_the_target(kind: str, rows: int, least: int) -> None:
    """Tokens of long texts, alone and in batches, each against what the target says of it.

    The longest runs are of a drafter that drafts with the model and with lookups, and of what batches are made for.

    Given all before it, each token is one of the target's. So for each latest token the counts of what follows, less
    the sums of the target's probabilities, have mean zero and a covariance that adds up over the tokens.
    """
    vocab, new = 6, 400
    target = small_llama(vocab_size=vocab, num_hidden_layers=1)
    target.lm_head.weight.data.mul_(0.4)
    draft = perturbed(target, 0.4)
    if SUPPORTED:
        pack(target)  # which is three times as quick
    drafters: dict[str, Drafter] = {
        "model": ModelDrafter(draft, vocab), "ngram": NgramDrafter(),
        "hybrid, skips": HybridDrafter(draft, vocab, gate=gate_that(False, 0.5), skip=0.5),
    }  # fmt: skip
    policy, sampler, rng = Swayed(LOOKUP if rows == 1 else ""), Sampler(0.9, top_k=5, seed=3), np.random.default_rng(1)
    decoder = SpeculativeDecoder(drafters[kind], policy=policy, target=target)
    surplus, covariance, count = np.zeros((vocab, vocab)), np.zeros((vocab, vocab, vocab)), 0
    while count < least:
        prompts = rng.integers(0, vocab, (rows, 8)).tolist()
        if rows == 1:
            texts = [decoder.generate(prompts[0], new, eos_ids=(), sampler=sampler).tokens]
        else:
            texts = [g.tokens for g in decoder.decode_batch(prompts, new, eos_ids=(), samplers=[sampler] * rows)]
        with torch.inference_mode():
            ids = torch.tensor([[*p, *t] for p, t in zip(prompts, texts, strict=True)])
            logits = target(ids).logits[:, 7:-1].reshape(-1, vocab)
        p = sampler.probabilities(logits, []).double().numpy()
        before, said = ids[:, 7:-1].flatten().numpy(), ids[:, 8:].flatten().numpy()
        np.add.at(surplus, before, np.eye(vocab)[said] - p)
        np.add.at(covariance, before, p[:, :, None] * np.eye(vocab) - p[:, :, None] * p[:, None, :])
        count += len(said)
    for row, spread in zip(surplus, covariance, strict=True):
        chi2 = float(row @ np.linalg.pinv(spread, rcond=1e-9) @ row)
        assert chi2 < 5 + 5 * np.sqrt(10)  # mean 5, standard deviation √10 under the truth
    assert sum(sum(p > 0 for p in o.lookups[: o.drafted]) for o in policy.outcomes) > count / 50
    assert not decoder.policy.faults


class Notes(Policy):
    """Drafts with what there is, and notes what it is told of lookups."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[float, float]] = []

    def decide(self, context: Context) -> Decision:
        self.told.append((context.lookup_confidence, context.lookup_alternative))
        return Decision(self.new_id(), 2, ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        self.told.append((draft.lookups[-1], draft.lookup_alternative))
        return True


@pytest.mark.parametrize("kind", ["model", "hybrid", "ngram"])
def test_the_same_is_told_as_in_greedy_decoding(tiny_pair: TinyPair, kind: str) -> None:
    """A sampler that leaves one token says what greedy decoding does, and the first step is told the same.

    But for the odds that a draw starts with.
    """
    found = []
    for batch, sampled in product((False, True), (False, True)):
        drafters: dict[str, Drafter] = {
            "model": ModelDrafter(tiny_pair.draft, 260), "hybrid": HybridDrafter(tiny_pair.draft, 260),
            "ngram": NgramDrafter(),
        }  # fmt: skip
        policy, sampler = Notes(), Sampler(top_k=1) if sampled else None
        decoder = SpeculativeDecoder(drafters[kind], policy=policy, target=tiny_pair.target)
        if batch:
            (out,) = decoder.decode_batch([REPEATING], 3, eos_ids=(), samplers=[sampler])
        else:
            out = decoder.generate(REPEATING, 3, eos_ids=(), sampler=sampler)
        told = np.array(policy.told[:2])
        some = told > 0
        assert some.any()
        odds = np.log(told[some] / (1 - told[some])) - (START if sampled else 0.0)
        found.append((some.tolist(), odds, out.tokens))
    for some, odds, tokens in found[1:]:
        assert (some, tokens) == (found[0][0], found[0][2])
        np.testing.assert_allclose(odds, found[0][1], atol=1e-9)


def test_a_learning_policy_turns_to_lookups_when_tokens_are_drawn(tiny_pair: TinyPair) -> None:
    """Where forwards of the draft are dear it leaves them for lookups, alone and in a batch."""
    prompt = REPEATING * 3
    for rows in (1, 3):
        policy = make_policy("online:acceptance=none")
        for level in ("fp32", "fp32@2", "fp32@4"):
            policy.set_costs(level, CostPrior(0.05, (0.1, 0.1), 0.001))  # type: ignore[attr-defined]
        decoder = SpeculativeDecoder(ModelDrafter(tiny_pair.draft, 260), policy=policy, target=tiny_pair.target)
        samplers = [Sampler(0.3, seed=i) for i in range(rows)]
        outs = decoder.decode_batch([prompt] * rows, 24, eos_ids=(), samplers=samplers)
        assert sum(max(s.drafted - s.forwards, 0) for out in outs for s in out.steps) > 5
        assert not decoder.policy.faults


def test_chances_are_learnt_from_a_text_that_is_drawn() -> None:
    """Lookups that are right half as often as their counts say are told so, in this text and no other."""
    rng, cycle = np.random.default_rng(2), [3, 4, 5, 6, 7, 8, 9, 10]
    for sampled in (True, False):
        chances, index = TextChances(shipped_chances(), sampled), NgramIndex(cycle * 4)
        told, right, before = [], [], []
        for i in range(600):
            found = index.propose()
            if found is not None and i >= 100:
                told.append(chances.of(found))
                before.append(chance_of(found, shipped_chances()))
            token = int(cycle[i % 8]) if rng.random() < 0.45 else int(rng.integers(3, 11))
            if found is not None and i >= 100:
                right.append(found.token == token)
            chances.extend(index, [token])
        if sampled:
            assert abs(np.mean(told) - np.mean(right)) < 0.05 < abs(np.mean(before) - np.mean(right))
        else:
            assert told == before
    assert TextChances(shipped_chances(), True).weights[0] == shipped_chances()[0] + START  # the next text begins anew


def test_seeded_runs_with_lookups_repeat_on_one_decoder(tiny_pair: TinyPair) -> None:
    """What one text taught is gone when the next begins."""
    drafter = HybridDrafter(tiny_pair.draft, 260, skip=0.5)
    decoder = SpeculativeDecoder(drafter, policy=Swayed(), target=tiny_pair.target)
    runs = [
        decoder.generate(REPEATING * 2, 40, eos_ids=(), sampler=Sampler(0.8, seed=seed)).tokens for seed in (1, 2, 1)
    ]
    assert runs[0] == runs[2] != runs[1]
