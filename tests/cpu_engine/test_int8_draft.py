"""The quick form of a draft: the model's logits up to rounding, and the same bits at every width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from policies.base import MAX_GAMMA, Decision, Draft, Policy
from speckv_online.cpu_engine import int8_draft as quick_draft
from speckv_online.cpu_engine import llama_program
from speckv_online.cpu_engine.int8_draft import QuickDraft, quicken
from speckv_online.cpu_engine.kernels.llvm import Library
from speckv_online.decoding.batch import decode_batch
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import look
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.profiling.draft_table import draft_table
from tests.support.engine import needs_engine

pytestmark = needs_engine
VOCABULARY = 272


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 256,
            **sizes,
            **changes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms that change something
        for name, p in model.named_parameters():
            p.copy_(1.0 + 0.3 * torch.randn_like(p) if "norm" in name else 3.0 * p)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(3)


@pytest.fixture(scope="module")
def quick(model: LlamaForCausalLM) -> QuickDraft:
    found = quicken(model)
    assert found is not None
    return found


TEXT = [int(t) for t in np.random.default_rng(5).integers(1, VOCABULARY, 90)]


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 17, 60, 61, 90])
def test_logits_are_the_models_up_to_rounding(model: LlamaForCausalLM, quick: QuickDraft, length: int) -> None:
    expected = model(input_ids=torch.tensor([TEXT[:length]])).logits[0, -1]
    found = quick.read(TEXT[:length], KVCache(2, 8))
    assert (found - expected).std() < 0.05 * expected.std()


@torch.inference_mode()
@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 12), min_size=1, max_size=8), prompt=st.integers(1, 40), junk=st.integers(0, 9))
def test_the_same_bits_at_every_width(quick: QuickDraft, widths: list[int], prompt: int, junk: int) -> None:
    """Read token by token, or in pieces with rejected drafts between them: the logits are equal, bit by bit."""
    text = [*TEXT[:prompt], *TEXT[prompt : prompt + sum(widths)]]
    single, pieces = KVCache(2, 4), KVCache(2, 300)
    for cache in (single, pieces):
        quick.read(text[:prompt], cache)
    at = prompt
    for width in widths:
        ids = text[at : at + width]
        if not ids:
            break
        one = torch.empty(0)
        for token in ids:
            one = quick.read([token], single)
        if junk:
            quick.read(TEXT[-junk:], pieces)
            pieces.truncate(at)
        assert torch.equal(quick.read(ids, pieces), one)
        at += width
    # The prompt and all that follows it, in one call.
    late = quick.read(text, KVCache(2, 8))
    if len(single) > prompt:
        single.truncate(len(single) - 1)
        assert torch.equal(late, quick.read(text[-1:], single))


@torch.inference_mode()
def test_a_processor_with_short_registers(model: LlamaForCausalLM) -> None:
    """The other form of the kernels, for AVX2: right, and with the same bits at every width."""
    quick, cache = QuickDraft(model, 8), KVCache(2, 4)
    expected = model(input_ids=torch.tensor([TEXT])).logits[0, -1]
    found = quick.read(TEXT, KVCache(2, 8))
    assert (found - expected).std() < 0.05 * expected.std()
    for width in (1, 7, 12, 1, 33, 35, 1):
        last = quick.read(TEXT[len(cache) : len(cache) + width], cache)
    assert torch.equal(last, found)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 60.0]), ties=st.booleans())
def test_what_signals_are_made_of_is_what_torch_finds(quick: QuickDraft, seed: int, scale: float, ties: bool) -> None:
    logits = scale * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    row, *numbers = quick.look(logits)
    ((_, *expected),) = look(logits[None])
    assert row == int(logits.argmax())
    np.testing.assert_allclose(numbers, expected, rtol=1e-5, atol=2e-6)


def test_logits_that_are_no_numbers_give_signals_that_are_none(quick: QuickDraft) -> None:
    logits = torch.zeros(VOCABULARY)
    logits[7] = torch.nan
    assert np.isnan(quick.look(logits)[1:]).all()


class Random(Policy):
    """Any gamma from 0 to 16, so that the draft lags by anything."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def decide(self, context: Any) -> Decision:
        gamma = int(self.rng.integers(-12, MAX_GAMMA + 1))
        return Decision(self.new_id(), max(gamma, 0), stops=bool(gamma % 2))

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        drafted = draft.drafted
        return drafted < 5


@pytest.mark.parametrize("kind", [ModelDrafter, HybridDrafter])
@pytest.mark.parametrize("prompt", [TEXT[:5], TEXT[:30] + TEXT[:12]])
def test_a_trace_is_what_the_decoder_drafts(kind: Callable[..., Any], prompt: list[int]) -> None:
    """Every proposal and signal of real decoding, whenever it was made, is that of the trace, to the last bit."""
    target, draft = llama(3), llama(3)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.004 * torch.randn_like(draft.lm_head.weight))
    drafter = kind(draft, VOCABULARY, quick=quicken(draft))
    seen = []

    class Watching(Random):
        def learn(self, decision: Decision, outcome: Any) -> None:
            seen.append((outcome.drafted, outcome.accepted, outcome.signals))

    out = SpeculativeDecoder(drafter, policy=Watching(), target=target).generate(prompt, 90, eos_ids=())
    expected = SpeculativeDecoder(None, policy="autoregressive", target=target).generate(prompt, 90, eos_ids=())
    assert out.tokens == expected.tokens
    drafts, signals, _ = draft_table(drafter, prompt, out.tokens, MAX_GAMMA)
    t, drafted = 0, 0
    for k, n, rows in seen:
        agreed = 0
        while agreed < k and t + agreed < len(out.tokens) and drafts[t, agreed] == out.tokens[t + agreed]:
            agreed += 1
        assert agreed == n
        np.testing.assert_array_equal(signals[t, :k], rows.astype(np.float32))
        t, drafted = t + n + 1, drafted + k
    assert drafted > 40
    assert t == len(out.tokens)


def test_sampled_decoding_and_batches_take_it() -> None:
    target = llama(3)
    drafter = ModelDrafter(target, VOCABULARY, quick=quicken(target))
    decoder = SpeculativeDecoder(drafter, policy="fixed:3", target=target)
    alone = [decoder.generate(p, 20, eos_ids=()).tokens for p in (TEXT[:4], TEXT[:20])]
    assert [g.tokens for g in decode_batch(decoder, [TEXT[:4], TEXT[:20]], 20, eos_ids=())] == alone


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_other_llamas_have_no_quick_form(changes: dict[str, Any]) -> None:
    assert quicken(llama(0, **changes)) is None


def test_other_models_have_no_quick_form(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quicken(llama(0).bfloat16()) is None
    other = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    assert quicken(Qwen2ForCausalLM(other).eval()) is None
    assert quicken(llama(0, vocab_size=VOCABULARY + 1)) is None  # a size that the kernels do not take
    nothing = Library("define void @nothing(ptr %args) { ret void }").function("nothing")
    monkeypatch.setattr(llama_program, "compiled", lambda form, names: defaultdict(lambda: nothing))
    assert quicken(model) is None  # wrong results
    monkeypatch.setattr(quick_draft, "lanes", lambda: None)
    assert quicken(model) is None


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_without_a_compiler_there_is_none(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(form: Any, names: Any) -> Any:
        raise error("no compiler")

    monkeypatch.setattr(llama_program, "compiled", broken)
    assert quicken(model) is None


def test_cache(quick: QuickDraft) -> None:
    cache = KVCache(2, 4)
    quick.read(TEXT[:2], cache)
    with pytest.raises(ValueError, match="cannot truncate a cache of 2 tokens to 3"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="no token"):
        quick.read([], cache)
    for odd in (-1, VOCABULARY):
        with pytest.raises(IndexError, match=f"the model has {VOCABULARY}"):
            quick.read([odd, 3], cache)
    with pytest.raises(ValueError, match="holds only 256 tokens"):
        quick.read(TEXT * 3, cache)
    assert len(cache) == 2
