"""Long prompts, special tokens, stop strings of several tokens, vocabularies of other sizes, and the GPU path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.generate import decoder_of, inputs_of
from tests.support.tiny_models import EOS, TinyPair, perturbed, tiny_llama


def test_a_prompt_of_4000_tokens() -> None:
    target = tiny_llama(layers=1, positions=4096)
    prompt = prompt_of(4000)
    decoder = SpeculativeDecoder(perturbed(target, 0.03), policy=Scripted([4, 0, 7]), target=target)
    expected = plain(target, prompt, 16)
    assert decoder.generate(prompt, 16).tokens == expected
    found = decoder.decode_batch([prompt, prompt[:9]], 16)
    assert [out.tokens for out in found] == [expected, plain(target, prompt[:9], 16)]
    for drafter in (NgramDrafter(), HybridDrafter(perturbed(target, 0.03), 260)):
        decoder = SpeculativeDecoder(drafter, policy=Scripted([4, 0, 7]), target=target)
        assert decoder.generate(prompt, 16).tokens == expected
        assert any(s.drafted for s in decoder.last.steps)


def test_special_tokens_in_the_prompt(tiny_pair: TinyPair) -> None:
    """An end of sequence in the prompt ends nothing, alone, in a batch and inside transformers."""
    prompt = [EOS, *prompt_of(5), EOS, EOS, *prompt_of(4, 1), EOS]
    expected = plain(tiny_pair.target, prompt, 12)
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Scripted([5]), target=tiny_pair.target)
    assert decoder.generate(prompt, 12).tokens == expected
    assert decoder.decode_batch([prompt, [EOS]], 12)[0].tokens == expected
    ids = torch.tensor([prompt])
    out = tiny_pair.target.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=decoder, do_sample=False, max_new_tokens=12
    )
    assert out[0, len(prompt) :].tolist() == expected


def test_an_empty_prompt_is_refused(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2")
    ids = torch.tensor([[EOS, EOS]])
    with pytest.raises(UserError, match="prompt is empty"):
        tiny_pair.target.generate(ids, attention_mask=torch.zeros_like(ids), custom_generate=decoder)


@pytest.mark.parametrize("kind", [ModelDrafter, HybridDrafter])
@pytest.mark.parametrize("vocab", [256, 268])
@pytest.mark.parametrize("sampled", [False, True])
def test_padded_vocabularies(kind: type[ModelDrafter], vocab: int, sampled: bool) -> None:
    """A draft whose embedding is padded to another size than the target's, with tokens that it cannot read."""
    target, draft = tiny_llama(), tiny_llama(seed=2, vocab=vocab)
    with torch.no_grad():
        draft.lm_head.weight[vocab - 8 :] *= 20
    prompt = [259, *prompt_of(6), 258]
    policy = Scripted([4])
    decoder = SpeculativeDecoder(kind(draft, 260), policy=policy, target=target)
    options: dict[str, Any] = {"sampler": Sampler(top_k=1)} if sampled else {}
    assert decoder.generate(prompt, 16, **options).tokens == plain(target, prompt, 16)
    batch: dict[str, Any] = {"samplers": [Sampler(top_k=1)] * 2} if sampled else {}
    found = decoder.decode_batch([prompt, [257, 3]], 16, **batch)
    assert [out.tokens for out in found] == [plain(target, prompt, 16), plain(target, [257, 3], 16)]
    assert not decoder.policy.faults


def test_a_draft_with_a_shorter_context_stops_drafting_there(tiny_pair: TinyPair) -> None:
    """The target goes on alone where the draft's positions end."""
    policy = Scripted([6])
    draft = tiny_llama(seed=5, positions=30)
    decoder = SpeculativeDecoder(draft, policy=policy, target=tiny_pair.target)
    for length in (10, 40):
        prompt = prompt_of(length)
        out = decoder.generate(prompt, 40)
        assert out.tokens == plain(tiny_pair.target, prompt, 40)
        assert all(s.context_length + s.drafted <= 30 for s in out.steps if s.drafted)
    assert not out.steps[0].drafted


def test_a_stop_string_over_several_tokens(tiny_pair: TinyPair) -> None:
    """It is found wherever its tokens lie: in one draft, or over two steps."""
    prompt, target = prompt_of(10, 4), tiny_pair.target
    answer = plain(target, prompt, 20)
    readable = [tiny_pair.tokenizer.decode([t]).isascii() for t in answer]
    at = next(i for i in range(1, 18) if readable[i] and readable[i + 1])
    word = tiny_pair.tokenizer.decode(answer[at : at + 2])
    inputs: dict[str, Any] = {**inputs_of(prompt), "do_sample": False, "max_new_tokens": 20, "stop_strings": [word]}
    expected = target.generate(**inputs, tokenizer=tiny_pair.tokenizer)
    assert 11 < expected.shape[1] < 30
    for gamma in (0, 1, 2, 3, 8):
        decoder = decoder_of(tiny_pair, [gamma], tokenizer=tiny_pair.tokenizer)
        assert torch.equal(target.generate(**inputs, custom_generate=decoder), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Both models on the GPU, the draft alone on the CPU, alone, in a batch and sampled; times come from events."""
    target = tiny_llama().to("cuda", dtype)
    for draft in (perturbed(target, 0.03), perturbed(target, 0.03).to("cpu", torch.float32)):
        for ask_per_token in (False, True):
            policy = Scripted([4, 0, 7], ask_per_token=ask_per_token)
            decoder = SpeculativeDecoder(ModelDrafter(draft, 260), policy=policy, target=target)
            prompt = prompt_of(12)
            out = decoder.generate(prompt, 24)
            assert all(s.seconds >= s.verify_seconds > 0 for s in out.steps)
            found = decoder.decode_batch([prompt, prompt[:5]], 24)
            assert not decoder.policy.faults
            if dtype == torch.float32:
                ids = torch.tensor([prompt], device="cuda")
                expected = target.generate(ids, do_sample=False, max_new_tokens=24)[0, 12:].tolist()
                assert out.tokens == found[0].tokens == expected
            sampler = Sampler(seed=1, device="cuda")
            if draft.device.type == "cuda":
                assert len(decoder.generate(prompt, 10, eos_ids=(), sampler=sampler).tokens) == 10


@pytest.mark.parametrize("finish", ["eos", "stop"])
def test_the_cache_lacks_the_last_token_where_a_draft_holds_the_end(tiny_pair: TinyPair, finish: str) -> None:
    prompt = prompt_of(15, 5)
    reference = plain(tiny_pair.target, prompt, 30)
    decoder = SpeculativeDecoder(tiny_pair.target, policy=Scripted([8]), target=tiny_pair.target)
    cache = KVCache(decoder.layers, 60)
    end = reference[4]
    ends = {"eos_ids": [end]} if finish == "eos" else {"eos_ids": (), "should_stop": lambda ids: ids[-1] == end}
    out = decoder.generate(prompt, 30, cache=cache, **ends)
    assert out.finish == finish
    assert out.steps[-1].produced == 5
    assert out.steps[-1].drafted == (5 if finish == "eos" else 8)  # nothing is drafted after an end of sequence
    assert len(cache) == len(prompt) + len(out.tokens) - 1


def test_what_is_no_draft_and_gammas_past_the_largest_are_refused(tiny_pair: TinyPair) -> None:
    for wrong, message in (({"draft": "org/name"}, "load it first"), ({"max_gamma": 17}, "from 0 to 16")):
        options: dict[str, Any] = {"draft": tiny_pair.draft, "policy": "fixed:4", "target": tiny_pair.target} | wrong
        with pytest.raises(UserError, match=message):
            SpeculativeDecoder(options.pop("draft"), **options)
