"""Families that the decoder does not know are tried first, and refused where they differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_families import tiny_model
from tests.support.tiny_models import perturbed, tiny_llama


class OwnMask(LlamaForCausalLM):
    """Makes nothing of a mask that has more than two dimensions, as families with masks of their own do."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if attention_mask is not None and attention_mask.dim() > 2:
            attention_mask = None
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class OneByOne(LlamaForCausalLM):
    """Answers for one token after the prompt only: further ones are read as if nothing had been before them."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if past_key_values is not None and past_key_values.get_seq_length() and input_ids.shape[1] > 1:
            kwargs["position_ids"] = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


def of_class(kind: type[LlamaForCausalLM]) -> PreTrainedModel:
    model = tiny_llama()
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def decoder_of(model: PreTrainedModel) -> SpeculativeDecoder:
    return SpeculativeDecoder(perturbed(model, 0.03), policy=Scripted([3, 0, 4]), target=model)


def test_a_family_that_reads_drafts_in_another_way_is_refused() -> None:
    model = of_class(OneByOne)
    decoder = decoder_of(model)
    with pytest.raises(UserError, match=r"a OneByOne, which does not decode here .* with transformers instead"):
        decoder.generate(prompt_of(9), 8)
    assert decoder.totals.prompts == 0


def test_a_family_that_takes_no_mask_of_ours_decodes_one_prompt_at_a_time() -> None:
    model = of_class(OwnMask)
    decoder, prompts = decoder_of(model), [prompt_of(9), prompt_of(4)]
    assert decoder.generate(prompts[0], 12).tokens == plain(model, prompts[0], 12)
    with pytest.raises(UserError, match=r"a OwnMask, which does not decode in batches .* one prompt at a time"):
        decoder.decode_batch(prompts, 12)


def test_a_plain_llama_is_not_tried() -> None:
    model, calls = tiny_llama(), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=model)
    decoder.generate(prompt_of(9), 5)
    assert len(calls) == 5


def test_a_family_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speckv_online.modeling.family_check._found", {})
    model, calls = tiny_model("gpt_neox"), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=model)
    counts = []
    for _ in range(2):
        calls.clear()
        decoder.generate([5, 9, 11, 20, 31], 5, eos_ids=[])
        counts.append(len(calls))
    assert counts[0] > counts[1] == 5


def test_a_window_is_tried_when_a_text_reaches_past_it() -> None:
    """GPT-Neo makes its window out of row numbers: rows of a batch are right only within it."""
    model = tiny_model("gpt_neo")
    decoder = decoder_of(model)
    long, short = [5, 9, 11, 20, 31, 8, 3, 60, 41, 2, 17], [5, 9]
    assert decoder.generate(long, 10).tokens == plain(model, long, 10)
    assert decoder.generate(short, 4).tokens == plain(model, short, 4)
    with pytest.raises(UserError, match="a GPTNeoForCausalLM, which does not decode in batches"):
        decoder.decode_batch([long, short], 10)


@pytest.mark.parametrize("family", ["whisper", "roberta", "bloom", "falcon, alibi", "bart", "xglm"])
def test_families_with_positions_of_their_own(family: str) -> None:
    model = tiny_model(family)
    model.generation_config.forced_eos_token_id = None
    decoder = decoder_of(model)
    prompt = [5, 9, 11, 20, 31, 8, 3, 60, 41]
    assert decoder.generate(prompt, 14).tokens == plain(model, prompt, 14)
    assert decoder.totals.drafted > 0
    assert not decoder.policy.faults


@pytest.mark.parametrize("family", ["openai-gpt", "xlm", "xlnet"])
def test_families_without_a_cache_are_refused(family: str) -> None:
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=tiny_model(family))
    with pytest.raises(UserError, match="decode with transformers instead"):
        decoder.generate([5, 9, 11], 4)
