"""Norms and attention in fewer calls: transformers' own results, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from speckv_online.cpu_engine import layer_overrides as lighten_module
from speckv_online.cpu_engine.layer_overrides import lighten
from speckv_online.modeling.grouped_attention import GROUPED, group
from speckv_online.modeling.kv_cache import KVCache
from tests.support.engine import SUPPORTED
from tests.support.tiny_models import tiny_llama


def norm(size: int, seed: int = 0, eps: float = 1e-5) -> Any:
    made = LlamaRMSNorm(size, eps)
    made.weight.data = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.5
    return made


def lightened(layer: Any) -> Any:
    if not SUPPORTED:
        pytest.skip("the engine has no kernels for this processor")
    model = nn.Sequential(layer)
    assert lighten(model) == 1
    with torch.inference_mode():
        model[0](torch.ones(2, len(layer.weight)))
    assert "forward" in vars(model[0])
    return model[0]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 600).map(lambda n: 8 * n),
    rows=st.integers(1, 40),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_norms_have_the_same_bits(size: int, rows: int, scale: float, seed: int) -> None:
    light, stock = lightened(norm(size, seed)), norm(size, seed)
    x = torch.randn(1, rows, size, generator=torch.Generator().manual_seed(seed)) * scale
    with torch.inference_mode():
        assert torch.equal(light(x), stock(x))


def test_norms_leave_to_transformers_what_is_not_theirs() -> None:
    light, stock = lightened(norm(64)), norm(64)
    x = torch.randn(3, 64)
    assert light(x).requires_grad  # gradients are on
    with torch.inference_mode():
        assert torch.equal(light(x.bfloat16()), stock(x.bfloat16()))
        turned = torch.randn(64, 3).t()
        assert torch.equal(light(turned), stock(turned))
    odd, plain = norm(60), norm(60)  # not a multiple of the lanes
    lighten(nn.Sequential(odd))
    y = torch.randn(2, 60)
    with torch.inference_mode():
        assert torch.equal(odd(y), plain(y))
        assert torch.equal(odd(y), plain(y))
    assert "forward" not in vars(odd)


def test_a_norm_with_another_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class LlamaRMSNorm2(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * (1 + 1e-6)

    LlamaRMSNorm2.__name__ = "LlamaRMSNorm"
    layer = LlamaRMSNorm2(64)
    assert lighten(nn.Sequential(layer)) == 1
    x = torch.randn(2, 64)
    with torch.inference_mode():
        first = layer(x)
        assert torch.equal(layer(x), first)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_without_a_compiler_layers_stay(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    def broken(layer: Any, x: torch.Tensor) -> torch.Tensor:
        raise error("no compiler")

    ready, _ = lighten_module.WAYS["LlamaRMSNorm"]
    monkeypatch.setitem(lighten_module.WAYS, "LlamaRMSNorm", (ready, broken))
    layer, x = norm(64), torch.randn(2, 64)
    lighten(nn.Sequential(layer))
    with torch.inference_mode():
        assert torch.equal(layer(x), norm(64)(x))
    assert "forward" not in vars(layer)


def logits(model: LlamaForCausalLM, widths: list[int]) -> list[torch.Tensor]:
    cache, start, found = KVCache(int(model.config.num_hidden_layers), 64), 0, []
    for width in widths:
        ids = torch.arange(start, start + width)[None] % 200 + 5
        found.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
        start += width
    return found


@torch.inference_mode()
def test_grouped_attention_has_the_same_bits() -> None:
    plain, model = tiny_llama(seed=4), tiny_llama(seed=4)
    assert group(model)
    assert model.config._attn_implementation == GROUPED
    assert not group(model)  # it is already
    widths = [13, 1, 5, 2, 9, 1]
    for found, expected in zip(logits(model, widths), logits(plain, widths), strict=True):
        assert torch.equal(found, expected)


def test_models_with_a_key_for_each_query_keep_their_attention() -> None:
    model = tiny_llama(seed=4)
    model.config.num_key_value_heads = model.config.num_attention_heads
    assert not group(model)
    assert model.config._attn_implementation == "sdpa"
