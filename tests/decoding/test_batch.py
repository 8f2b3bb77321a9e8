"""A batch must give each prompt what decoding it alone gives."""

from __future__ import annotations

import json
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from experiments.bench import batch as bench
from policies.base import ENTROPY, Context, Decision, Draft, Outcome, Policy
from policies.registry import make_policy
from speckv_online.decoding.batch import level_name
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import Sampler
from tests.support.decoding import plain, prompt_of
from tests.support.tiny_models import TinyPair, tiny_llama


class Ragged(Policy):
    """Another gamma for each sequence and step; sometimes stops early, sometimes trims."""

    def __init__(self, most: int = 8) -> None:
        super().__init__()
        self.most = most
        self.seen: list[tuple[str, int]] = []
        self.outcomes: dict[int, Outcome] = {}

    def decide(self, context: Context) -> Decision:
        gamma = (3 * context.step + 5 * context.tokens[-1]) % (self.most + 1)
        self.seen.append((context.level, context.position))
        return Decision(self.new_id(), gamma, ask_per_token=context.step % 3 == 1)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        drafted, signals = draft.drafted, draft.signals
        return bool(signals[drafted - 1, ENTROPY] < 4)

    def submit(self, decision: Decision, draft: Draft) -> int:
        drafted = draft.drafted
        return max(drafted - 1, 0)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        assert decision.id not in self.outcomes
        self.outcomes[decision.id] = outcome


def drafter_of(pair: TinyPair, kind: str) -> Drafter | PreTrainedModel | None:
    return {
        "near": pair.draft,
        "right": pair.target,
        "hybrid": HybridDrafter(pair.draft, 260),
        "ngram": NgramDrafter(),
        "none": None,
    }[kind]


@pytest.mark.parametrize("kind", ["near", "right", "hybrid", "ngram", "none"])
def test_rows_are_as_if_alone(tiny_pair: TinyPair, kind: str) -> None:
    policy = Ragged()
    decoder = SpeculativeDecoder(drafter_of(tiny_pair, kind), policy=policy, target=tiny_pair.target)
    prompts = [prompt_of(n, n) for n in (1, 2, 40, 7, 25)]
    heard: dict[int, list[int]] = {i: [] for i in range(5)}
    found = decoder.decode_batch(prompts, 40, on_tokens=lambda i, tokens: heard[i].extend(tokens))
    assert not decoder.policy.faults
    assert decoder.last is found
    for i, (prompt, out) in enumerate(zip(prompts, found, strict=True)):
        assert out.tokens == heard[i] == plain(tiny_pair.target, prompt, 40)
        assert sum(s.produced for s in out.steps) == len(out.tokens)
        assert out.steps[0].context_length == len(prompt)
        for s in out.steps:
            assert s.accepted <= s.labelled <= s.drafted
            assert s.seconds >= s.draft_seconds + s.verify_seconds > 0
    assert len(policy.outcomes) == sum(len(out.steps) for out in found)
    assert policy.seen[0] == ("fp32@8", 0)
    if kind == "right":
        assert not any(o.rejected for o in policy.outcomes.values())


def test_end_of_sequence_and_stops_row_by_row(tiny_pair: TinyPair) -> None:
    prompts = [prompt_of(12, seed) for seed in range(4)]
    answers = [plain(tiny_pair.target, p, 30) for p in prompts]
    eos = [answers[0][3], answers[1][11]]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Ragged(16), target=tiny_pair.target)
    stop = [lambda ids, at=at: len(ids) == 12 + at for at in (30, 30, 9, 30)]
    found = decoder.decode_batch(prompts, 30, eos_ids=eos, should_stop=stop)
    levels = {level for level, _ in decoder.policy.seen}
    for answer, out, at in zip(answers, found, (30, 30, 9, 30), strict=True):
        ends = [i for i, token in enumerate(answer) if token in eos]
        length = min([at, *(e + 1 for e in ends)])
        assert out.tokens == answer[:length]
        assert out.finish == ("eos" if ends and ends[0] < at else "stop")
    assert {"fp32@4", "fp32@2"} <= levels  # rows that ended have left the batch


@pytest.mark.parametrize("policy", ["online", "hf-confidence", "vllm"])
def test_real_policies(tiny_pair: TinyPair, policy: str) -> None:
    prompts = [prompt_of(9, seed) for seed in range(6)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=make_policy(policy), target=tiny_pair.target, level="nf4")
    for _ in range(2):
        for prompt, out in zip(prompts, decoder.decode_batch(prompts, 24), strict=True):
            assert out.tokens == plain(tiny_pair.target, prompt, 24)
    assert not decoder.policy.faults
    assert decoder.totals.prompts == 12


def test_costs_are_learned_by_size_of_the_batch(tiny_pair: TinyPair) -> None:
    policy = make_policy("leviathan")
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=policy, target=tiny_pair.target, level="nf4")
    decoder.generate(prompt_of(5), 12)
    decoder.decode_batch([prompt_of(5, 1), prompt_of(5, 2), prompt_of(5, 3)], 12)
    keys = {key.split(".")[1] for key in policy.state_dict() if key.startswith("cost.")}
    assert {"nf4", "nf4@4"} <= keys
    assert [level_name("nf4", n) for n in (1, 2, 3, 5, 16)] == ["nf4", "nf4@2", "nf4@4", "nf4@8", "nf4@16"]


def test_long_prompts_are_read_in_pieces(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speckv_online.modeling.batched_model.CHUNK", 16)
    prompts = [prompt_of(n, n) for n in (3, 60, 17, 33)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Ragged(), target=tiny_pair.target)
    for prompt, out in zip(prompts, decoder.decode_batch(prompts, 20), strict=True):
        assert out.tokens == plain(tiny_pair.target, prompt, 20)


def test_sampled_rows(tiny_pair: TinyPair) -> None:
    prompts = [prompt_of(6, seed) for seed in range(3)]
    decoder = SpeculativeDecoder(tiny_pair.draft, policy=Ragged(), target=tiny_pair.target)

    def run(seed: int, **options: Any) -> list[list[int]]:
        samplers = [Sampler(seed=seed + i, **options) for i in range(3)]
        return [out.tokens for out in decoder.decode_batch(prompts, 20, samplers=samplers)]

    assert run(1) == run(1)
    assert run(1) != run(9)
    assert run(1, top_k=1) == [plain(tiny_pair.target, p, 20) for p in prompts]
    mixed = decoder.decode_batch(prompts, 20, samplers=[None, Sampler(seed=4), None])
    assert mixed[0].tokens == plain(tiny_pair.target, prompts[0], 20)
    assert mixed[2].tokens == plain(tiny_pair.target, prompts[2], 20)


def test_sampled_rows_follow_the_targets_distribution() -> None:
    vocab, n = 6, 60
    target = tiny_llama(vocab=vocab)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.3)
    prompt = [1, 2, 3, 4]
    with torch.inference_mode():
        first = target(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        rows = target(torch.tensor([[*prompt, a] for a in range(vocab)])).logits[:, -1].softmax(-1)
    truth = (first[:, None] * rows).numpy()
    decoder = SpeculativeDecoder(tiny_llama(vocab=vocab, seed=8), policy=Ragged(3), target=target)
    sampler, seen = Sampler(seed=11), np.zeros((vocab, vocab))
    for _ in range(n):
        for out in decoder.decode_batch([prompt] * 16, 2, eos_ids=(), samplers=[sampler] * 16):
            seen[tuple(out.tokens)] += 1
    total = 16 * n
    chi2 = ((seen - total * truth) ** 2 / (total * truth)).sum()
    assert chi2 < 35 + 5 * np.sqrt(70)  # mean 35, standard deviation √70 under the truth


def test_limits(tiny_pair: TinyPair) -> None:
    small = tiny_llama(positions=64)
    decoder = SpeculativeDecoder(ModelDrafter(small, 260), policy=Ragged(), target=small)
    prompts = [prompt_of(40), prompt_of(60), prompt_of(3)]
    for prompt, out in zip(prompts, decoder.decode_batch(prompts, 500), strict=True):
        assert out.tokens == plain(small, prompt, 64 - len(prompt))
    assert decoder.decode_batch([], 5) == []
    with pytest.raises(UserError, match="at most 16"):
        decoder.decode_batch([[1]] * 17, 5)
    with pytest.raises(UserError, match="empty"):
        decoder.decode_batch([[1], []], 5)


def test_inside_transformers(tiny_pair: TinyPair) -> None:
    """``generate`` with left-padded rows, more of them than one batch holds."""
    width = 14
    prompts = [prompt_of(n % 9 + 3, n) for n in range(18)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    eos = plain(tiny_pair.target, prompts[0], 20)[5]
    for options in (
        {},
        {"repetition_penalty": 1.5, "prefix_allowed_tokens_fn": lambda row, _: range(1 + row, 240)},
        {"eos_token_id": [eos], "pad_token_id": 0},
    ):
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16, **options}
        expected = tiny_pair.target.generate(ids, **options)
        decoder = SpeculativeDecoder(tiny_pair.draft, policy=Ragged())
        assert torch.equal(tiny_pair.target.generate(ids, custom_generate=decoder, **options), expected)
        assert len(decoder.last) == 18
    several = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "eos_token_id": None}
    torch.manual_seed(1)
    out = tiny_pair.target.generate(ids[:1, 10:], custom_generate=decoder, **several)
    assert out.shape == (3, 12)
    assert len({tuple(row) for row in out.tolist()}) > 1


def test_benchmark_of_batches(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--levels", "fp32", "--json"]
    flags += ["--policies", "autoregressive,fixed:2", "--sizes", "2", "--prompts", "2", "--max-new-tokens", "4"]
    flags += ["--device", "cpu", "--clock", "cpu"]
    bench.main(flags)
    base, row = json.loads(capsys.readouterr().out)
    assert (row["level"], row["size"], row["policy"], row["tokens"]) == ("fp32", 2, "fixed:2", 24)
    assert (base["ratio"], base["differing"], row["differing"]) == (1.0, 0, 0)
    assert row["ratio"] == pytest.approx(row["one_cache"] / base["one_cache"])
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    bench.main([*flags, "--alone"])
    _, row = json.loads(capsys.readouterr().out)
    assert min(row["one_cache"], row["caches"], row["transformers"]) > 0


@pytest.mark.parametrize(
    "flags", [["--max-new-tokens", "0"], ["--prompts", "0"], ["--threads", "-1"], ["--policies", ""]]
)
def test_benchmark_of_batches_refuses_in_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(flags) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert flags[0] in error
    assert error.count("\n") == 1


class Halting(NgramDrafter):
    """Takes its time for one text."""

    def draft(self, signals: np.ndarray) -> int:
        if self.ngrams.propose() and self.slow:
            sleep(0.01)
        return super().draft(signals)

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        super().begin(tokens, capacity, sampler)
        self.slow = tokens[0] == 7
        self.kept = tokens

    def extend(self, tokens: list[int]) -> None:
        super().extend(tokens)
        self.kept += tokens  # a drafter may do what it likes with the list it was given


def test_a_row_that_drafts_by_itself_pays_for_itself(tiny_pair: TinyPair) -> None:
    policy = Ragged()
    decoder = SpeculativeDecoder(Halting(), policy=policy, target=tiny_pair.target)
    prompts = [[7, 8] * 6, [9, 10] * 6]
    found = decoder.decode_batch(prompts, 16, eos_ids=())
    assert [g.tokens for g in found] == [plain(tiny_pair.target, p, 16) for p in prompts]
    slow, compiled = ([s.draft_seconds for s in g.steps if s.drafted] for g in found)
    assert min(slow) > np.median(compiled)
    assert decoder.generate(prompts[0], 16, eos_ids=()).tokens == plain(tiny_pair.target, prompts[0], 16)


def test_a_long_prompt_s_reading_is_nobody_else_s_usual_step() -> None:
    target, policy = tiny_llama(positions=512), Times()
    decoder = SpeculativeDecoder(tiny_llama(positions=512), policy=policy, target=target)
    decoder.decode_batch([[5, 6], prompt_of(200)], 12, eos_ids=())
    short, long, *rest = policy.seen
    assert (short, long[:2]) == ((2, 1, False), (200, 199))
    assert all(timed for _, _, timed in rest)


class Times(Ragged):
    """Two tokens at a time, and which steps had a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 2)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.seen.append((outcome.context_length, outcome.caught_up, outcome.seconds > 0))


def test_nothing_is_asked_for(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    assert [g.tokens for g in decoder.decode_batch([[5, 6, 7], [8]], 0)] == [[], []]
    assert decoder.generate([5, 6, 7], 0).tokens == []
