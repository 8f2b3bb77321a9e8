"""Packed linear layers: the same model, up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.fixed import Fixed
from speckv_online import packed
from speckv_online.decoding import SpeculativeDecoder
from speckv_online.drafters import ModelDrafter
from speckv_online.fingerprints import fingerprint
from speckv_online.packed import PackedLinear, can_pack, pack
from tests.conftest import tiny_llama

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no packed linear layers")


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48)])
def test_packed_linear_is_linear(bias: bool, shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_packed_model_decodes_the_same_and_keeps_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    plain, model = tiny_llama(seed=3), tiny_llama(seed=3)
    assert pack(model) == sum(isinstance(m, nn.Linear) for m in plain.modules())
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert fingerprint(model) == fingerprint(plain)
    prompt = list(range(20, 40))
    outputs = []
    for target in (plain, model):
        decoder = SpeculativeDecoder(ModelDrafter(model, 260), policy=Fixed(gamma=4), target=target)
        outputs.append(decoder.generate(prompt, 24).tokens)
    assert outputs[0] == outputs[1]


def test_small_half_and_quantized_layers_stay() -> None:
    class Quantized(nn.Linear):
        """Stands for a library's own layer: a subclass."""

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(1000, 1000).half(), Quantized(1000, 1000))
    assert pack(model) == 0
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, Quantized]


def test_a_torch_without_the_operator_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(packed, "_linear", missing)
    model = nn.Sequential(nn.Linear(1000, 1000))
    assert not can_pack()
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_a_model_too_large_to_keep_twice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 4 * 1000 * 1000 - 1)
    model = nn.Sequential(nn.Linear(1000, 1000))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_wrong_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_linear", lambda x, weight, bias: x.new_ones(*x.shape[:-1], 160))
    assert not can_pack()
