"""Drafting by the chunk: the same tokens and signals as one by one, fewer transfers, honest counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from policies.base import LOOKUP, N_SIGNALS, Context, Decision, Draft
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.drafters.model import ModelDrafter, is_pure
from speckv_online.drafters.spec import parse_drafter
from speckv_online.gpu_engine.graphed_llama import attach
from speckv_online.modeling.sampling import Sampler
from speckv_online.profiling.draft_table import draft_table
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.recorded_capture import RecordedCapture
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    target = tiny_llama()
    return target, perturbed(target, 0.03)


def chunked(models: tuple[Any, Any], chunk: int = 3, **options: Any) -> ChunkedDrafter:
    target, draft = models
    return ChunkedDrafter(draft, target.config.vocab_size, capture=RecordedCapture(), chunk=chunk, **options)


class Switch(Scripted):
    """Goes on as the lookup after the first token, and asks for seven."""

    def __init__(self) -> None:
        super().__init__([7], ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        return LOOKUP if draft.drafted == 1 else True


POLICIES = ["fixed:5", "mlp16", "online"]


@pytest.mark.parametrize(
    "policy",
    [*POLICIES, Scripted([6, 0, 3], ask_per_token=True), Switch()],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
@pytest.mark.parametrize("chunk", [1, 3])
def test_greedy_decoding_is_plain_decoding(models: tuple[Any, Any], policy: Any, chunk: int) -> None:
    target, _ = models
    graphs, drafter = attach(target, RecordedCapture()), chunked(models, chunk)
    decoder = SpeculativeDecoder(drafter, policy=policy, target=target)
    for prompt in (prompt_of(1, 1), prompt_of(115, 2)):
        assert decoder.generate(prompt, 32).tokens == plain(target, prompt, 32)
    assert graphs.captures
    assert not graphs.failure
    assert not drafter.graphs.failure


def test_outcomes_are_those_of_one_by_one(models: tuple[Any, Any]) -> None:
    """What a policy sees is the same but for the clock and the forwards that were in vain."""
    target, draft = models
    seen = []
    for drafter in (ModelDrafter(draft, target.config.vocab_size), chunked(models)):
        policy = Scripted([6, 0, 3, 2], ask_per_token=True)
        SpeculativeDecoder(drafter, policy=policy, target=target).generate(prompt_of(30), 40)
        seen.append(policy.outcomes)
    for one, other in zip(*seen, strict=True):
        assert (one.drafted, one.accepted, one.labelled) == (other.drafted, other.accepted, other.labelled)
        assert other.caught_up <= one.caught_up  # what was read ahead, and accepted, need not be read again
        np.testing.assert_allclose(one.signals, other.signals, atol=1e-4)
        assert one.forwards <= other.forwards <= one.forwards + 2  # all of a chunk but one
    assert sum(o.forwards for o in seen[1]) > sum(o.forwards for o in seen[0])


def test_a_table_of_drafts_is_that_of_one_by_one(models: tuple[Any, Any]) -> None:
    target, draft = models
    prompt = prompt_of(20)
    tokens = plain(target, prompt, 24)
    one, other = (
        draft_table(drafter, prompt, tokens, 8)
        for drafter in (ModelDrafter(draft, target.config.vocab_size), chunked(models))
    )
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)
    assert (one[0][:, 0] != tokens).any()


@torch.inference_mode()
def drafts(drafter: ModelDrafter, count: int, gamma: int) -> list[int]:
    drafter.begin(prompt_of(10), 64)
    if isinstance(drafter, ChunkedDrafter):
        drafter.plan(gamma)
    return [drafter.draft(np.zeros(N_SIGNALS)) for _ in range(count)]


def test_chunks_end_with_the_step(models: tuple[Any, Any]) -> None:
    """Four tokens of at most four are two chunks, of three and one: nothing was drafted in vain."""
    target, draft = models
    drafter = chunked(models)
    assert drafts(drafter, 4, 4) == drafts(ModelDrafter(draft, target.config.vocab_size), 4, 4)
    assert drafter.unused == 0
    assert len(drafter.cache) == 10 + 3  # all but the last draft
    drafts(drafter, 4, 16)
    assert drafter.unused == 2
    assert drafter.use(LOOKUP) == LOOKUP
    assert drafter.unused == 2  # paid for all the same
    assert len(drafter.cache) == 10 + 4
    drafter.end(2)
    assert drafter.unused == 0
    assert len(drafter.cache) == 12


def test_drawn_tokens_are_never_dropped(models: tuple[Any, Any]) -> None:
    """In sampled decoding there are no chunks, and the draws are those of the usual drafter."""
    target, draft = models
    said = []
    for drafter in (ModelDrafter(draft, target.config.vocab_size), chunked(models)):
        policy = Scripted([5], ask_per_token=True)
        decoder = SpeculativeDecoder(drafter, policy=policy, target=target)
        said.append(decoder.generate(prompt_of(30), 40, sampler=Sampler(seed=3)).tokens)
        assert all(o.forwards == o.drafted for o in policy.outcomes)
    assert said[0] == said[1]
    assert drafter.graphs.captures  # type: ignore[attr-defined]


def test_a_small_head_and_a_small_embedding() -> None:
    """The draft's head covers some tokens, and its embedding lacks some of the target's."""
    target, draft = tiny_llama(vocab=300), tiny_llama(seed=5, vocab=260)
    ids = torch.arange(10, 250)
    draft.lm_head = torch.nn.Linear(64, len(ids), bias=False)
    prompt = [299, 270, *prompt_of(10)]
    found = []
    for kind in (ModelDrafter(draft, 300, ids), ChunkedDrafter(draft, 300, ids, RecordedCapture())):
        found.append(drafts_after(kind, prompt))
        decoder = SpeculativeDecoder(kind, policy=Scripted([4], ask_per_token=True), target=target)
        assert decoder.generate(prompt, 30).tokens == plain(target, prompt, 30)
    assert found[0] == found[1]


def test_an_embedding_that_shrinks() -> None:
    """A token that the draft no longer knows is never looked up by a graph: a GPU would not survive that."""
    target, draft = tiny_llama(vocab=300), tiny_llama(seed=5, vocab=300)
    drafter = ChunkedDrafter(draft, 300, capture=RecordedCapture())
    decoder = SpeculativeDecoder(drafter, policy=Scripted([4], ask_per_token=True), target=target)
    decoder.generate(prompt_of(10), 10)
    embed = draft.model.embed_tokens
    embed.weight = torch.nn.Parameter(embed.weight.detach()[:20].clone())
    for _ in range(2):
        assert decoder.generate(prompt_of(10), 30).tokens == plain(target, prompt_of(10), 30)
    assert not drafter.graphs.failure


@torch.inference_mode()
def drafts_after(drafter: ModelDrafter, prompt: list[int]) -> list[int]:
    drafter.begin(prompt, 64)
    return [drafter.draft(np.zeros(N_SIGNALS)) for _ in range(6)]


def test_a_model_without_graphs_drafts_as_ever(models: tuple[Any, Any]) -> None:
    target, draft = models
    draft = perturbed(draft, 0.0)
    draft.model.layers[0].register_forward_hook(lambda *a: None)
    drafter = ChunkedDrafter(draft, target.config.vocab_size, capture=RecordedCapture())
    policy = Scripted([5], ask_per_token=True)
    assert SpeculativeDecoder(drafter, policy=policy, target=target).generate(prompt_of(9), 20).tokens == plain(
        target, prompt_of(9), 20
    )
    assert drafter.graphs.captures == 0
    assert all(o.forwards <= o.drafted + 1 for o in policy.outcomes)


class Watcher(Scripted):
    """Counts graphs as they are recorded."""

    def __init__(self, graphs: Any) -> None:
        super().__init__([2, 2, 3])
        self.graphs, self.timed, self.recorded = graphs, list[bool](), list[int]()

    def decide(self, context: Context) -> Decision:
        self.recorded.append(self.graphs.captures)
        return super().decide(context)

    def learn(self, decision: Decision, outcome: Any) -> None:
        self.timed.append(outcome.seconds > 0 and outcome.verify_seconds > 0)


def test_steps_that_record_graphs_have_no_times(models: tuple[Any, Any]) -> None:
    target, draft = models
    policy = Watcher(attach(target, RecordedCapture()))
    drafter = ModelDrafter(draft, target.config.vocab_size)
    SpeculativeDecoder(drafter, policy=policy, target=target).generate(prompt_of(30), 40)
    recorded = np.diff([*policy.recorded, policy.graphs.captures]) > 0
    assert recorded.sum() >= 2
    for i, timed in enumerate(policy.timed):
        assert timed == (i > 0 and not recorded[i])


def test_which_drafters_are_pure(tiny_pair: TinyPair) -> None:
    class Own(ModelDrafter):
        """Someone's drafter, which may propose anything."""

    vocab = tiny_pair.target.config.vocab_size
    built = parse_drafter("model").build(tiny_pair.draft, vocab, graphs=True)
    assert isinstance(built, ChunkedDrafter)
    assert is_pure(built)
    assert is_pure(tiny_pair.drafter())
    assert not is_pure(Own(tiny_pair.draft, vocab))
    assert not is_pure(parse_drafter("hybrid").build(tiny_pair.draft, vocab, graphs=True))
    assert not is_pure(parse_drafter("ngram").build(None, vocab, graphs=True))


def test_bad_chunks(models: tuple[Any, Any]) -> None:
    for chunk in (0, 17):
        with pytest.raises(ValueError, match="a chunk has from 1 to 16"):
            chunked(models, chunk)
