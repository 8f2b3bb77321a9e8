"""The short way through bitsandbytes' layers must be theirs to the last bit."""

from __future__ import annotations

import copy
import time
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speckv_online.cpu_engine.kernels.bnb import four_bit_ways, quickest
from speckv_online.cpu_engine.kernels.llvm import Kernel, features
from speckv_online.cpu_engine.layer_overrides import WAYS, lighten
from speckv_online.cpu_engine.pack import pack
from speckv_online.modeling.fingerprint import fingerprint
from tests.support.engine import needs_level


@pytest.fixture(scope="module")
def ways() -> list[Kernel]:
    return four_bit_ways()


def layer(kind: str, bias: bool = False) -> Any:
    torch.manual_seed(1)
    plain = nn.Linear(128, 192, bias=bias)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(128, 192, bias=bias, has_fp16_weights=False, threshold=6.0)
    else:
        made = bnb.nn.Linear4bit(128, 192, bias=bias, quant_type=kind, compute_dtype=torch.float32)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu").eval()


def lightened(kind: str, bias: bool = False) -> Any:
    needs_level(kind)
    model = nn.Sequential(layer(kind, bias))
    assert lighten(model) == 1
    with torch.inference_mode():
        model[0](torch.ones(2, 128))
    assert "forward" in vars(model[0])
    return model[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_equal_to_the_last_bit(kind: str, bias: bool) -> None:
    light, stock = lightened(kind, bias), layer(kind, bias)
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        for scale in (0.01, 1.0, 2.0, 4.0):  # the latter two have more and more outliers
            for shape in ((1, 1, 128), (1, 5, 128), (2, 3, 128), (17, 128)):
                x = torch.randn(shape, generator=generator) * scale
                found = light(x)
                assert found.dtype == torch.float32
                assert torch.equal(found, stock(x)), (scale, shape)


@pytest.mark.skipif("avx512bf16" not in features(), reason="no such instructions")
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 30), size=st.sampled_from([(64, 32, 64), (192, 96, 64), (256, 64, 128)]), seed=st.integers(0, 9)
)
def test_both_ways_to_multiply_pairs_have_the_same_bits(
    ways: list[Kernel], rows: int, size: tuple[int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, block = size
    weights = torch.randint(0, 256, (inputs * outputs // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(inputs // block * outputs, generator=generator).bfloat16()
    x, codes = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((rows, inputs), (16,)))
    first, second = torch.empty(rows, outputs), torch.empty(rows, outputs)
    for kernel, out in zip(ways, (first, second), strict=True):
        pointers = x.data_ptr(), weights.data_ptr(), out.data_ptr()
        kernel(*pointers, rows, inputs, outputs, scales.data_ptr(), block, codes.data_ptr())
    assert torch.equal(first, second)
    # Of 32 features, a byte of the last 16 and of the first 16, for two inputs in turn.
    bytes_ = weights.view(outputs // 32, inputs // 2, 16, 2)
    table = torch.cat((codes[(bytes_ & 15).long()], codes[(bytes_ >> 4).long()]), 2)
    w = table.permute(0, 2, 1, 3).reshape(outputs, inputs)
    w = w * scales.float().view(inputs // block, outputs).t().repeat_interleave(block, 1)
    torch.testing.assert_close(first, x @ w.t(), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_what_is_no_number_or_none_at_all(kind: str) -> None:
    light, stock = lightened(kind), layer(kind)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    x[0] = 0.0
    x[1, 3] = 1e6  # beyond fp16
    with torch.inference_mode():
        torch.testing.assert_close(light(x), stock(x), rtol=0.0, atol=0.0, equal_nan=True)
        x[2, 5], x[3] = torch.nan, torch.nan
        found, expected = light(x), stock(x)
    assert found[2:4].isnan().all()
    assert torch.equal(found[4:], expected[4:])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_it_does_not_take_goes_the_stock_way(kind: str) -> None:
    light, stock = lightened(kind), layer(kind)
    x = torch.randn(3, 128)
    assert torch.equal(light(x).detach(), stock(x).detach())  # with gradients on
    with torch.inference_mode():
        assert light(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(light(x.bfloat16()), stock(x.bfloat16()))
        assert torch.equal(copy.deepcopy(light)(x), light(x))
        turned = torch.randn(128, 3).t()  # not contiguous
        assert torch.equal(light(turned), stock(turned.contiguous()))
    assert isinstance(light, type(stock))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_another_arithmetic_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lightened(kind)
    name = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
    ready, forward = WAYS[name]
    monkeypatch.setitem(WAYS, name, (ready, lambda own, x: forward(own, x) * (1 + 1e-6)))
    model, stock = nn.Sequential(layer(kind)), layer(kind)
    lighten(model)
    x = torch.ones(2, 128)
    with torch.inference_mode():
        assert torch.equal(model(x), stock(x))
        assert torch.equal(model(x), stock(x))
    assert "forward" not in vars(model[0])


def test_packing_a_model_does_it_and_keeps_its_fingerprint() -> None:
    light, model = lightened("nf4"), nn.Sequential(layer("nf4"), nn.Linear(192, 7))
    before, x = fingerprint(model), torch.randn(2, 128)
    assert pack(model) == 0
    assert fingerprint(model) == before
    with torch.inference_mode():
        assert torch.equal(model[0](x), light(x))
        assert torch.equal(model[0](x), light(x))
    assert vars(model[0])["forward"].__func__ is vars(light)["forward"].__func__


def test_the_quicker_kernel_is_chosen_though_it_is_held_up_at_first() -> None:
    calls = {"quick": 0, "slow": 0}

    def quick(*arguments: int) -> None:
        calls["quick"] += 1
        time.sleep(0.004 if calls["quick"] <= 50 else 0.0)

    def slow(*arguments: int) -> None:
        calls["slow"] += 1
        time.sleep(0.002)

    for ways in ([quick, slow], [slow, quick]):
        calls |= {"quick": 0, "slow": 0}
        assert quickest(ways) is quick  # type: ignore[arg-type, comparison-overlap]
    assert calls["quick"] == calls["slow"]
