"""Hooks and replaced modules on a packed model: the next text is what plain decoding of the model as it is says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from speckv_online.cpu_engine.pack import pack
from speckv_online.decoding.decoder import SpeculativeDecoder
from tests.support.decoding import Scripted
from tests.support.engine import needs_engine, small_llama

pytestmark = needs_engine
PROMPT = torch.randint(1, 304, (20,), generator=torch.Generator().manual_seed(3)).tolist()


@contextmanager
def layer_hook(model: LlamaForCausalLM) -> Iterator[None]:
    steer = torch.zeros(96)
    steer[7] = 30.0
    handle = model.model.layers[0].register_forward_hook(
        lambda layer, args, out: (out[0] + steer, *out[1:]) if isinstance(out, tuple) else out + steer
    )
    yield
    handle.remove()


@contextmanager
def pre_hook(model: LlamaForCausalLM) -> Iterator[None]:
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda layer, args: (args[0] * 0.2,))
    yield
    handle.remove()


@contextmanager
def head_hook(model: LlamaForCausalLM) -> Iterator[None]:
    raised = 50.0 * nn.functional.one_hot(torch.tensor(100), 304)
    handle = model.lm_head.register_forward_hook(lambda layer, args, out: out + raised)
    yield
    handle.remove()


@contextmanager
def body_hook(model: LlamaForCausalLM) -> Iterator[None]:
    def hook(body: Any, args: Any, kwargs: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out

    handle = model.model.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


@contextmanager
def own_forward(model: LlamaForCausalLM) -> Iterator[None]:
    """What accelerate does to modules."""
    mlp = model.model.layers[1].mlp
    mlp.forward = MethodType(lambda self, x: 0.5 * type(self).forward(self, x), mlp)
    yield
    del mlp.forward


class LowRank(nn.Module):
    """An adapter on a linear layer, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.base, self.weight, self.bias = base, base.weight, None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(x))
        return out


@contextmanager
def adapter(model: LlamaForCausalLM) -> Iterator[None]:
    attention = model.model.layers[0].self_attn
    base = attention.v_proj
    attention.v_proj = LowRank(base).eval()
    yield
    attention.v_proj = base


class Louder(nn.Module):
    """Another part in a layer's place, with the same weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))
        return out


@contextmanager
def replaced(model: LlamaForCausalLM) -> Iterator[None]:
    layer = model.model.layers[0]
    inner = layer.mlp
    layer.mlp = Louder(inner).eval()
    yield
    layer.mlp = inner


CHANGES = [layer_hook, pre_hook, head_hook, body_hook, own_forward, adapter, replaced]


def plain(model: LlamaForCausalLM) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0)
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_text_is_of_the_model_as_it_is(change: Callable[[LlamaForCausalLM], Any]) -> None:
    stock, draft = small_llama(), small_llama()
    model = copy.deepcopy(stock)
    pack(model)
    compiled = model._compiled
    decoder = SpeculativeDecoder(draft, policy=Scripted([3, 0, 4]), target=model)

    def ours() -> list[list[int]]:
        alone = decoder.generate(PROMPT, 12, eos_ids=[]).tokens
        return [alone, *(out.tokens for out in decoder.decode_batch([PROMPT, PROMPT], 12, eos_ids=[]))]

    before = plain(stock)
    assert ours() == [before] * 3
    with change(stock), change(model):
        expected = plain(stock)
        assert expected != before
        assert ours() == [expected] * 3
    assert ours() == [before] * 3
    assert not model._compiled.watched  # the compiled forward is in use again
    assert (model._compiled is compiled) == (change not in (adapter, replaced))


def test_hidden_states_leave_no_hook_that_counts() -> None:
    """transformers leaves hooks of its own on modules when it was once asked for hidden states."""
    model = small_llama()
    pack(model)
    model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True)
    SpeculativeDecoder(None, policy="autoregressive", target=model).generate(PROMPT, 4)
    assert not model._compiled.watched


def test_a_model_that_was_of_another_type_for_a_text() -> None:
    """Weights that went to fp64 and back may lie where they lay before."""
    stock, model = small_llama(), small_llama()
    pack(model)
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=model)
    assert decoder.generate(PROMPT, 12, eos_ids=[]).tokens == plain(stock)
    for some in (stock, model):
        some.to(torch.float64)
    assert decoder.generate(PROMPT, 12, eos_ids=[]).tokens == plain(stock)
    for some in (stock, model):
        some.to(torch.float32)
        with torch.no_grad():
            some.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert decoder.generate(PROMPT, 12, eos_ids=[]).tokens == plain(stock)
