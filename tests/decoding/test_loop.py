"""Speculation must never change what the target would have said."""

from __future__ import annotations

from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from policies.base import N_SIGNALS, Context, Decision, Outcome
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.greedy_check import check_greedy
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.io.step_records import StepRecord
from speckv_online.modeling.choices import likeliest
from speckv_online.modeling.kv_cache import KVCache
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_models import EOS, TinyPair, perturbed, tiny_llama


@pytest.mark.parametrize("draft", ["right", "wrong", "near", "random"])
@pytest.mark.parametrize("gammas", [[0], [1], [4], [16], list(range(17)), [0] * 9 + [8]], ids=str)
def test_greedy_identity(tiny_pair: TinyPair, draft: str, gammas: list[int]) -> None:
    target = tiny_pair.target
    model = {
        "right": lambda: target,
        "wrong": lambda: negated(target),
        "near": lambda: tiny_pair.draft,
        "random": lambda: tiny_llama(seed=9, layers=1),
    }[draft]()
    policy = Scripted(gammas)
    decoder = SpeculativeDecoder(ModelDrafter(model, target.config.vocab_size), policy=policy, target=target)
    for seed, length in enumerate((1, 2, 40)):
        prompt = prompt_of(length, seed)
        out = decoder.generate(prompt, 36)
        assert out.tokens == plain(target, prompt, 36)
        assert sum(s.produced for s in out.steps) == len(out.tokens)
        assert not decoder.policy.faults
    if draft == "right":
        assert not any(o.rejected for o in policy.outcomes)
    if draft == "wrong":
        assert not any(o.accepted for o in policy.outcomes)


def negated(target: PreTrainedModel) -> PreTrainedModel:
    """The target with its head turned round: it always proposes the least likely token."""
    model = perturbed(target, 0.0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    return model


def test_outcomes_and_records(tiny_pair: TinyPair) -> None:
    policy = Scripted([4, 0, 8, 2])
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target, level="fp32")
    prompt = prompt_of(20)
    out = decoder.generate(prompt, 40)
    position = 0
    for record, outcome, seen in zip(out.steps, policy.outcomes, policy.contexts, strict=True):
        step, at, context_length, max_gamma, remaining = seen
        assert (step, at, context_length) == (record.step, position, len(prompt) + position)
        assert (remaining, max_gamma) == (40 - position, min(16, 39 - position))
        assert record.drafted == min(record.gamma, max_gamma) == outcome.drafted
        assert record.accepted <= record.labelled <= record.drafted
        assert outcome.rejected == (record.accepted < record.drafted)
        assert record.produced == record.accepted + 1
        assert outcome.signals.shape == (record.drafted, N_SIGNALS)
        assert record.seconds >= record.draft_seconds + record.verify_seconds > 0
        assert record.decide_seconds > 0
        position += record.produced
    assert position == 40
    assert policy.outcomes[0].caught_up == len(prompt) - 1


def test_outcomes_hold_the_policys_own_time(tiny_pair: TinyPair) -> None:
    """Deciding, and learning from the step before: the first step has nothing to have learnt from."""

    class Slow(Scripted):
        def decide(self, context: Context) -> Decision:
            sleep(0.004)
            return super().decide(context)

        def learn(self, decision: Decision, outcome: Outcome) -> None:
            sleep(0.01)
            super().learn(decision, outcome)

    policy = Slow([2, 0])
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target)
    decoder.generate(prompt_of(5), 8)
    decoder.decode_batch([prompt_of(5), prompt_of(6)], 8)
    alone, batch = [o for o in policy.outcomes if "@" not in o.level], [o for o in policy.outcomes if "@" in o.level]
    for first, *rest in (alone, batch[::2], batch[1::2]):
        assert first.policy_seconds >= 0.004
        assert rest
        for outcome in rest:
            assert outcome.policy_seconds >= 0.014
            assert outcome.seconds >= outcome.policy_seconds + outcome.verify_seconds


def test_while_the_policy_sleeps_the_draft_reads_nothing(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy="online", target=tiny_pair.target, level="fp32")
    ledger, forwards = decoder.policy.ledger("fp32"), []
    sleep, ledger.baseline = ledger.sleep, 0
    for _ in range(8):
        sleep.tokens, sleep.seconds = 64.0, 1e6
        sleep.start(0.1, allowed=True)
    note = tiny_pair.draft.register_forward_hook(lambda *_: forwards.append(1))
    try:
        out = decoder.generate(prompt_of(12), 30)
    finally:
        note.remove()
    assert out.tokens == plain(tiny_pair.target, prompt_of(12), 30)
    assert [s.gamma for s in out.steps] == [0] * 30
    assert not forwards
    assert not decoder.policy.costs.level("fp32").steps


def test_the_draft_catches_up_in_one_forward(tiny_pair: TinyPair) -> None:
    """After nine steps without a draft its first forward reads all that it missed, and each other one a token."""
    widths: list[int] = []
    note = tiny_pair.draft.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: widths.append(ids[0].numel())
    )
    policy = Scripted([1] + [0] * 9 + [8])
    try:
        SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target).generate(prompt_of(12), 30)
    finally:
        note.remove()
    first, *_, last = policy.outcomes[:11]
    assert (first.drafted, last.drafted) == (1, 8)
    assert widths[:9] == [12, last.caught_up + 1, *[1] * 7]
    assert last.caught_up >= 9
    assert widths[0] + widths[1] == last.context_length


@pytest.mark.parametrize("ask_per_token", [False, True])
def test_the_prompt_is_read_with_the_first_drafts(
    tiny_pair: TinyPair, ask_per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward of the target for each step and none besides; its times are no policy's business."""
    widths: list[tuple[int, int]] = []
    forward = SpeculativeDecoder._forward

    def counted(self: SpeculativeDecoder, tokens: list[int], cache: KVCache, keep: int, pending: Any) -> torch.Tensor:
        logits = forward(self, tokens, cache, keep, pending)
        widths.append((len(tokens) + (0 if pending is None else len(pending)), len(logits)))
        return logits

    monkeypatch.setattr(SpeculativeDecoder, "_forward", counted)
    policy = Scripted([3, 0, 5], ask_per_token=ask_per_token)
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target)
    for length in (1, 30):
        widths.clear()
        policy.outcomes.clear()
        out = decoder.generate(prompt_of(length), 20)
        drafted = [s.drafted for s in out.steps]
        assert widths == [(length + drafted[0], drafted[0] + 1), *((k + 1, k + 1) for k in drafted[1:])]
        first, *later = policy.outcomes
        assert ((first.seconds, first.verify_seconds) == (0.0, 0.0)) == (length > 1)
        assert first.draft_seconds > 0.0
        assert all(o.seconds > 0 for o in later)
        assert out.prefill_seconds + out.decode_seconds <= out.seconds
        assert all(s.seconds >= s.draft_seconds + s.verify_seconds > 0 for s in out.steps)


def test_the_prompts_share_of_the_first_forward() -> None:
    """The step keeps the median of the later verifications; the sum stays what was measured."""
    names = [name for name in StepRecord.__dataclass_fields__ if name not in ("verify_seconds", "seconds")]
    steps = [StepRecord(**dict.fromkeys(names, 0), verify_seconds=v, seconds=v + 0.5) for v in (9.0, 1.0, 3.0, 2.0)]
    out = Generation(steps=steps, prefill_seconds=0.25)
    out.charge_prompt()
    assert [s.verify_seconds for s in out.steps] == [2.0, 1.0, 3.0, 2.0]
    assert out.steps[0].seconds == 2.5
    assert out.prefill_seconds == 7.25
    alone = Generation(steps=steps[1:2])
    alone.charge_prompt()
    assert (alone.steps[0].verify_seconds, alone.prefill_seconds) == (1.0, 0.0)


def test_signals_are_the_drafts_own(tiny_pair: TinyPair) -> None:
    """Entropy, confidence and margin against a direct computation in double precision."""
    policy = Scripted([3])
    prompt = prompt_of(12)
    SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target).generate(prompt, 1 + 3)
    with torch.inference_mode():
        logits = tiny_pair.draft(torch.tensor([prompt])).logits[0, -1, :].double()
    p = logits.softmax(-1)
    top = logits.topk(2).values
    expected = [float(-(p * p.log2()).sum()), float(p.max()), float(top[0] - top[1])]
    np.testing.assert_allclose(policy.outcomes[0].signals[0, :3], expected, rtol=1e-4)


def test_stopping_policies_and_trimmed_drafts(tiny_pair: TinyPair) -> None:
    policy = Scripted([12], ask_per_token=True)
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target)
    prompt = prompt_of(10, 3)
    assert decoder.generate(prompt, 60).tokens == plain(tiny_pair.target, prompt, 60)
    assert not decoder.policy.faults
    lengths = {o.drafted for o in policy.outcomes}
    assert len(lengths) > 1
    assert max(lengths) < 12


@pytest.mark.parametrize("gamma", [0, 1, 3, 8, 16])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_end_of_sequence_anywhere(tiny_pair: TinyPair, gamma: int, at: int) -> None:
    """Whichever place of a draft the end falls on, nothing follows it."""
    prompt = prompt_of(15, 5)
    reference = plain(tiny_pair.target, prompt, 30)
    eos = reference[at]
    expected = reference[: reference.index(eos) + 1]
    policy = Scripted([gamma])
    for model in (tiny_pair.target, tiny_pair.draft):
        decoder = SpeculativeDecoder(ModelDrafter(model, 260), policy=policy, target=tiny_pair.target)
        out = decoder.generate(prompt, 30, eos_ids=[eos])
        assert out.tokens == expected
        assert out.finish == "eos"
        assert sum(s.produced for s in out.steps) == len(expected)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), gamma=st.integers(0, 16), length=st.integers(1, 30))
def test_budget_is_exact(tiny_pair: TinyPair, n: int, gamma: int, length: int) -> None:
    prompt = prompt_of(length, length)
    out = SpeculativeDecoder(tiny_pair.drafter(), policy=Scripted([gamma]), target=tiny_pair.target).generate(prompt, n)
    assert len(out.tokens) == n or out.tokens[-1] == EOS
    assert all(s.drafted <= max(0, n - 1) for s in out.steps)


def test_context_ends_at_the_models_limit() -> None:
    target = tiny_llama(positions=64)
    decoder = SpeculativeDecoder(ModelDrafter(perturbed(target, 0.1), 260), policy=Scripted([16]), target=target)
    prompt = prompt_of(40)
    out = decoder.generate(prompt, 500)
    assert len(out.tokens) == 24
    assert out.tokens == plain(target, prompt, 24)
    with pytest.raises(UserError, match="holds only 64"):
        decoder.generate(prompt_of(65), 5)
    with pytest.raises(UserError, match="empty"):
        decoder.generate([], 5)


@given(rows=st.lists(st.lists(st.sampled_from([-2.0, 0.0, 1.5, float("inf"), float("nan")]), min_size=5, max_size=5)))
def test_the_likeliest_token_is_torchs(rows: list[list[float]]) -> None:
    """The first of equals, also where numbers are none; in every type."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.tensor(rows, dtype=dtype).reshape(-1, 5)
        assert likeliest(logits) == logits.argmax(-1).tolist()


def test_no_drafter_is_plain_decoding(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(9)
    out = SpeculativeDecoder(None, policy=Scripted([8]), target=tiny_pair.target).generate(prompt, 20)
    assert out.tokens == plain(tiny_pair.target, prompt, 20)
    assert len(out.steps) == 20


def test_draft_with_a_padded_vocabulary_never_leaves_the_targets() -> None:
    target = tiny_llama(vocab=260)
    draft = tiny_llama(seed=4, vocab=320)
    with torch.no_grad():
        draft.lm_head.weight[260:] *= 50  # without the mask these rows would win
    policy = Scripted([4])
    prompt = prompt_of(8)
    out = SpeculativeDecoder(ModelDrafter(draft, 260), policy=policy, target=target).generate(prompt, 24)
    assert out.tokens == plain(target, prompt, 24)


def test_head_over_some_tokens_only(tiny_pair: TinyPair) -> None:
    """A draft head with fewer rows than the vocabulary proposes through its id map."""
    head_ids = torch.arange(0, 260, 2)
    model = perturbed(tiny_pair.target, 0.0)
    model.lm_head = torch.nn.Linear(64, len(head_ids), bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(tiny_pair.target.lm_head.weight[head_ids])
    policy = Scripted([6])
    prompt = prompt_of(8)
    decoder = SpeculativeDecoder(ModelDrafter(model, 260, head_ids), policy=policy, target=tiny_pair.target)
    out = decoder.generate(prompt, 40)
    assert out.tokens == plain(tiny_pair.target, prompt, 40)
    ends = np.cumsum([s.produced for s in out.steps])
    rejected = [out.tokens[end - 1] for end, o in zip(ends, policy.outcomes, strict=True) if o.rejected]
    assert rejected
    assert all(token % 2 == 1 for token in rejected)  # the same model but for the missing rows errs only there


def test_streaming_gives_every_token_once(tiny_pair: TinyPair) -> None:
    seen: list[int] = []
    prompt = prompt_of(8)
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=Scripted([5]), target=tiny_pair.target)
    out = decoder.generate(prompt, 30, on_tokens=seen.extend)
    assert seen == out.tokens


def test_check_greedy_finds_a_wrong_token(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(8)
    tokens = plain(tiny_pair.target, prompt, 10)
    assert check_greedy(tiny_pair.target, prompt, tokens).identical
    tokens[4] = (tokens[4] + 1) % 257 or 1
    check = check_greedy(tiny_pair.target, prompt, tokens)
    assert check.ties[0][0] == 4
    assert check.ties[0][1] > 0
    assert not check.within(1e-6)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_draft_whose_logits_are_no_numbers(tiny_pair: TinyPair, broken: float, compiled: bool) -> None:
    """It is as good as one that knows nothing: the target's own tokens, and records that hold numbers."""
    draft = perturbed(tiny_pair.draft, 0.0)
    with torch.no_grad():
        draft.model.norm.weight.fill_(broken)
    drafter = ModelDrafter(draft, tiny_pair.target.config.vocab_size)
    if not compiled:
        drafter.compiled = None
    policy = Scripted([3, 0, 5])
    decoder = SpeculativeDecoder(drafter, policy=policy, target=tiny_pair.target)
    for prompt in ([5, 17, 101, 44], [33, 7]):
        expected = plain(tiny_pair.target, prompt, 20)
        assert decoder.generate(prompt, 20).tokens == expected
        assert decoder.decode_batch([prompt, [9] * 5], 20)[0].tokens == expected
    assert not decoder.policy.faults
    signals = np.concatenate([o.signals for o in policy.outcomes])
    assert len(signals) > 9
    assert np.isfinite(signals).all()
    assert (signals[:, 1] == 0.0).all()


def test_a_prompt_of_one_token_is_read_by_a_usual_step(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[int] = []
    monkeypatch.setattr(Generation, "charge_prompt", lambda self: charged.append(len(self.tokens)))
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    decoder.generate([5], 9, eos_ids=())
    assert charged == []
    decoder.generate([5, 6], 9, eos_ids=())
    assert charged == [9]


@pytest.mark.parametrize("token", [999, -1])
def test_unknown_tokens_are_refused(tiny_pair: TinyPair, token: int) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    for call in (lambda: decoder.generate([5, token], 3), lambda: decoder.decode_batch([[5], [token]], 3)):
        with pytest.raises(UserError, match="use its own tokenizer"):
            call()
