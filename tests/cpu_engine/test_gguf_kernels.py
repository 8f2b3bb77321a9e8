"""Kernels on GGUF's blocks: right for every type, the same bits at every width and on processors with AVX2 only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speckv_online.cpu_engine.kernels.gguf_blocks import compiled, inputs_for, lay_out
from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.kernels.llvm import double
from speckv_online.modeling.gguf_types import TYPES, BlockType, dequantize
from tests.support.engine import SUPPORTED

if not SUPPORTED:
    pytest.skip("the engine has no kernels for this processor", allow_module_level=True)
#: This processor's own registers, and those of one with AVX2 only, which this one has too.
PROCESSORS = {lanes(): None, 8: "haswell"}
QUANTIZED = {kind.name: kind for kind in TYPES.values() if kind.bits}


def blocks(outputs: int, inputs: int, kind: BlockType, generator: torch.Generator) -> torch.Tensor:
    """Random blocks whose scales and minima are of both signs."""
    data = torch.randint(0, 256, (outputs, inputs // 32, kind.bytes), generator=generator, dtype=torch.uint8)
    heads = torch.randn(outputs, inputs // 32, kind.head // 2, generator=generator).half()
    data[..., : kind.head] = heads.view(torch.uint8)
    return data.view(outputs, -1)


def product(
    x: torch.Tensor, data: torch.Tensor, kind: BlockType, to: str, width: int, start: float = 0.0
) -> torch.Tensor:
    """Return what the kernels give, added to a number; rows are further apart than they are long."""
    rows, inputs, outputs, cpu = len(x), x.shape[1], len(data), PROCESSORS[width]
    numbers, weights, stride = inputs_for(rows, inputs), lay_out(data, kind, width), outputs + 16
    out = torch.full((rows, stride), start or torch.nan)
    compiled(width, f"rounded_{to}", cpu)(x.data_ptr(), numbers.data_ptr(), 0, rows, inputs)
    there = numbers.data_ptr(), weights.data_ptr(), out.data_ptr(), rows, inputs, outputs
    compiled(width, f"dot_{to}_{kind.name}", cpu)(*there, int(bool(start)), stride)
    return out[:, :outputs].clone()


@pytest.mark.parametrize("to", ["b8", "b16"])
@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), parts=st.integers(1, 4), inputs=st.integers(1, 6), seed=st.integers(0, 99))
def test_products(name: str, to: str, rows: int, parts: int, inputs: int, seed: int) -> None:
    generator, kind = torch.Generator().manual_seed(seed), QUANTIZED[name]
    data = blocks(16 * parts, 32 * inputs, kind, generator)
    x = torch.randn(rows, 32 * inputs, generator=generator)
    x[0, :32] = 0.0
    most = 127 if to == "b8" else 127 * 256
    top = x.view(rows, inputs, 32).abs().amax(-1, keepdim=True)
    whole = (x.view(rows, inputs, 32) * (most / top).nan_to_num(0.0, 0.0, 0.0)).round()  # in fp32, as the kernel does
    rounded = whole.double() * (top.double() / most)
    weight = dequantize(data, kind).double()
    expected = (rounded.view(rows, -1) @ weight.T).float()
    found = {width: product(x, data, kind, to, width) for width in PROCESSORS}
    for answer in found.values():
        size = float((x.abs() @ weight.float().abs().T).max())
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * size)
        assert torch.equal(answer, found[8])
    for width in {1, 2, rows}:
        assert torch.equal(product(x[:width].contiguous(), data, kind, to, 8), found[8][:width])
    added = product(x, data, kind, to, 8, start=2.0)
    torch.testing.assert_close(added, found[8] + 2.0, rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize("width", PROCESSORS)
def test_a_norm_is_rounded_as_its_answer(width: int) -> None:
    x, weight = torch.randn(5, 96), torch.randn(96)
    apart, together = inputs_for(5, 96).zero_(), inputs_for(5, 96).zero_()
    normed = weight * (x * (1.0 / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).float())
    cpu = PROCESSORS[width]
    compiled(width, "rounded_b16", cpu)(normed.data_ptr(), apart.data_ptr(), 0, 5, 96)
    compiled(width, "normed_b16", cpu)(x.data_ptr(), together.data_ptr(), weight.data_ptr(), 5, 96, double(1e-5))
    scales = [room[0, :, :5, 64:68].contiguous().view(torch.float32) for room in (apart, together)]
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("width", PROCESSORS)
@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_rows(width: int, kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(1)
    if kind.bits:
        data = blocks(40, 96, kind, generator)
    else:
        stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        data = torch.randn(40, 96, generator=generator).to(stored).view(torch.uint8)
    ids, out = torch.tensor([3, 39, 0, 3]), torch.empty(4, 96)
    compiled(width, f"rows_{kind.name}", PROCESSORS[width])(ids.data_ptr(), data.data_ptr(), out.data_ptr(), 4, 96)
    assert torch.equal(out, dequantize(data, kind)[ids])
