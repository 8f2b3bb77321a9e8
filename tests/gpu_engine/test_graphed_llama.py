"""Reading through graphs: the logits are the model's, whatever is recorded, dropped or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.gpu_engine import graphed_llama
from speckv_online.gpu_engine.graph_capture import EagerCapture, GraphCapture
from speckv_online.gpu_engine.graphed_llama import GraphedLlama, attach, graphs_of, why_not
from speckv_online.gpu_engine.static_cache import LEAST_CAPACITY, MAX_WIDTH, StaticKVCache, bucket
from speckv_online.modeling.kv_cache import KVCache
from tests.support.decoding import plain, prompt_of
from tests.support.recorded_capture import RecordedCapture
from tests.support.tiny_models import tiny_llama


class NoCapture(EagerCapture):
    """A device on which nothing can be recorded."""

    def capture(self, body: Callable[[], None], state: torch.Tensor) -> Callable[[], None]:
        super().capture(body, state)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def opened(graphs: GraphedLlama, capacity: int = 64) -> StaticKVCache:
    cache = graphs.cache(capacity)
    assert cache is not None
    return cache


@torch.inference_mode()
def own(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The model's own logits for all tokens of a text."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding: 1e-5 of the largest logit."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_windows_are_powers_of_two_times_128() -> None:
    assert [bucket(n) for n in (1, 127, 128, 129, 256, 257, 1025)] == [128, 128, 128, 256, 256, 512, 2048]


@pytest.mark.parametrize("capture", [EagerCapture(), RecordedCapture()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_models(capture: GraphCapture, attention: str) -> None:
    """Reads of all widths, with rejected tokens in between, across the border of a window."""
    model, rng = tiny_llama(), np.random.default_rng(0)
    model.set_attn_implementation(attention)
    graphs = GraphedLlama(model, capture)
    cache, text = opened(graphs), list[int]()
    for width in (40, *range(1, MAX_WIDTH + 1), 1, 1, 3, 30, 2):
        new = rng.integers(1, 257, width).tolist()
        keep = int(rng.integers(1, width + 1))
        found = graphs.read(new, cache, keep)
        same(found, own(model, text + new)[-keep:])
        text = (text + new)[: len(text) + width - int(rng.integers(0, min(width, 3)))]
        cache.truncate(len(text))
    assert len(cache) == len(text) > 128
    assert 0 < graphs.captures == len(cache.room.graphs)


@torch.inference_mode()
def test_tokens_that_only_the_device_knows() -> None:
    model = tiny_llama()
    graphs = GraphedLlama(model, RecordedCapture())
    drafts = torch.tensor([[7.0, 0, 0, 0, 0], [9.0, 0, 0, 0, 0]])
    cache = opened(graphs)
    same(graphs.read([5], cache, 3, drafts), own(model, [5, 7, 9]))
    wide = prompt_of(30)
    same(graphs.read(wide, cache, 3, drafts), own(model, [5, 7, 9, *wide, 7, 9])[-3:])


def test_an_answer_is_not_overwritten() -> None:
    graphs = GraphedLlama(tiny_llama(), RecordedCapture())
    cache = opened(graphs)
    first = graphs.read([5], cache, 1)
    kept = first.clone()
    graphs.read([6], cache, 1)
    assert torch.equal(first, kept)


def test_graphs_are_recorded_once_per_width_and_window() -> None:
    capture = RecordedCapture()
    graphs = GraphedLlama(tiny_llama(), capture)
    for _ in range(3):  # texts; the next one gets the last one's room
        cache = opened(graphs)
        graphs.read(prompt_of(40), cache, 1)  # a prompt is the model's own affair
        for _ in range(20):
            graphs.read([5], cache, 1)
            graphs.read([5, 6, 7], cache, 3)
        del cache
    assert capture.captured == 2
    assert capture.replayed == 3 * 40
    cache = opened(graphs)
    graphs.read(prompt_of(200), cache, 1)
    graphs.read([5], cache, 1)
    assert capture.captured == 3  # another window
    graphs.read([5, 6, 7], cache, 1)
    assert capture.captured == 4  # the last token's logits alone


def test_two_texts_at_once_have_a_room_each() -> None:
    model = tiny_llama()
    graphs = GraphedLlama(model, RecordedCapture())
    one, two = opened(graphs), opened(graphs)
    assert one.room is not two.room
    graphs.read([5, 6], one, 1)
    graphs.read([7], two, 1)
    same(graphs.read([8], one, 1), own(model, [5, 6, 8])[-1:])
    same(graphs.read([8], two, 1), own(model, [7, 8])[-1:])


def test_a_new_text_sees_nothing_of_the_last_one() -> None:
    model = tiny_llama()
    graphs = GraphedLlama(model, RecordedCapture())
    cache = opened(graphs)
    graphs.read(prompt_of(40), cache, 1)
    room = cache.room
    with torch.inference_mode():
        room.keys.fill_(float("nan"))
        room.values.fill_(float("nan"))
    del cache
    cache = opened(graphs)
    assert cache.room is room
    same(graphs.read([5, 6, 7], cache, 3), own(model, [5, 6, 7]))


def test_a_text_that_outgrows_its_room() -> None:
    model = tiny_llama(positions=2048)
    graphs = GraphedLlama(model, RecordedCapture())
    cache, text = opened(graphs), prompt_of(LEAST_CAPACITY - 2)
    graphs.read(text, cache, 1)
    graphs.read([5], cache, 1)
    assert graphs.captures == 1
    same(graphs.read([6, 6, 6], cache, 3), own(model, [*text, 5, 6, 6, 6])[-3:])
    same(graphs.read([6], cache, 1), own(model, [*text, 5, 6, 6, 6, 6])[-1:])
    assert cache.left
    assert graphs.captures == 1
    longer = opened(graphs, 3000)
    assert longer.room.capacity == 4096
    same(graphs.read([5], longer, 1), own(model, [5]))


def test_where_nothing_can_be_recorded_the_model_reads(caplog: pytest.LogCaptureFixture) -> None:
    model, capture = tiny_llama(), NoCapture()
    graphs = GraphedLlama(model, capture)
    cache = opened(graphs)
    same(graphs.read([5, 6], cache, 2), own(model, [5, 6]))
    same(graphs.read([7], cache, 1), own(model, [5, 6, 7])[-1:])
    assert capture.captured == 1  # it is not tried again
    assert graphs.failure == "operation not permitted when stream is capturing"
    assert graphs.failure in caplog.text
    assert graphs.cache(10) is None


def test_a_layer_that_waits_for_the_device_cannot_be_recorded() -> None:
    """As bitsandbytes' 8-bit layers do; such a model decodes as before."""
    model = tiny_llama()
    graphs = attach(model, RecordedCapture())
    embed, forward = model.model.embed_tokens, type(model.model.embed_tokens).forward

    def waits(ids: torch.Tensor) -> torch.Tensor:
        assert int(ids.max()) >= 0
        return forward(embed, ids)

    embed.forward = waits
    embed._hf_hook = None  # as accelerate leaves it: the engine tries
    prompt = prompt_of(10)
    decoder = SpeculativeDecoder(None, policy="fixed:0", target=model)
    assert decoder.generate(prompt, 12).tokens == plain(model, prompt, 12)
    assert "not permitted" in graphs.failure


def test_weights_in_other_places_drop_the_graphs() -> None:
    model = tiny_llama()
    graphs = GraphedLlama(model, RecordedCapture())
    cache = opened(graphs)
    graphs.read([5, 6], cache, 2)
    held = cache  # a text that is still under way
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    cache = opened(graphs)
    assert cache.room is not held.room
    same(graphs.read([5, 6], cache, 2), own(model, [5, 6]))
    assert graphs.captures == 2
    graphs.read([7], held, 1)
    assert graphs.captures == 2  # its graphs are of no use any more: the model read on


def test_graphs_to_come_share_no_memory_with_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a pool whose last graph is gone; and a model that moved is recorded where it is now."""
    parted, made = [], list[str]()

    class Noted(EagerCapture):
        def part(self) -> None:
            parted.append(1)

    def for_device(device: torch.device) -> Noted:
        made.append(device.type)
        return Noted()

    monkeypatch.setattr(graphed_llama, "capture_for", for_device)
    model = tiny_llama(positions=2048)
    graphs = GraphedLlama(model)
    opened(graphs)
    before = len(parted)
    opened(graphs)
    assert len(parted) == before
    opened(graphs, 1500)  # the room is too short
    assert len(parted) == before + 1
    model.to("meta")
    opened(graphs)
    assert made == ["cpu", "meta"]


def test_weights_changed_in_place_are_read() -> None:
    model = tiny_llama()
    graphs = GraphedLlama(model, RecordedCapture())
    graphs.read([5, 6], opened(graphs), 2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    same(graphs.read([5, 6], opened(graphs), 2), own(model, [5, 6]))
    assert graphs.captures == 1


def test_hooks_are_called() -> None:
    model, seen = tiny_llama(), []
    graphs = attach(model, RecordedCapture())
    decoder = SpeculativeDecoder(None, policy="fixed:0", target=model)
    decoder.generate(prompt_of(8), 8)
    assert graphs.captures
    handle = model.model.layers[1].register_forward_hook(lambda *a: seen.append(1))
    decoder.generate(prompt_of(8), 8)
    assert len(seen) == 8
    assert "has a hook" in graphs.failure
    handle.remove()
    decoder.generate(prompt_of(8), 8)
    assert len(seen) == 8
    assert not graphs.failure


def test_what_takes_no_graphs() -> None:
    assert why_not(tiny_llama()) == ""
    assert "plain Llama" in why_not(tiny_llama().model)
    assert "eval" in why_not(tiny_llama().train())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in why_not(tiny_llama(rope_parameters=rope))
    other = tiny_llama()
    other.lm_head = other.lm_head.to(torch.bfloat16)
    assert "several types" in why_not(other)

    class Linear4bit(torch.nn.Linear):
        """Of the name of a known layer, from somewhere else."""

    other = tiny_llama()
    other.model.layers[0].self_attn.q_proj = Linear4bit(64, 64, bias=False)
    assert "layers.0.self_attn.q_proj is a tests.gpu_engine" in why_not(other)


@torch.inference_mode()
def test_bad_tokens_never_reach_the_device() -> None:
    graphs = GraphedLlama(tiny_llama(), RecordedCapture())
    cache = opened(graphs)
    for bad in ([-1], [260]):
        with pytest.raises(IndexError, match="the model has 260"):
            graphs.read(bad, cache, 1)
    with pytest.raises(ValueError, match="are wanted"):
        graphs.read([5], cache, 2)
    assert len(cache) == 0


def test_a_copy_of_a_model_has_no_graphs_of_the_original() -> None:
    model = tiny_llama()
    graphs = attach(model, RecordedCapture())
    assert graphs_of(model) is graphs
    assert graphs_of(copy.deepcopy(model)) is None
    assert graphs_of(pickle.loads(pickle.dumps(model))) is None
    assert graphs_of(tiny_llama()) is None
    assert isinstance(model, LlamaForCausalLM)


def test_any_forward_may_use_the_cache() -> None:
    """The model's own over a static cache is the model's own over another one."""
    model, prompt = tiny_llama(), prompt_of(20)
    graphs = GraphedLlama(model, RecordedCapture())
    static, other = opened(graphs), KVCache(len(model.model.layers), 64)
    with torch.inference_mode():
        for ids in (prompt, [5, 6], [7]):
            a, b = (model(input_ids=torch.tensor([ids]), past_key_values=c).logits for c in (static, other))
            assert torch.equal(a, b)
    assert len(static) == len(other) == 23


def test_recording_beforehand() -> None:
    """Steps of texts of up to 200 tokens record nothing after that."""
    graphs = GraphedLlama(tiny_llama(layers=1), RecordedCapture())
    assert graphs.record(200) == 2 * MAX_WIDTH
    cache = opened(graphs, 200)
    graphs.read(prompt_of(30), cache, 1)
    for width in (1, 5, 17, 17, 17, 17, 17, 17, 17, 17):
        graphs.read([5] * width, cache, width)
    assert graphs.captures == 2 * MAX_WIDTH
