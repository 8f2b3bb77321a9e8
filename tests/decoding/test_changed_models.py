"""Models that are changed between two texts: the next text is that of the model as it is then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from tests.support.decoding import Scripted, prompt_of
from tests.support.tiny_models import perturbed, tiny_llama

PROMPT = prompt_of(12)


def plain_now(model: PreTrainedModel, n: int = 20) -> list[int]:
    """Transformers' own answer of the model as it is now."""
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n)
    return out[0, len(PROMPT) :].tolist()


def new_eos(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = [0, plain_now(model)[5]]


def new_config(model: PreTrainedModel) -> None:
    model.generation_config = GenerationConfig(eos_token_id=plain_now(model)[3], pad_token_id=0)


def larger(model: PreTrainedModel) -> None:
    torch.manual_seed(2)
    model.resize_token_embeddings(264, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[260:].normal_(0, 1.0)
        model.get_input_embeddings().weight[260:].normal_(0, 0.3)


def double(model: PreTrainedModel) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("change", [new_eos, new_config, larger, double])
def test_the_next_text_is_of_the_changed_model(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_llama()
    draft = perturbed(model, 0.03)
    decoder = SpeculativeDecoder(draft, policy=Scripted([4, 0, 3]), target=model)
    before = decoder.generate(PROMPT, 20).tokens
    assert before == plain_now(model)
    change(model)
    expected = plain_now(model)
    assert (change is double) == (expected == before)
    assert decoder.generate(PROMPT, 20).tokens == expected
    assert [out.tokens for out in decoder.decode_batch([PROMPT, PROMPT], 20)] == [expected] * 2
    ids = torch.tensor([PROMPT])
    found = model.generate(ids, custom_generate=decoder, do_sample=False, max_new_tokens=20)
    assert found[0, len(PROMPT) :].tolist() == expected
    assert not decoder.policy.faults
    assert decoder.level == {double: "float64"}.get(change, "fp32")


def test_new_tokens_may_be_in_the_prompt_and_the_answer() -> None:
    """Ids that a resized model has now are read and said; the draft, which was resized too, proposes them."""
    model = tiny_llama()
    draft = perturbed(model, 0.02)
    decoder = SpeculativeDecoder(draft, policy=Scripted([4]), target=model)
    with pytest.raises(UserError, match="the target knows 0 to 259"):
        decoder.generate([262, 5], 4)
    larger(model)
    larger(draft)
    with torch.no_grad():
        for some in (model, draft):
            some.get_output_embeddings().weight[260:].mul_(4.0)
    ids = torch.tensor([[262, 5]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)[0, 2:]
    assert expected.max() >= 260
    assert decoder.generate([262, 5], 30).tokens == expected.tolist()
    assert decoder.totals.accepted > 0


def test_a_drafter_that_no_longer_fits_is_refused() -> None:
    model = tiny_llama()
    decoder = SpeculativeDecoder(ModelDrafter(perturbed(model, 0.02), 260), policy=Scripted([4]), target=model)
    decoder.generate(PROMPT, 4)
    model.resize_token_embeddings(200)
    with pytest.raises(UserError, match="make the drafter anew"):
        decoder.generate([5, 6], 4)


def test_no_cache_while_a_model_trains() -> None:
    model = tiny_llama()
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=model)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UserError, match="call its eval"):
        decoder.generate(PROMPT, 4)
    model.eval()
    assert decoder.generate(PROMPT, 4).tokens == plain_now(model, 4)
