"""``generate(custom_generate=decoder)`` must return what ``generate`` returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.modeling.introspection import level_of
from tests.support.decoding import plain, prompt_of
from tests.support.generate import Collect, Favour, decoder_of, inputs_of
from tests.support.tiny_models import TinyPair, tiny_llama


class After(StoppingCriteria):
    """Stops after a token, and at a number of tokens, padding included."""

    def __init__(self, token: int, length: int = 1 << 30) -> None:
        self.token, self.length = token, length

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return (input_ids[:, -1] == self.token) | (input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("draft", ["model", "drafter", "none"])
def test_greedy(tiny_pair: TinyPair, draft: str) -> None:
    given = {"model": tiny_pair.draft, "drafter": tiny_pair.drafter(), "none": None}[draft]
    decoder = SpeculativeDecoder(given, policy="fixed:3")
    prompt = prompt_of(14)
    out = tiny_pair.target.generate(**inputs_of(prompt), custom_generate=decoder, do_sample=False, max_new_tokens=30)
    assert out.shape == (1, 44)
    assert out[0].tolist() == prompt + plain(tiny_pair.target, prompt, 30)
    assert decoder.level == "fp32"
    assert decoder.last.tokens == out[0, 14:].tolist()
    assert decoder.totals.tokens == 30
    assert decoder.totals.steps == len(decoder.last.steps) <= 30
    assert (decoder.totals.drafted == 0) == (draft == "none")
    assert decoder.totals.goodput == pytest.approx(decoder.last.goodput)
    # The same object decodes by itself as well.
    assert decoder.generate(prompt, 30).tokens == decoder.last.tokens == out[0, 14:].tolist()
    assert decoder.totals.prompts == 2


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
        {"logits_processor": [Favour()], "bad_words_ids": [[9]]},
        {"generation_config": GenerationConfig(max_new_tokens=11, eos_token_id=[0, 33], pad_token_id=0)},
        {"max_length": 37, "exponential_decay_length_penalty": (5, 1.2)},
    ],
    ids=lambda o: next(iter(o)),
)
def test_processors_and_configs(tiny_pair: TinyPair, options: dict[str, Any], pads: int) -> None:
    options = {"do_sample": False, **options}
    if not options.keys() & {"generation_config", "max_length"}:
        options["max_new_tokens"] = 25
    inputs = inputs_of(prompt_of(14), pads=pads)
    expected = tiny_pair.target.generate(**inputs, **copy.deepcopy(options))
    decoder = decoder_of(tiny_pair)
    assert torch.equal(tiny_pair.target.generate(**inputs, custom_generate=decoder, **options), expected)
    assert not decoder.policy.faults


def test_returned_dict(tiny_pair: TinyPair) -> None:
    inputs, target = inputs_of(prompt_of(9)), tiny_pair.target
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.4}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = target.generate(**inputs, **options)
    found = target.generate(**inputs, custom_generate=decoder_of(tiny_pair), **options)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 28
    # The next turn may go on with the cache, with or without the decoder.
    again = {"do_sample": False, "max_new_tokens": 6}
    longer = target.generate(expected.sequences, past_key_values=expected.past_key_values, **again)
    assert torch.equal(target.generate(found.sequences, past_key_values=found.past_key_values, **again), longer)
    assert torch.equal(target.generate(found.sequences, custom_generate=decoder_of(tiny_pair), **again), longer)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_stopping(tiny_pair: TinyPair, at: int, pads: int) -> None:
    """Custom criteria and stop strings, wherever they fall in a draft."""
    prompt, target = prompt_of(10, 4), tiny_pair.target
    whole = [t for t in plain(target, prompt, 20) if tiny_pair.tokenizer.decode([t]).isascii()]
    token = whole[at]  # many tokens are only part of a character
    word = tiny_pair.tokenizer.decode([token])
    inputs: dict[str, Any] = {**inputs_of(prompt, pads=pads), "do_sample": False, "max_new_tokens": 20}
    for criterion in (After(token), After(-1, length=10 + pads + at)):
        expected = target.generate(**inputs, stopping_criteria=[criterion])
        found = target.generate(**inputs, stopping_criteria=[criterion], custom_generate=decoder_of(tiny_pair, [8]))
        assert torch.equal(found, expected)
    expected = target.generate(**inputs, stop_strings=[word], tokenizer=tiny_pair.tokenizer)
    decoder = decoder_of(tiny_pair, [8], tokenizer=tiny_pair.tokenizer)
    assert torch.equal(target.generate(**inputs, stop_strings=[word], custom_generate=decoder), expected)
    assert decoder.last.finish == "stop"
    criteria = StoppingCriteriaList([StopStringCriteria(tiny_pair.tokenizer, [word])])
    found = target.generate(**inputs, stopping_criteria=criteria, custom_generate=decoder_of(tiny_pair, [8]))
    assert torch.equal(found, expected)


def test_criteria_see_the_scores(tiny_pair: TinyPair) -> None:
    class Confident(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: object) -> torch.Tensor:
            assert len(scores) == input_ids.shape[1] - 12
            return scores[-1].softmax(-1).amax(-1) > 0.75

    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "stopping_criteria": [Confident()]}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    inputs = inputs_of(prompt_of(12, 2))
    expected = tiny_pair.target.generate(**inputs, **options)
    found = tiny_pair.target.generate(**inputs, **options, custom_generate=decoder_of(tiny_pair))
    assert torch.equal(found.sequences, expected.sequences)
    assert 12 < found.sequences.shape[1] < 52
    assert len(found.scores) == len(expected.scores)
    found.scores[0].add_(1.0)  # as those of transformers, they may be changed


def test_streamer(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(7)
    streamer = Collect()
    out = tiny_pair.target.generate(
        **inputs_of(prompt),
        custom_generate=decoder_of(tiny_pair),
        streamer=streamer,
        do_sample=False,
        max_new_tokens=20,
    )
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_sampling(tiny_pair: TinyPair) -> None:
    inputs, target = inputs_of(prompt_of(12)), tiny_pair.target

    def run(seed: int, **options: Any) -> list[int]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 25, "temperature": 1.3, "top_p": 0.9, **options}
        return target.generate(**inputs, custom_generate=decoder_of(tiny_pair), **options)[0].tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
    greedy = target.generate(**inputs, do_sample=False, max_new_tokens=25, repetition_penalty=1.5)[0].tolist()
    assert run(3, top_k=1, repetition_penalty=1.5) == greedy


def test_sampled_tokens_follow_the_targets_distribution() -> None:
    """The second of two tokens, over many rows of one call, against the target's own probabilities."""
    target = tiny_llama(vocab=6)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.3)
    draft = tiny_llama(vocab=6, seed=5)
    prompt, n = torch.tensor([[1, 2, 3]]), 400
    with torch.inference_mode():
        first = (target(prompt).logits[0, -1] / 1.5).softmax(-1)
        rows = torch.stack([torch.cat((prompt[0], torch.tensor([a]))) for a in range(6)])
        second = (target(rows).logits[:, -1] / 1.5).softmax(-1)
    truth = first @ second
    decoder = SpeculativeDecoder(draft, policy="fixed:3")
    torch.manual_seed(0)
    seen = torch.zeros(6)
    for _ in range(n):
        out = target.generate(
            prompt,
            custom_generate=decoder,
            do_sample=True,
            temperature=1.5,
            top_k=0,
            max_new_tokens=2,
            eos_token_id=None,
        )
        seen[out[0, -1]] += 1
    chi2 = float(((seen - n * truth) ** 2 / (n * truth)).sum())
    assert chi2 < 5 + 5 * 10**0.5  # mean 5, standard deviation √10 under the truth


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"stop_strings": ["x"]}, "tokenizer="),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "inputs_embeds"),
    ],
    ids=str,
)
def test_refusals(tiny_pair: TinyPair, options: dict[str, Any], reason: str) -> None:
    inputs = inputs_of(prompt_of(4))
    with pytest.raises(UserError, match=reason):
        tiny_pair.target.generate(**inputs, custom_generate=decoder_of(tiny_pair), max_new_tokens=4, **options)


def test_holes_in_the_mask_are_refused(tiny_pair: TinyPair) -> None:
    mask = torch.tensor([[1, 1, 0, 1]])
    with pytest.raises(UserError, match="on the left"):
        tiny_pair.target.generate(
            torch.tensor([[5, 6, 7, 8]]), attention_mask=mask, custom_generate=decoder_of(tiny_pair)
        )


def test_drafts_that_cannot_fit_are_refused(tiny_pair: TinyPair) -> None:
    def bind(draft: Any) -> None:
        SpeculativeDecoder(draft, policy="fixed:2", target=tiny_pair.target)

    with pytest.raises(UserError, match="260 and 400"):
        bind(tiny_llama(vocab=400))
    with pytest.raises(UserError, match="unknown policy"):
        SpeculativeDecoder(None, policy="fixd:2")
    with pytest.raises(UserError, match="no target"):
        SpeculativeDecoder(None, policy="fixed:2").generate([1], 3)


def test_tokenizers_beside_the_weights_are_compared(tiny_pair: TinyPair, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    from tests.support.tiny_models import tiny_tokenizer

    target = AutoModelForCausalLM.from_pretrained(tiny_pair.target_dir)
    draft = AutoModelForCausalLM.from_pretrained(tiny_pair.draft_dir)
    prompt = prompt_of(6)
    decoder = SpeculativeDecoder(draft, policy="fixed:2", target=target)
    assert decoder.generate(prompt, 8).tokens == plain(tiny_pair.target, prompt, 8)
    tiny_pair.draft.save_pretrained(tmp_path)
    tiny_tokenizer(words=3).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="different tokenizers"):
        SpeculativeDecoder(other, policy="fixed:2", target=target)


def test_level_of_a_model(tiny_pair: TinyPair) -> None:
    assert level_of(tiny_pair.target) == "fp32"
    assert level_of(copy.deepcopy(tiny_pair.target).bfloat16()) == "bf16"
    model = copy.deepcopy(tiny_pair.target)
    for config, name in (
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
    ):
        model.config.quantization_config = config
        assert level_of(model) == name
