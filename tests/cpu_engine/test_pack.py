"""Packed linear layers: the same model, up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.fixed import Fixed
from speckv_online.cpu_engine import pack as packed
from speckv_online.cpu_engine.kernels.linear import Shape, shape
from speckv_online.cpu_engine.pack import MOST_ROWS, PackedLinear, pack, why_not
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.modeling.fingerprint import fingerprint
from tests.support.engine import needs_engine
from tests.support.tiny_models import tiny_llama

USE = shape() or Shape(8, 2, 5)


@needs_engine
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48), (MOST_ROWS, 48), (MOST_ROWS + 1, 48), (0, 48)])
def test_packed_linear_is_linear(bias: bool, shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear, USE)(x), linear(x), rtol=1e-5, atol=1e-5)
        odd = torch.randn(48, 3).t()  # not contiguous
        torch.testing.assert_close(PackedLinear(linear, USE)(odd), linear(odd), rtol=1e-5, atol=1e-5)


@needs_engine
def test_a_weight_that_is_changed_is_laid_out_anew() -> None:
    linear, x = nn.Linear(48, 80), torch.randn(5, 48)
    layer = PackedLinear(linear, USE)
    with torch.no_grad():
        for change in (
            lambda: linear.weight.mul_(3.0),
            lambda: setattr(layer, "weight", nn.Parameter(x.repeat(16, 1))),
        ):
            layer(x)
            change()
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@needs_engine
def test_gradients_pass_as_through_the_layer_itself() -> None:
    linear, x = nn.Linear(48, 80), torch.randn(3, 48, requires_grad=True)
    PackedLinear(linear, USE)(x).sum().backward()
    found, x.grad = x.grad, None
    linear(x).sum().backward()
    assert found is not None
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad)


@needs_engine
def test_packed_model_decodes_the_same_and_keeps_its_fingerprint() -> None:
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


def test_layers_of_odd_sizes_and_half_and_quantized_ones_stay() -> None:
    class Quantized(nn.Linear):
        """Stands for a library's own layer: a subclass."""

    model = nn.Sequential(nn.Linear(65, 7), nn.Linear(128, 128).half(), Quantized(128, 128))
    assert pack(model) == 0
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, Quantized]


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_where_nothing_can_be_compiled_nothing_changes(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    def missing(use: Shape) -> None:
        raise error("no compiler")

    monkeypatch.setattr(packed, "compiled", missing)
    monkeypatch.setattr(packed, "why_not", why_not.__wrapped__)
    model = nn.Sequential(nn.Linear(128, 128))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_a_processor_without_vectors_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "shape", lambda: None)
    model = nn.Sequential(nn.Linear(128, 128))
    assert pack(model) == 0


def test_a_model_too_large_to_keep_twice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 4 * 128 * 128 - 1)
    model = nn.Sequential(nn.Linear(128, 128))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


@needs_engine
def test_wrong_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x.new_ones(*x.shape[:-1], 160))
    assert why_not.__wrapped__(USE) == "its results are not those of nn.Linear"
