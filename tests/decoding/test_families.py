"""Greedy identity for model families with other positions, attention and heads than Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_models import perturbed

WINDOW = 8
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, **_HEADS},
    "qwen2": {"num_hidden_layers": 2, **_HEADS},
    "qwen2-sliding": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        **_HEADS,
    },
    "qwen3": {"num_hidden_layers": 2, **_HEADS},
    "mistral": {"num_hidden_layers": 2, "sliding_window": None, **_HEADS},
    "mistral-sliding": {"num_hidden_layers": 2, "sliding_window": WINDOW, **_HEADS},
    "gemma": {"num_hidden_layers": 2, **_HEADS},
    "gemma2": {"num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, **_HEADS},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 2,
        **_HEADS,
    },
    "phi3": {
        "num_hidden_layers": 2,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
        **_HEADS,
    },
    "gpt2": {"n_layer": 2, "n_head": 4, "n_positions": 128},
}


def family(name: str, **options: Any) -> PreTrainedModel:
    """A tiny random model of a family; names in ``-sliding`` see the latest 8 tokens only in some layers or all."""
    kind = name.removesuffix("-sliding")
    torch.manual_seed(3)
    settings = {"vocab_size": 260, "hidden_size": 64, "max_position_embeddings": 128, "initializer_range": 0.15}
    settings |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[kind](**settings | FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 0
    return model


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "phi3"])
def test_greedy_identity(name: str) -> None:
    """Token by token against ``generate``, far beyond the sliding window, alone and in a batch."""
    target = family(name)
    config = target.config
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    assert (sliding or name == "mistral-sliding") == (name in ("gemma2", "gemma3_text") or "-sliding" in name)
    policy = Scripted([4, 0, 9, 2, 16, 0, 0, 0, 5])
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=policy, target=target)
    prompts = [prompt_of(n, n) for n in (1, 20)]
    expected = [plain(target, p, 32) for p in prompts]
    assert len({t for tokens in expected for t in tokens}) > 5
    assert [decoder.generate(p, 32).tokens for p in prompts] == expected
    assert [out.tokens for out in decoder.decode_batch(prompts, 32)] == expected
    assert 0 < decoder.totals.accepted < decoder.totals.drafted
    assert not decoder.policy.faults


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_eager_attention(name: str) -> None:
    target = family(name, attn_implementation="eager")
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=Scripted([5, 0, 3]), target=target)
    prompts = [prompt_of(n, n) for n in (20, 3)]
    expected = [plain(target, p, 24) for p in prompts]
    assert [decoder.generate(p, 24).tokens for p in prompts] == expected
    assert [out.tokens for out in decoder.decode_batch(prompts, 24)] == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding"])
def test_up_to_the_last_position(name: str) -> None:
    """Answers that end with the model's context, and a prompt that fills it: one more token can be told."""
    target = family(name)
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=Scripted([8, 3]), target=target)
    for length in (128, 127, 126, 110):
        prompt = prompt_of(length, length)
        assert decoder.generate(prompt, 99).tokens == plain(target, prompt, max(128 - length, 1))
    prompts = [prompt_of(128, 128), prompt_of(127, 127), prompt_of(90, 90)]
    found = decoder.decode_batch(prompts, 99)
    assert [out.tokens for out in found] == [plain(target, p, max(128 - len(p), 1)) for p in prompts]
    assert not decoder.policy.faults


@pytest.mark.parametrize("gammas", [[0], [4, 0, 9]], ids=str)
def test_rotary_frequencies_that_change_on_the_way(gammas: list[int]) -> None:
    """Phi-3's longrope: no draft crosses the switch, past which everything is read anew, as in ``generate``."""
    target = family("phi3")
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=Scripted(gammas), target=target)
    for length in (20, 32, 33):
        prompt = prompt_of(length, length)
        assert decoder.generate(prompt, 24).tokens == plain(target, prompt, 24)
    short = [prompt_of(5), prompt_of(9)]
    assert [out.tokens for out in decoder.decode_batch(short, 12)] == [plain(target, p, 12) for p in short]
    with pytest.raises(UserError, match="one prompt at a time"):
        decoder.decode_batch(short, 40)
    assert not decoder.policy.faults


def test_models_of_several_parts() -> None:
    """Gemma 3's larger models hold their language model beside an image part, as targets and as drafts."""
    shared = {"vocab_size": 260, "hidden_size": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    text = {**shared, **FAMILIES["gemma3_text"], "max_position_embeddings": 128, "initializer_range": 0.15}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14})
    torch.manual_seed(3)
    target = AutoModelForCausalLM.from_config(config).eval()
    assert target.get_decoder() is not target.base_model
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = 0, 0
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=Scripted([4, 0, 9]), target=target)
    prompts = [prompt_of(20), prompt_of(3)]
    expected = [plain(target, p, 24) for p in prompts]
    assert [decoder.generate(p, 24).tokens for p in prompts] == expected
    assert [out.tokens for out in decoder.decode_batch(prompts, 24)] == expected
    assert decoder.totals.accepted


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2"])
def test_a_sliding_models_cache_can_be_gone_on_with(name: str) -> None:
    """The cache that ``generate`` hands back after rejected drafts beyond the window serves the next call."""
    target, ids = family(name), torch.tensor([prompt_of(20)])
    decoder = SpeculativeDecoder(perturbed(target, 0.05), policy=Scripted([4, 0, 7]))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    found = target.generate(ids, custom_generate=decoder, **options)
    again = target.generate(found.sequences, past_key_values=found.past_key_values, do_sample=False, max_new_tokens=10)
    assert again[0, 20:].tolist() == plain(target, prompt_of(20), 22)
