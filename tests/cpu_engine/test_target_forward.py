"""A target's quick forward: the model's logits up to rounding, the same bits at every width, and its own elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaForCausalLM

from experiments.drift.stage import first_layers
from speckv_online.cpu_engine import llama_program
from speckv_online.cpu_engine.batched_forward import CompiledBatch, batch_of
from speckv_online.cpu_engine.int8_draft import compile_forward
from speckv_online.cpu_engine.pack import pack
from speckv_online.cpu_engine.target_forward import MOST_PIECES, MOST_ROWS, CompiledTarget, try_compiled_forward
from speckv_online.decoding.batch import decode_batch
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.modeling.batched_model import BatchModel
from speckv_online.modeling.fingerprint import fingerprint
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.models.pairs import load_target
from tests.support.engine import needs_engine, needs_level
from tests.support.engine import small_llama as llama

pytestmark = needs_engine
VOCABULARY, LAYERS, LONGEST = 304, 2, 400
TEXT = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, 390))


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    stock, compiled = llama(), llama()
    pack(compiled)
    assert isinstance(compiled._compiled, CompiledTarget)
    return stock, compiled


@torch.inference_mode()
@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.integers(1, 90), min_size=1, max_size=6), junk=st.integers(0, 30))
def test_logits_are_the_models_and_have_the_same_bits_at_every_width(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], widths: list[int], junk: int
) -> None:
    stock, compiled = pair
    length = min(sum(widths), MOST_ROWS * MOST_PIECES)
    expected = stock(input_ids=TEXT[None, :length]).logits[0]
    whole = compiled(input_ids=TEXT[None, :length], past_key_values=KVCache(LAYERS, 4)).logits[0]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    cache, at = KVCache(LAYERS, 7), 0
    for width in widths:
        some = TEXT[None, at : min(at + width, length)]
        if not some.numel():
            break
        keep = 1 + (width + junk) % some.shape[1]
        found = compiled(input_ids=some, past_key_values=cache, logits_to_keep=keep, use_cache=True).logits[0]
        at += some.shape[1]
        assert torch.equal(found, whole[at - keep : at])
        if junk:  # a draft that is rejected
            compiled(input_ids=TEXT[None, -junk:], past_key_values=cache, logits_to_keep=1)
            cache.truncate(at)


@torch.inference_mode()
def test_texts_in_turns_copies_and_growth(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    """Where a cache's keys and values are is remembered: a copy has its own, and so has one that grew meanwhile."""
    stock, compiled = pair
    program, ids = compiled._compiled, TEXT.tolist()
    expected = stock(input_ids=TEXT[None, :60]).logits[0]

    def near(found: torch.Tensor, at: int) -> None:
        torch.testing.assert_close(found, expected[at - len(found) : at], rtol=1e-4, atol=1e-3)

    one, other = KVCache(LAYERS, 40), KVCache(LAYERS, 8)
    near(program.read(ids[:20], one, 2), 20)
    near(program.read(ids[:5], other, 1), 5)
    copied = copy.deepcopy(one)
    program.read(ids[100:110], copied, 1)  # over what must not be the original's
    near(program.read(ids[20:30], one, 3), 30)
    near(program.read(ids[5:9], other, 1), 9)  # it grows
    stock(input_ids=TEXT[None, 9:50], past_key_values=other)  # and again, by the model's own forward
    near(program.read(ids[50:52], other, 2), 52)
    near(program.read(ids[30:60], one, 1), 60)  # it grows too
    copied.truncate(20)
    near(program.read(ids[20:24], copied, 4), 24)


@torch.inference_mode()
def test_reading_on_without_the_model_around(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    stock, compiled = pair
    cache, ids, calls = KVCache(LAYERS, 64), TEXT.tolist(), []
    assert try_compiled_forward(compiled, ids[:4], cache, 1) is None  # the beginning, when weights are looked at
    assert try_compiled_forward(stock, ids[:4], cache, 1) is None
    whole = compiled(input_ids=TEXT[None, :30], past_key_values=KVCache(LAYERS, 64)).logits[0]
    compiled(input_ids=TEXT[None, :10], past_key_values=cache)
    found = try_compiled_forward(compiled, ids[10:16], cache, 3)
    assert found is not None
    assert torch.equal(found, whole[13:16])
    assert try_compiled_forward(compiled, [1] * (MOST_ROWS * MOST_PIECES + 1), cache, 1) is None
    note = compiled.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert try_compiled_forward(compiled, ids[16:18], cache, 1) is None
        decoder = SpeculativeDecoder(None, policy="autoregressive", target=compiled)
        heard = decoder.generate(ids[:8], 6).tokens
    finally:
        note.remove()
    assert len(calls) == 6  # who listens to the model hears of every step
    assert decoder.generate(ids[:8], 6).tokens == heard
    assert len(calls) == 6


@torch.inference_mode()
def test_a_processor_with_short_registers(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    stock, packed = pair
    compiled, cache = CompiledTarget(packed, 8), KVCache(LAYERS, 4)
    expected = stock(input_ids=TEXT[None, :90]).logits[0]
    whole = compiled.read(TEXT[:90].tolist(), KVCache(LAYERS, 4), 90)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    parts = [compiled.read(part.tolist(), cache, len(part)) for part in TEXT[:90].split([1, 6, 20, 63])]
    assert torch.equal(torch.cat(parts), whole)


@torch.inference_mode()
@pytest.mark.parametrize("level", ["bf16", "int8", "nf4", "fp4"])
def test_every_level_gives_a_token_the_same_bits_at_every_width(level: str, tmp_path: Path) -> None:
    """Also where some inputs are outliers of LLM.int8: in one forward with others and alone."""
    needs_level(level)
    made = llama(hidden_size=128, intermediate_size=192, num_attention_heads=4)
    with torch.no_grad():
        made.model.layers[0].input_layernorm.weight[5] = 9.0
    made.save_pretrained(tmp_path)
    stock, model = (load_target(tmp_path, level, "cpu") for _ in range(2))
    before = fingerprint(load_target(tmp_path, level, "cpu"))
    pack(model)
    assert isinstance(model._compiled, CompiledTarget)
    assert fingerprint(model) == before
    caches = [KVCache(LAYERS, 60) for _ in range(3)]
    parts = TEXT[:60].split(1)
    expected = torch.cat([stock(input_ids=part[None], past_key_values=caches[0]).logits[0] for part in parts])
    alone = torch.cat([model(input_ids=part[None], past_key_values=caches[1]).logits[0] for part in parts])
    wide = [
        model(input_ids=part[None], past_key_values=caches[2]).logits[0] for part in TEXT[:60].split([1, 9, 17, 33])
    ]
    assert torch.equal(torch.cat(wide), alone)
    assert (alone - expected).std() < 0.05 * expected.std()
    # A prompt is read as the model reads it, and drafts that are verified with it as without it.
    prompt, drafts, cache, again = TEXT[None, :20], TEXT[None, 20:25], KVCache(LAYERS, 60), KVCache(LAYERS, 60)
    read = stock(input_ids=prompt, past_key_values=KVCache(LAYERS, 60), logits_to_keep=1).logits[0]
    both = model(input_ids=TEXT[None, :25], past_key_values=cache, logits_to_keep=6).logits[0]
    first = model(input_ids=prompt, past_key_values=again, logits_to_keep=1).logits[0]
    assert (first - read).std() < 0.05 * read.std()
    rest = [model(input_ids=one, past_key_values=again).logits[0] for one in drafts.split(1, 1)]
    assert torch.equal(both, torch.cat([first, *rest]))


@torch.inference_mode()
def test_a_copy_outlives_its_model() -> None:
    model = llama()
    pack(model)
    expected = model(input_ids=TEXT[None, :9], past_key_values=KVCache(LAYERS, 20)).logits
    copied = copy.deepcopy(model)
    del model
    assert torch.equal(copied(input_ids=TEXT[None, :9], past_key_values=KVCache(LAYERS, 20)).logits, expected)


def write(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0)


def load(model: LlamaForCausalLM) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def train(model: LlamaForCausalLM) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=TEXT[None, :20], labels=TEXT[None, :20]).loss.backward()
    optimizer.step()


def replace_norm(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].input_layernorm
    layer.weight = torch.nn.Parameter(2.0 * layer.weight.detach())


def replace_layer(model: LlamaForCausalLM) -> None:
    torch.manual_seed(8)
    model.lm_head = torch.nn.Linear(96, VOCABULARY, bias=False)


def replace_part(model: LlamaForCausalLM) -> None:
    model.model.layers[0].mlp = torch.nn.Identity()


def write_unseen(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.data.mul_(0.5)
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(0.5)
    if hasattr(model, "_compiled"):
        pack(model)


@pytest.mark.parametrize("change", [write, load, train, replace_norm, replace_layer, replace_part, write_unseen])
def test_changed_weights_are_decoded_with(change: Any) -> None:
    """Whatever changes a packed model, its next text is that of the model as it is then, and its copies stay."""
    stock, model = llama(), llama()
    pack(model)
    compiled, before = model._compiled, copy.deepcopy(model)
    short, one = {"input_ids": TEXT[None, :9]}, {"input_ids": TEXT[None, 9:10]}
    changed, tokens = list[torch.Tensor](), list[list[int]]()
    for some in (stock, model):
        with torch.inference_mode():
            first = some(**short, past_key_values=KVCache(LAYERS, 20)).logits
        change(some)
        with torch.inference_mode():
            cache = KVCache(LAYERS, 20)
            changed += [some(**short, past_key_values=cache).logits, some(**one, past_key_values=cache).logits]
        decoder = SpeculativeDecoder(None, policy="autoregressive", target=some)
        tokens.append(decode_batch(decoder, [TEXT[:9].tolist()] * 2, 1)[0].tokens)
    for want, found in zip(changed[:2], changed[2:], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert tokens[0] == tokens[1]
    assert not torch.allclose(first, changed[2])
    assert hasattr(model, "_compiled") == (change not in (replace_layer, replace_part))  # parts that it does not know
    with torch.inference_mode():
        same = before(**short, past_key_values=KVCache(LAYERS, 20)).logits
    assert torch.equal(same, first)
    assert before._compiled is not compiled  # of its own weights


@torch.inference_mode()
def test_a_model_of_some_of_the_layers_has_a_forward_of_its_own() -> None:
    stock, model = llama(), llama()
    pack(model)
    stock.model.layers = stock.model.layers[:1]
    expected = stock(input_ids=TEXT[None, :9]).logits
    small, cut = first_layers(model, 1), copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:1]
    for other in (small, cut):
        torch.testing.assert_close(other(input_ids=TEXT[None, :9], past_key_values=KVCache(1, 20)).logits, expected)
    assert len(model(input_ids=TEXT[None, :9], past_key_values=KVCache(LAYERS, 20)).past_key_values) == 9


@pytest.mark.parametrize("policy", ["autoregressive", "fixed:3", "online"])
def test_a_batch_says_what_each_prompt_alone_does(pair: tuple[LlamaForCausalLM, LlamaForCausalLM], policy: str) -> None:
    """Rows of other lengths that end at other times, over more tokens than are read at once."""
    target, draft = pair[1], llama()
    with torch.no_grad():
        draft.lm_head.weight.add_(0.02 * torch.randn_like(draft.lm_head.weight))
    decoder = SpeculativeDecoder(
        ModelDrafter(draft, VOCABULARY, compiled=compile_forward(draft)), policy=policy, target=target
    )
    prompts = [TEXT[a:b].tolist() for a, b in ((0, 1), (3, 40), (40, 42), (50, 160), (200, 231))]
    alone = [decoder.generate(p, 24, eos_ids=[7]) for p in prompts]
    together = decode_batch(decoder, prompts, 24, eos_ids=[7])
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    if policy == "fixed:3":
        drafted = sum(s.drafted for g in together for s in g.steps)
        assert 0 < sum(s.accepted for g in together for s in g.steps) < drafted
        signals = [[s.mean_draft_entropy for s in g.steps] for g in together]
        np.testing.assert_array_equal(signals[1], [s.mean_draft_entropy for s in alone[1].steps])
    long = [TEXT.tolist()[: MOST_ROWS * MOST_PIECES + 1], [5, 6]]
    assert isinstance(batch_of(target, long, 300, target._compiled.program), BatchModel)
    assert isinstance(batch_of(target, prompts, 300, target._compiled.program), CompiledBatch)


@torch.inference_mode()
def test_what_it_does_not_know_is_the_models(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    stock, compiled = pair
    ids, batch = TEXT[None, :9], TEXT[:18].view(2, 9)
    for arguments in (
        {"input_ids": ids},
        {"input_ids": ids, "past_key_values": DynamicCache(config=compiled.config)},
        {"input_ids": batch, "past_key_values": KVCache(LAYERS, 20)},
        {"input_ids": ids, "past_key_values": KVCache(LAYERS, 20), "attention_mask": torch.ones_like(ids)},
        {"input_ids": TEXT[None, : MOST_ROWS * MOST_PIECES + 1], "past_key_values": KVCache(LAYERS, 20)},
    ):
        expected = stock(arguments["input_ids"]).logits
        torch.testing.assert_close(compiled(**arguments).logits, expected, rtol=1e-4, atol=1e-3)
    wide = compiled(input_ids=ids, past_key_values=KVCache(LAYERS, 20), output_hidden_states=True)
    assert len(wide.hidden_states) == LAYERS + 1
    # Past the end of its table of positions.
    cache = KVCache(LAYERS, 20)
    for part in TEXT.split(MOST_ROWS * MOST_PIECES):
        compiled(input_ids=part[None], past_key_values=cache)
    assert compiled(input_ids=TEXT[None, :30], past_key_values=cache).logits.shape == (1, 30, VOCABULARY)
    assert len(cache) == len(TEXT) + 30


@torch.inference_mode()
def test_tokens_that_there_are_not_are_refused(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    cache = KVCache(LAYERS, 20)
    for odd in (-1, VOCABULARY):
        with pytest.raises(IndexError, match=f"the model has {VOCABULARY}"):
            pair[1](input_ids=torch.tensor([[3, odd]]), past_key_values=cache)


@torch.inference_mode()
def test_transformers_generates_with_it_as_ever(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    prompts, said = TEXT[:16].view(2, 8), []
    for model in pair:
        said.append(model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False))
        assert model._supports_logits_to_keep()
    assert torch.equal(*said)


def test_gradients_are_the_models(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    logits = pair[1](input_ids=TEXT[None, :5], past_key_values=KVCache(LAYERS, 20)).logits
    assert logits.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_other_llamas_stay(changes: dict[str, Any]) -> None:
    model = llama(**changes)
    pack(model)
    assert not hasattr(model, "_compiled")


def test_without_kernels_or_with_wrong_ones_a_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama_program.compiled

    def wrong(form: Any, names: Any) -> Any:
        made = real(form, names)
        return {**made, "gate_float": made["add"]}

    def broken(form: Any, names: Any) -> Any:
        raise OSError("no compiler")

    for kernels in (wrong, broken):
        model = llama()
        monkeypatch.setattr(llama_program, "compiled", kernels)
        pack(model)
        assert not hasattr(model, "_compiled")
        assert model(input_ids=TEXT[None, :5], past_key_values=KVCache(LAYERS, 20)).logits.shape[1] == 5
