"""Processors, prefix functions and criteria of a user's own: what plain decoding asks them, in its order, once each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.generate import Favour, decoder_of, inputs_of
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


class Log(LogitsProcessor):
    """Keeps what it is asked, and changes the scores by how often it was asked: a state of its own."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, (13 * len(self.asked)) % 250 + 1] += 5.0
        return scores


class Criteria(StoppingCriteria):
    """Keeps what it is asked; stops a row whose latest tokens add up to a multiple."""

    def __init__(self, multiple: int) -> None:
        self.multiple, self.asked = multiple, list[list[list[int]]]()

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        return input_ids[:, -3:].sum(1) % self.multiple == 0


def drafter(pair: TinyPair, kind: str) -> Drafter | Any:
    kinds = {"model": pair.draft, "lookup": NgramDrafter(), "hybrid": HybridDrafter(pair.draft, 260), "none": None}
    return kinds[kind]


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("kind", ["model", "lookup", "hybrid", "none"])
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "among others"])
def test_a_stateful_processor_is_asked_as_in_plain_decoding(
    tiny_pair: TinyPair, kind: str, pads: int, mixed: bool
) -> None:
    prompt = [*prompt_of(6), *prompt_of(6), *prompt_of(4)]
    logs, criteria, outs = [Log(), Log()], [Criteria(97), Criteria(97)], []
    options: dict[str, Any] = {**inputs_of(prompt, pads=pads), "do_sample": False, "max_new_tokens": 40}
    options |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3} if mixed else {}
    for log, criterion, decoder in zip(
        logs, criteria, (None, SpeculativeDecoder(drafter(tiny_pair, kind), policy=Scripted([8, 3, 0]))), strict=True
    ):
        out = tiny_pair.target.generate(
            **options, custom_generate=decoder, logits_processor=[log], stopping_criteria=[criterion]
        )
        outs.append(out.tolist())
    assert outs[0] == outs[1]
    assert logs[0].asked == logs[1].asked
    assert criteria[0].asked == criteria[1].asked
    assert len(logs[0].asked) == len(outs[0][0]) - len(prompt) - pads > 5


@pytest.mark.parametrize("output_scores", [False, True])
def test_criteria_see_the_end_and_scores_are_asked_for_once(tiny_pair: TinyPair, output_scores: bool) -> None:
    prompt = prompt_of(10, 4)
    options: dict[str, Any] = {**inputs_of(prompt), "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": output_scores}
    for eos in (None, plain(tiny_pair.target, prompt, 20)[6]):
        for chain in ([], [Log()]):
            found = []
            for decoder in (None, decoder_of(tiny_pair, [8])):
                criterion, own = Criteria(10**6), copy.deepcopy(chain)
                out = tiny_pair.target.generate(
                    **options, eos_token_id=eos, custom_generate=decoder, logits_processor=own,
                    stopping_criteria=[criterion],
                )  # fmt: skip
                found.append((out.sequences.tolist(), criterion.asked, [log.asked for log in own]))
                scores = torch.stack(out.scores) if output_scores else torch.empty(0)
                if decoder is None:
                    expected = scores
            assert found[0] == found[1]
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def grammar(start: int, first: list[int]) -> Any:
    """A prefix function that knows only the prefixes of its language."""

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        known = first
        for token in ids[start:].tolist():
            if token not in known:
                raise KeyError(f"{token} leaves the grammar")
            known = [] if token == 0 else [(token + 1) % 250 + 1, (token + 7) % 250 + 1, (token + 31) % 250 + 1]
        if not known:
            raise KeyError("asked about what follows the end")
        return known if len(ids) < start + 12 else [0]

    return allowed


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["model", "lookup", "hybrid"])
def test_a_prefix_function_sees_its_own_language(tiny_pair: TinyPair, kind: str, sampled: bool) -> None:
    prompt = [*prompt_of(14), 7, 8, 9, 10, 12, 14, 50, 92, 7, 8, 9]
    inputs, n = inputs_of(prompt), len(prompt)
    options: dict[str, Any] = {"prefix_allowed_tokens_fn": grammar(n, [10, 20, 30]), "max_new_tokens": 20}
    decoder = SpeculativeDecoder(drafter(tiny_pair, kind), policy=Scripted([8]))
    torch.manual_seed(1)
    out = tiny_pair.target.generate(**inputs, custom_generate=decoder, do_sample=sampled, **options)
    assert out.shape[1] == n + 13
    assert out[0, -1] == 0
    assert decoder.totals.drafted
    if not sampled:
        assert torch.equal(out, tiny_pair.target.generate(**inputs, do_sample=False, **options))


def test_sampled_drafts_with_a_stateful_processor_follow_the_targets_distribution() -> None:
    """An impossible draft ends the step; what is drawn is plain decoding's, token for token of a certain prefix."""
    target = tiny_llama(vocab=6, layers=1)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.4)

    class Alternate(LogitsProcessor):
        """Even tokens and odd ones in turns: it counts."""

        def __init__(self) -> None:
            self.count = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.count += 1
            scores = scores.clone()
            scores[:, self.count % 2 :: 2] = float("-inf")
            return scores

    prompt, seen, n = [1, 2, 3], torch.zeros(6, 6), 600
    decoder = SpeculativeDecoder(perturbed(target, 0.4), policy=Scripted([2]), target=target)
    for i in range(n):
        sampler = Sampler(processors=[Alternate()], seed=i)
        a, b = decoder.generate(prompt, 2, eos_ids=(), sampler=sampler).tokens
        seen[a, b] += 1
    with torch.no_grad():
        first = target(torch.tensor([prompt])).logits[0, -1]
        second = target(torch.tensor([[*prompt, a] for a in range(6)])).logits[:, -1]
    first[1::2] = second[:, ::2] = float("-inf")
    truth = first.softmax(-1)[:, None] * second.softmax(-1)
    assert not seen[truth == 0].any()
    cells = truth > 0
    chi2 = float(((seen - n * truth) ** 2 / (n * truth))[cells].sum())
    assert chi2 < 8 + 5 * 16**0.5  # nine cells: mean 8, standard deviation 4 under the truth
    assert decoder.totals.accepted


ROWS = [prompt_of(5, 1), prompt_of(14, 2), prompt_of(9, 3)]


@pytest.mark.parametrize("gammas", [[6, 0, 3], [8]], ids=str)
@pytest.mark.parametrize("eos", [None, 20, 27])
@pytest.mark.parametrize("which", ["processor", "criteria", "both"])
def test_batches_are_asked_as_in_plain_decoding(
    tiny_pair: TinyPair, which: str, eos: int | None, gammas: list[int]
) -> None:
    """Whole batches, all rows equally long, rows that ended padded: also for processors that look across rows."""
    target = tiny_pair.target
    if eos is not None:
        ends = plain(target, ROWS[0], 20)[4 if eos == 20 else 9]
    options: dict[str, Any] = {**inputs_of(*ROWS), "do_sample": False, "max_new_tokens": 20}
    options |= {"eos_token_id": None if eos is None else ends, "pad_token_id": 3}
    found = []
    for decoder in (None, decoder_of(tiny_pair, gammas)):
        log, criterion = Log(), Criteria(11)
        out = target.generate(
            **options, custom_generate=decoder, logits_processor=[log, Favour()] if which != "criteria" else [],
            stopping_criteria=[criterion] if which != "processor" else [],
        )  # fmt: skip
        found.append((out.tolist(), log.asked, criterion.asked))
    assert found[0] == found[1]
    assert decoder is not None
    assert decoder.totals.drafted
    assert not decoder.policy.faults


def test_batches_of_pure_processors_run_at_their_own_speed(tiny_pair: TinyPair) -> None:
    """Rows need not wait for each other where nobody could tell."""
    options: dict[str, Any] = {**inputs_of(*ROWS), "do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.4}
    decoder = decoder_of(tiny_pair, [6])
    found = tiny_pair.target.generate(**options, custom_generate=decoder)
    assert torch.equal(found, tiny_pair.target.generate(**options))
    assert isinstance(decoder.last, list)
    assert len({len(out.steps) for out in decoder.last}) > 1


def test_prefix_functions_of_a_batch_know_their_row(tiny_pair: TinyPair) -> None:
    asked: list[list[tuple[int, int]]] = []

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        asked[-1].append((row, len(ids)))
        return [(int(ids[-1]) + 3 * row + k) % 250 + 1 for k in (1, 5, 9)]

    outs = []
    for decoder in (None, decoder_of(tiny_pair, [5, 2])):
        asked.append([])
        options: dict[str, Any] = {**inputs_of(*ROWS), "do_sample": False, "max_new_tokens": 15}
        options |= {"custom_generate": decoder, "prefix_allowed_tokens_fn": allowed}
        outs.append(tiny_pair.target.generate(**options))
    assert torch.equal(*outs)
    for row in range(3):
        assert [length for r, length in asked[0] if r == row] == [length for r, length in asked[1] if r == row]


def test_too_many_rows_for_processors_of_ones_own(tiny_pair: TinyPair) -> None:
    with pytest.raises(UserError, match="at most 16"):
        tiny_pair.target.generate(
            **inputs_of(*[prompt_of(4, i) for i in range(17)]), custom_generate=decoder_of(tiny_pair),
            logits_processor=[Favour()], do_sample=False, max_new_tokens=4,
        )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.7},
        {
            "watermarking_config": SynthIDTextWatermarkingConfig(
                ngram_len=4, keys=[654, 400, 836, 123], sampling_table_size=1 << 12, context_history_size=64
            )
        },
    ],
    ids=["guidance", "SynthID"],
)
def test_transformers_own_processors_that_keep_a_state(tiny_pair: TinyPair, options: dict[str, Any], rows: int) -> None:
    options = {**inputs_of(*ROWS[:rows]), "do_sample": False, "max_new_tokens": 18, **options}
    decoder = decoder_of(tiny_pair)
    found = tiny_pair.target.generate(**copy.deepcopy(options), custom_generate=decoder)
    assert torch.equal(found, tiny_pair.target.generate(**copy.deepcopy(options)))
    assert decoder.totals.drafted


def test_pure_processors_still_shape_the_drafts(tiny_pair: TinyPair) -> None:
    """With the target as its own draft all drafts are right, although a penalty changes what is likely."""
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
    decoder = SpeculativeDecoder(perturbed(tiny_pair.target, 0.0), policy=Scripted([6]), target=tiny_pair.target)
    out = decoder.generate(prompt_of(12), 30, eos_ids=(), sampler=Sampler(0, processors=chain))
    assert sum(s.drafted for s in out.steps) == sum(s.accepted for s in out.steps) > 20
