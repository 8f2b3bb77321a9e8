"""A policy inside transformers' own assisted generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from policies.base import NGRAM
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.hf_assistant import PolicyAssistant
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_models import TinyPair, perturbed


def run(pair: TinyPair, policy: Any, prompt: list[int], draft: Any = None, **options: Any) -> Any:
    assistant = PolicyAssistant(policy)
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": 30, **options}
    with assistant.attached_to(pair.target):
        out = pair.target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=draft or pair.draft, **options
        )
    return out[0, len(prompt) :].tolist(), assistant


@pytest.mark.parametrize("gammas", [[4], [0, 0, 7, 0, 2], [16, 1]], ids=str)
def test_the_policy_sets_gamma(tiny_pair: TinyPair, gammas: list[int]) -> None:
    prompt = prompt_of(9, 4)
    policy = Scripted(gammas)
    tokens, assistant = run(tiny_pair, policy, prompt)
    assert tokens == plain(tiny_pair.target, prompt, 30) == assistant.last.tokens
    assert not assistant.policy.faults
    for record, (*_, max_gamma, remaining) in zip(assistant.last.steps, policy.contexts, strict=True):
        assert record.drafted == min(gammas[record.step % len(gammas)], max_gamma)
        assert max_gamma == min(16, remaining - 1)
    # The decoder of this package, at the same gammas, takes the same steps.
    other = Scripted(gammas)
    SpeculativeDecoder(tiny_pair.draft, policy=other, target=tiny_pair.target).generate(prompt, 30)
    steps = [(o.drafted, o.accepted, o.labelled, o.produced, o.caught_up) for o in other.outcomes]
    assert [(o.drafted, o.accepted, o.labelled, o.produced) for o in policy.outcomes] == [s[:4] for s in steps]
    for mine, reference in zip(policy.outcomes, other.outcomes, strict=True):
        assert mine.signals[:, :NGRAM] == pytest.approx(reference.signals[:, :NGRAM], rel=1e-3, abs=1e-3)
        assert mine.signals[:, NGRAM].tolist() == reference.signals[:, NGRAM].tolist()
    first, *later = policy.outcomes
    assert not first.seconds  # it read the prompt too
    assert all(o.seconds >= o.draft_seconds + o.verify_seconds > 0 for o in later)
    assert all(0 < o.policy_seconds < o.seconds for o in later)
    assert all(s.seconds >= s.draft_seconds + s.verify_seconds > 0 for s in assistant.last.steps)


def test_stopping_policies(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(10, 3)
    policy, other = Scripted([12], ask_per_token=True), Scripted([12], ask_per_token=True)
    tokens, assistant = run(tiny_pair, policy, prompt)
    assert tokens == plain(tiny_pair.target, prompt, 30)
    SpeculativeDecoder(tiny_pair.draft, policy=other, target=tiny_pair.target).generate(prompt, 30)
    assert [o.drafted for o in policy.outcomes] == [o.drafted for o in other.outcomes]
    assert len({o.drafted for o in policy.outcomes}) > 1
    assert not assistant.policy.faults


def test_ends_and_sampling(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(10, 3)
    reference = plain(tiny_pair.target, prompt, 30)
    policy = Scripted([6])
    tokens, _ = run(tiny_pair, policy, prompt, draft=tiny_pair.target, eos_token_id=reference[8], pad_token_id=0)
    assert tokens == reference[: reference.index(reference[8]) + 1]
    assert not any(o.rejected for o in policy.outcomes)
    assistants = []
    for _ in range(2):
        torch.manual_seed(5)
        tokens, assistant = run(tiny_pair, "svip", prompt, do_sample=True)
        assistants.append(tokens)
        assert not assistant.policy.faults
    assert assistants[0] == assistants[1]
    # A cut that leaves one token: its margin to the next is infinite, which must not get into what is learnt.
    _, assistant = run(tiny_pair, "online", prompt, do_sample=True, top_p=0.05, max_new_tokens=60)
    assert not assistant.policy.faults
    assert all(np.isfinite(value).all() for value in assistant.policy.state_dict().values())


def test_the_model_is_left_as_it_was(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(5)
    assistant = PolicyAssistant("fixed:3")
    ids = torch.tensor([prompt])
    with pytest.raises(ZeroDivisionError), assistant.attached_to(tiny_pair.target):
        raise ZeroDivisionError
    assert "_get_candidate_generator" not in vars(tiny_pair.target)
    with assistant.attached_to(tiny_pair.target):
        for _ in range(2):
            tiny_pair.target.generate(ids, assistant_model=tiny_pair.draft, do_sample=False, max_new_tokens=8)
        # Another kind of candidates is none of the policy's business.
        found = tiny_pair.target.generate(ids, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=8)
    assert found[0, 5:].tolist() == plain(tiny_pair.target, prompt, 8)
    assert assistant.totals.prompts == 1
    assert assistant.totals.tokens == len(assistant.last.tokens) == 8
    inner = PolicyAssistant("fixed:2")
    with assistant.attached_to(tiny_pair.target):
        with inner.attached_to(tiny_pair.target):
            pass
        tiny_pair.target.generate(ids, assistant_model=tiny_pair.draft, do_sample=False, max_new_tokens=6)
    assert (len(assistant.last.tokens), inner.last.tokens) == (6, [])
    assert "_get_candidate_generator" not in vars(tiny_pair.target)


@pytest.mark.parametrize("gammas", [[4], [4, 0, 7, 2]], ids=str)
def test_an_assistant_with_a_sliding_window(gammas: list[int]) -> None:
    """Past its window a cache cannot be cropped twice in a step."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=8, eos_token_id=None, bos_token_id=None,
        pad_token_id=0, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    target = MistralForCausalLM(config).eval()
    for scale in (0.003, 0.02):
        draft, prompt = perturbed(target, scale), prompt_of(20, 4)
        ids, policy = torch.tensor([prompt]), Scripted(gammas)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
        wanted = target.generate(ids, **options)
        with PolicyAssistant(policy).attached_to(target) as assistant:
            out = target.generate(ids, assistant_model=draft, **options)
        assert out.tolist() == wanted.tolist()
        assert not assistant.policy.faults
