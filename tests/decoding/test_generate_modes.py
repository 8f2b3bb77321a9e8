"""Arguments of ``generate`` that few pass, processors inside sampled drafts, and a policy that decoders share."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
)

from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.generate import Favour, decoder_of, inputs_of
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


@pytest.mark.parametrize("pads", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 7},
        {"forced_eos_token_id": 7, "max_length": 30},
        {"min_length": 30, "eos_token_id": [0, 20, 27], "pad_token_id": 0},
        {"sequence_bias": [[[9], -5.0], [[245, 27], -9.0], [[12, 14], 4.0]]},
        {"suppress_tokens": [27, 29], "begin_suppress_tokens": [245]},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 3.0, "seeding_scheme": "selfhash"}},
        {"renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.3},
        {"max_length": 500, "max_time": 1000.0},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
    ],
    ids=lambda o: "+".join(o),
)
def test_greedy_arguments(tiny_pair: TinyPair, options: dict[str, Any], pads: int) -> None:
    options = {"do_sample": False, **({} if options.get("max_length") == 30 else {"max_new_tokens": 18}), **options}
    inputs = inputs_of(prompt_of(14), pads=pads)
    expected = tiny_pair.target.generate(**inputs, **copy.deepcopy(options))
    decoder = decoder_of(tiny_pair)
    assert torch.equal(tiny_pair.target.generate(**inputs, custom_generate=decoder, **options), expected)
    assert decoder.totals.accepted
    assert not decoder.policy.faults


def test_the_models_own_generation_config(tiny_pair: TinyPair) -> None:
    """What a model's generation config asks for holds without being asked for in the call."""
    target, inputs = copy.deepcopy(tiny_pair.target), inputs_of(prompt_of(14))
    config = target.generation_config
    config.do_sample, config.top_k, config.max_new_tokens, config.repetition_penalty = True, 1, 17, 1.5
    expected = tiny_pair.target.generate(**inputs, do_sample=False, max_new_tokens=17, repetition_penalty=1.5)
    assert torch.equal(target.generate(**inputs, custom_generate=decoder_of(tiny_pair)), expected)
    config.top_k, config.temperature = 0, 1.5
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(target.generate(**inputs, custom_generate=decoder_of(tiny_pair))[0].tolist())
    assert runs[0] == runs[1] != runs[2]
    found = target.generate(**inputs, custom_generate=decoder_of(tiny_pair), do_sample=False, repetition_penalty=1.0)
    assert found[0, 14:].tolist() == plain(tiny_pair.target, prompt_of(14), 17)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "high"}, "dola generation"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=1"),
        ({"position_ids": torch.tensor([[0, 2, 4, 6]])}, "position_ids"),
    ],
    ids=lambda o: "+".join(o) if isinstance(o, dict) else "",
)
def test_what_would_be_another_output_is_refused(tiny_pair: TinyPair, options: dict[str, Any], reason: str) -> None:
    options = {"do_sample": False, "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=reason):
        tiny_pair.target.generate(**inputs_of(prompt_of(4)), custom_generate=decoder_of(tiny_pair), **options)


def test_greedy_has_one_answer(tiny_pair: TinyPair) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        tiny_pair.target.generate(
            **inputs_of(prompt_of(4)), custom_generate=decoder_of(tiny_pair), do_sample=False, num_return_sequences=2
        )


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamers(tiny_pair: TinyPair, skip_prompt: bool) -> None:
    """Several tokens at once make the same text as one by one."""
    texts = []
    for options in ({}, {"custom_generate": decoder_of(tiny_pair)}):
        streamer = TextIteratorStreamer(tiny_pair.tokenizer, skip_prompt=skip_prompt)  # type: ignore[arg-type]
        options = {**options, "do_sample": False, "max_new_tokens": 20}
        tiny_pair.target.generate(**inputs_of(prompt_of(9)), streamer=streamer, **options)
        texts.append("".join(streamer))
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5


VOCAB = 6


def drafter_for(kind: str, target: Any) -> Drafter:
    """A draft of the same, a padded, or a smaller vocabulary than the target's six tokens."""
    if kind == "padded":
        return ModelDrafter(tiny_llama(vocab=VOCAB + 2, layers=1, seed=5), VOCAB)
    draft = perturbed(target, 0.4)
    if kind == "hybrid":
        return HybridDrafter(draft, VOCAB)
    if kind == "head":
        draft.lm_head = torch.nn.Linear(64, 4, bias=False)
        return ModelDrafter(draft, VOCAB, torch.tensor([5, 0, 2, 3]))
    return ModelDrafter(draft, VOCAB)


@pytest.mark.parametrize(("kind", "batch"), [("same", True), ("padded", False), ("head", False), ("hybrid", True)])
def test_processors_see_the_drafts_in_sampled_decoding(kind: str, batch: bool) -> None:
    """The second and third of three tokens against the target's own distribution, under processors of the prefix."""
    target = tiny_llama(vocab=VOCAB, layers=1)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.4)
    prompt = [1, 2, 3, 4, 1, 2]
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)])

    def plainly(prefixes: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(prefixes)
        with torch.inference_mode():
            return chain(ids, target(ids).logits[:, -1].clone()).softmax(-1)

    pairs = [[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    first = plainly([prompt])[0]
    second = plainly([[*prompt, a] for a in range(VOCAB)])
    third = plainly([[*prompt, *pair] for pair in pairs]).view(VOCAB, VOCAB, VOCAB)
    joint = (first[:, None, None] * second[:, :, None] * third).numpy()

    policy = Scripted([2])
    decoder = SpeculativeDecoder(drafter_for(kind, target), policy=policy, target=target)
    sampler, seen = Sampler(processors=chain, seed=5), np.zeros((VOCAB,) * 3)
    for _ in range(30 if batch else 150):
        if batch:
            found = decoder.decode_batch([prompt] * 10, 3, eos_ids=(), samplers=[sampler] * 10)
        else:
            found = [decoder.generate(prompt, 3, eos_ids=(), sampler=sampler)]
        for out in found:
            seen[tuple(out.tokens)] += 1
    assert any(o.accepted for o in policy.outcomes)
    assert any(o.rejected for o in policy.outcomes)
    assert not decoder.policy.faults
    assert not seen[joint == 0].any()
    expected, counts = seen.sum() * joint.sum(0), seen.sum(0)
    rare = expected < 5  # one cell together, as the statistic wants no small ones
    cells = np.array([[*expected[~rare], expected[rare].sum()], [*counts[~rare], counts[rare].sum()]])
    chi2, df = ((cells[1] - cells[0]) ** 2 / cells[0]).sum(), cells.shape[1] - 1
    assert df > 8
    assert chi2 < df + 5 * np.sqrt(2 * df)


@pytest.mark.parametrize("kind", [ModelDrafter, HybridDrafter])
@pytest.mark.parametrize("sampled", [False, True])
def test_where_the_draft_knows_no_token_that_is_allowed(
    tiny_pair: TinyPair, kind: type[ModelDrafter], sampled: bool
) -> None:
    """Processors that leave the draft's head nothing cost drafts and nothing else."""
    even, target = torch.arange(0, 260, 2), tiny_pair.target
    draft = perturbed(target, 0.0)
    draft.lm_head = torch.nn.Linear(64, len(even), bias=False)
    decoder = SpeculativeDecoder(kind(draft, 260, even), policy=Scripted([3, 1]), target=target)
    chain = [SuppressTokensLogitsProcessor(even.tolist()), Favour()]
    sampler = Sampler(float(sampled), processors=chain, seed=3)
    alone = decoder.generate(prompt_of(9), 12, sampler=sampler)
    batch = decoder.decode_batch([prompt_of(9), prompt_of(4)], 12, samplers=[sampler] * 2)
    for out in (alone, *batch):
        assert len(out.tokens) == 12
        assert all(token % 2 for token in out.tokens)
        assert any(s.drafted for s in out.steps)
        assert kind is HybridDrafter or not any(s.accepted for s in out.steps)  # a lookup may know one
    if not sampled:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "logits_processor": chain}
        assert alone.tokens == target.generate(**inputs_of(prompt_of(9)), **options)[0, 9:].tolist()


def test_scores_that_are_no_numbers_are_an_error_in_drafts_too(tiny_pair: TinyPair) -> None:
    """As in transformers: a draft is not accepted because a comparison with NaN is false."""

    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * (float("nan") if input_ids.shape[1] == 8 else 1)

    decoder = decoder_of(tiny_pair, [4])
    with pytest.raises(RuntimeError, match="nan"):
        tiny_pair.target.generate(
            **inputs_of(prompt_of(6)), custom_generate=decoder, logits_processor=[Broken()], do_sample=True
        )


@pytest.mark.parametrize("name", ["online", "hf-confidence", "vllm"])
def test_decoders_may_share_a_policy(tiny_pair: TinyPair, name: str) -> None:
    """In turns within each other's calls, and in threads: what is learned mixes, no token changes."""
    policy = make_policy(name)
    decoders = [SpeculativeDecoder(tiny_pair.draft, policy=policy, target=tiny_pair.target) for _ in range(3)]
    prompts = [prompt_of(8, seed) for seed in range(3)]
    expected = [plain(tiny_pair.target, p, 20) for p in prompts]
    inner: list[list[int]] = []

    def meanwhile(_: list[int]) -> None:
        if len(inner) < 3:
            inner.append(decoders[1].generate(prompts[1], 20).tokens)

    assert decoders[0].generate(prompts[0], 20, on_tokens=meanwhile).tokens == expected[0]
    assert inner == [expected[1]] * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: decoders[i].generate(prompts[i], 20).tokens, range(3)))
    assert found == expected
