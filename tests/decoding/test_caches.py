"""``past_key_values`` given to ``generate``: what transformers' plain decoding says with the same cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.pack import pack
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.hf_assistant import PolicyAssistant
from speckv_online.errors import UserError
from speckv_online.modeling.kv_cache import KVCache
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.generate import Collect, decoder_of, inputs_of
from tests.support.tiny_models import EOS, TinyPair, perturbed, tiny_llama

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any = None, **inputs: Any) -> Any:
    """Return a cache that the model read something into."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=window, eos_token_id=EOS, pad_token_id=EOS,
        bos_token_id=None, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def compare(target: PreTrainedModel, decoder: SpeculativeDecoder, inputs: dict[str, Any], cache: Any) -> tuple:
    """Decode plainly and with the decoder, each with a copy of the cache; return both answers."""
    mine, theirs = copy.deepcopy(cache), copy.deepcopy(cache)
    expected = target.generate(**inputs, past_key_values=theirs, **GREEDY)
    found = target.generate(**inputs, past_key_values=mine, custom_generate=decoder, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values is mine
    same_states(mine, theirs)
    assert not decoder.policy.faults
    return found, expected


def same_states(a: Any, b: Any) -> None:
    assert int(a.get_seq_length()) == int(b.get_seq_length())
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("draft", ["model", "none"])
@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
@pytest.mark.parametrize("made", [DynamicCache, StaticCache])
def test_a_cached_prefix(tiny_pair: TinyPair, made: type, repeated: bool, draft: str) -> None:
    target, (prompt, new) = tiny_pair.target, (prompt_of(14), prompt_of(4, 9))
    empty = StaticCache(config=target.config, max_cache_len=64) if made is StaticCache else None
    cache = read(target, empty, input_ids=torch.tensor([prompt]))
    inputs = inputs_of([*prompt, *new])
    if not repeated:
        inputs["input_ids"] = torch.tensor([new])
    policy = Scripted([4, 0, 7])
    decoder = SpeculativeDecoder(tiny_pair.draft if draft == "model" else None, policy=policy)
    found, _ = compare(target, decoder, inputs, cache)
    assert found.sequences[0, -12:].tolist() == plain(target, [*prompt, *new], 12)
    assert policy.contexts[0][2] == 18  # the context counts what the cache holds
    assert draft == "none" or decoder.totals.drafted


def test_prefix_tuning(tiny_pair: TinyPair) -> None:
    """States that no ids stand for; with a mask that counts them, and, as for plain decoding, without one."""
    target = tiny_pair.target
    torch.manual_seed(0)
    cache = read(target, inputs_embeds=torch.randn(1, 6, 64) * 0.5)
    ids = torch.tensor([prompt_of(14)])
    found, _ = compare(
        target, decoder_of(tiny_pair), {"input_ids": ids, "attention_mask": torch.ones(1, 20).long()}, cache
    )
    assert found.sequences[0, 14:].tolist() != plain(target, prompt_of(14), 12)
    compare(target, decoder_of(tiny_pair), {"input_ids": ids}, cache)


def test_an_empty_cache_is_the_callers_afterwards(tiny_pair: TinyPair) -> None:
    target, inputs = tiny_pair.target, inputs_of(prompt_of(14))
    for cache in (
        DynamicCache(),
        DynamicCache(config=target.config),
        StaticCache(config=target.config, max_cache_len=40),
    ):
        compare(target, decoder_of(tiny_pair), inputs, cache)


@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
def test_turns_of_a_chat(tiny_pair: TinyPair, repeated: bool) -> None:
    """The returned cache, turn after turn, by this decoder and by plain decoding in turns."""
    target, decoder = tiny_pair.target, SpeculativeDecoder(tiny_pair.draft, policy=Scripted([5]))
    text, cache = prompt_of(9), None
    for turn in range(4):
        text = [*text, *prompt_of(5, turn)]
        inputs = inputs_of(text)
        if cache is not None and not repeated:
            inputs["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() :]
        options = GREEDY | ({} if cache is None else {"past_key_values": cache})
        if turn != 2:
            options["custom_generate"] = decoder
        out = target.generate(**inputs, **options)
        assert out.sequences[0, -12:].tolist() == plain(target, text, 12)
        assert cache is None or out.past_key_values is cache
        text, cache = [*text, *plain(target, text, 12)], out.past_key_values
        assert cache.get_seq_length() == len(text) - 1
    # The drafter knew the turns before, though their ids were not given, as long as this decoder kept the cache.
    assert decoder.totals.accepted > 6


def test_the_drafter_reads_what_the_cache_holds(tiny_pair: TinyPair) -> None:
    """With the ids known, as many drafts are right as with all tokens given; the model itself drafts all right."""
    target = tiny_pair.target
    decoder = SpeculativeDecoder(perturbed(target, 0.0), policy=Scripted([6]))
    first = target.generate(**inputs_of(prompt_of(20)), custom_generate=decoder, **GREEDY)
    again = [*first.sequences[0].tolist(), *prompt_of(3, 7)]
    held = first.past_key_values.get_seq_length()
    before = decoder.totals.drafted, decoder.totals.accepted
    inputs = inputs_of(again) | {"input_ids": torch.tensor([again[held:]])}
    target.generate(**inputs, custom_generate=decoder, past_key_values=copy.deepcopy(first.past_key_values), **GREEDY)
    drafted, accepted = decoder.totals.drafted - before[0], decoder.totals.accepted - before[1]
    assert accepted == drafted > 0


def test_a_streamer_and_sampling_go_on_too(tiny_pair: TinyPair) -> None:
    target, prompt, new = tiny_pair.target, prompt_of(14), prompt_of(4, 9)
    cache, streamer = read(target, input_ids=torch.tensor([prompt])), Collect()
    inputs = inputs_of([*prompt, *new]) | {"input_ids": torch.tensor([new])}
    target.generate(
        **inputs,
        past_key_values=copy.deepcopy(cache),
        custom_generate=decoder_of(tiny_pair),
        streamer=streamer,
        **GREEDY,
    )
    assert streamer.tokens == [*new, *plain(target, [*prompt, *new], 12)]
    found = target.generate(
        **inputs,
        past_key_values=cache,
        custom_generate=decoder_of(tiny_pair),
        **GREEDY | {"do_sample": True, "top_k": 1},
    )
    assert found.sequences[0, 4:].tolist() == plain(target, [*prompt, *new], 12)


@pytest.mark.parametrize("held", [5, 11, 30])
@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
def test_sliding_windows(held: int, repeated: bool) -> None:
    """Caches that have lost what lies before the window."""
    target = mistral(window=12)
    prompt, new = prompt_of(held), prompt_of(6, 9)
    cache = read(target, input_ids=torch.tensor([prompt]))
    inputs = inputs_of([*prompt, *new])
    if not repeated:
        inputs["input_ids"] = torch.tensor([new])
    decoder = SpeculativeDecoder(perturbed(target, 0.03), policy=Scripted([4, 0, 7]))
    found, _ = compare(target, decoder, inputs, cache)
    # The cache that the decoder makes itself is of transformers' own kind, and goes on as well.
    first = target.generate(**inputs_of(prompt), custom_generate=decoder, **GREEDY)
    theirs = target.generate(**inputs_of(prompt), **GREEDY)
    same_states(first.past_key_values, theirs.past_key_values)
    assert found.sequences.shape[1] > 6


@pytest.mark.parametrize("ends", [False, True], ids=["to the end", "rows end"])
@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
def test_batches(tiny_pair: TinyPair, repeated: bool, ends: bool) -> None:
    """Padded rows; a row that ends early reads padding in the cache, as it does in plain decoding."""
    target, prompts = tiny_pair.target, [prompt_of(5, 1), prompt_of(14, 2), prompt_of(9, 3)]
    first = inputs_of(*prompts, pads=2)
    options = dict(GREEDY)
    if ends:
        options |= {"eos_token_id": plain(target, prompts[0], 12)[4], "pad_token_id": 3}
    theirs = target.generate(**first, **options)
    found = target.generate(**first, custom_generate=decoder_of(tiny_pair), **options)
    assert torch.equal(found.sequences, theirs.sequences)
    assert not ends or (theirs.sequences == 3).any()
    seen = first["attention_mask"].bool()
    mask = torch.cat((first["attention_mask"], torch.ones(3, 12 + 4).long()), 1)[:, : theirs.sequences.shape[1] + 4]
    held = theirs.past_key_values.get_seq_length()
    assert held == found.past_key_values.get_seq_length() == theirs.sequences.shape[1] - 1
    visible = mask[:, :held].bool()[:, None, :, None].expand(theirs.past_key_values.layers[0].keys.shape)
    for a, b in zip(found.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys[visible], b.keys[visible], atol=1e-4, rtol=1e-4)
    assert not seen.all()
    # The next turn, with either cache: the decoder and plain decoding say the same.
    new = torch.tensor([prompt_of(4, seed) for seed in (4, 5, 6)])
    ids = torch.cat((theirs.sequences, new), 1)
    inputs = {"input_ids": ids if repeated else ids[:, held:], "attention_mask": mask}
    expected = target.generate(**inputs, past_key_values=copy.deepcopy(theirs.past_key_values), **options)
    for cache in (found.past_key_values, theirs.past_key_values):
        mine, plainly = copy.deepcopy(cache), copy.deepcopy(cache)
        again = target.generate(**inputs, past_key_values=mine, custom_generate=decoder_of(tiny_pair), **options)
        assert torch.equal(again.sequences, expected.sequences)
        target.generate(**inputs, past_key_values=plainly, **options)
        assert mine.get_seq_length() == plainly.get_seq_length()
        for a, b in zip(mine.layers, plainly.layers, strict=True):
            rows = torch.cat((mask, torch.ones(3, 12).long()), 1)[:, : a.keys.shape[2]].bool()
            torch.testing.assert_close(a.keys.transpose(1, 2)[rows], b.keys.transpose(1, 2)[rows], atol=1e-4, rtol=1e-4)


def test_a_single_padded_row(tiny_pair: TinyPair) -> None:
    target, inputs = tiny_pair.target, inputs_of(prompt_of(7), pads=3)
    found = target.generate(**inputs, custom_generate=decoder_of(tiny_pair), **GREEDY)
    theirs = target.generate(**inputs, **GREEDY)
    assert found.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    ids = torch.cat((theirs.sequences, torch.tensor([prompt_of(3, 8)])), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(1, 15).long()), 1)
    for given in (ids, ids[:, found.past_key_values.get_seq_length() :]):
        turn = {"input_ids": given, "attention_mask": mask}
        expected = target.generate(**turn, past_key_values=copy.deepcopy(theirs.past_key_values), **GREEDY)
        for decoder in (None, decoder_of(tiny_pair)):
            out = target.generate(
                **turn, past_key_values=copy.deepcopy(found.past_key_values), custom_generate=decoder, **GREEDY
            )
            assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
def test_inside_transformers_assisted_generation(tiny_pair: TinyPair, repeated: bool) -> None:
    target, (prompt, new) = tiny_pair.target, (prompt_of(14), prompt_of(4, 9))
    cache = read(target, input_ids=torch.tensor([prompt]))
    inputs = inputs_of([*prompt, *new])
    if not repeated:
        inputs["input_ids"] = torch.tensor([new])
    expected = target.generate(**inputs, past_key_values=copy.deepcopy(cache), **GREEDY)
    policy = Scripted([4, 0, 7])
    assistant = PolicyAssistant(policy)
    with assistant.attached_to(target):
        found = target.generate(**inputs, past_key_values=cache, assistant_model=tiny_pair.draft, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values is cache
    assert cache.get_seq_length() == expected.past_key_values.get_seq_length()
    assert policy.contexts[0][2] == 18
    assert not assistant.policy.faults
    assert "prepare_inputs_for_generation" not in vars(target)
    with assistant.attached_to(target), pytest.raises(UserError, match="crop the cache"):
        target.generate(**inputs_of(prompt), past_key_values=cache, assistant_model=tiny_pair.draft, **GREEDY)


def test_a_cache_of_the_decoders_own(tiny_pair: TinyPair) -> None:
    """The same cache, call after call of the decoder itself."""
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Scripted([4]), target=tiny_pair.target)
    cache, text = KVCache(decoder.layers, 8), prompt_of(9)
    for turn in range(3):
        text = [*text, *prompt_of(3, turn)]
        out = decoder.generate(text, 10, cache=cache)
        assert out.tokens == plain(tiny_pair.target, text, 10)
        text += out.tokens
        assert len(cache) == len(text) - 1
    with pytest.raises(UserError, match="longer prompt"):
        decoder.generate(text[:5], 10, cache=cache)


def test_what_cannot_be_gone_on_from_is_refused(tiny_pair: TinyPair) -> None:
    target, prompt = tiny_pair.target, prompt_of(14)
    cache = read(target, input_ids=torch.tensor([prompt]))
    two = read(target, input_ids=torch.tensor([prompt, prompt]))
    wider = torch.ones(1, 40).long()
    cases: list[tuple[dict[str, Any], Any, str]] = [
        (inputs_of(prompt), cache, "crop the cache"),
        (inputs_of(prompt[:9]), cache, "holds 14 tokens, input_ids only 9"),
        (inputs_of([*prompt, 5]) | {"attention_mask": wider}, cache, r"\(1, 15\) or, with the cache's 14"),
        (inputs_of([*prompt, 5]), two, "of 2 sequences"),
        (inputs_of([*prompt, 5]), EncoderDecoderCache(cache, cache), "EncoderDecoderCache"),
        (inputs_of([*prompt, 5]), StaticCache(config=target.config, max_cache_len=20), "room for 20 tokens"),
    ]
    for inputs, given, reason in cases:
        with pytest.raises(UserError, match=reason):
            target.generate(**inputs, past_key_values=given, custom_generate=decoder_of(tiny_pair), **GREEDY)


@pytest.mark.skipif(lanes() is None, reason="no kernels for this processor")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("repeated", [True, False], ids=["all tokens", "new tokens only"])
def test_packed_models_go_on_too(rows: int, repeated: bool) -> None:
    """The forward in one call reads on from what transformers read; another model's cache never reaches it."""
    stock, packed, other = tiny_llama(head_dim=32), tiny_llama(head_dim=32), tiny_llama(head_dim=16)
    pack(packed)
    assert hasattr(packed, "_compiled")
    ids = torch.tensor([prompt_of(30, seed) for seed in range(rows)])
    cache = read(stock, input_ids=ids[:, :20])
    inputs = {"input_ids": ids if repeated else ids[:, 20:], "attention_mask": torch.ones_like(ids)}
    mine, theirs = copy.deepcopy(cache), copy.deepcopy(cache)
    decoder = SpeculativeDecoder(perturbed(stock, 0.03), policy=Scripted([4, 0, 7]))
    expected = stock.generate(**inputs, past_key_values=theirs, **GREEDY)
    found = packed.generate(**inputs, past_key_values=mine, custom_generate=decoder, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert decoder.totals.drafted
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=5e-2, rtol=5e-2)
    wrong = read(other, input_ids=ids[:, :20])
    with pytest.raises(UserError, match="another model's"):
        packed.generate(**inputs, past_key_values=wrong, custom_generate=decoder, **GREEDY)
