"""Compiled kernels: right for every shape and type of weight, and with the same bits at every width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speckv_online.cpu_engine.kernels.linear import SCALED, Shape, compiled, lay_out, shape
from speckv_online.cpu_engine.kernels.llvm import Code, Library, features
from tests.support.engine import SUPPORTED

if not SUPPORTED:
    pytest.skip("the engine has no kernels for this processor", allow_module_level=True)
assert shape() is not None
#: This processor's own registers, and those of one with AVX2 only, which this one has too.
SHAPES = {shape(): None, Shape(8, 2, 5): "haswell" if "fma" in features() else None}


def rounded(weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Weights that a type holds exactly, and no smaller one."""
    if stored == torch.int8:
        blocks = weight.view(len(weight), -1, SCALED)
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        return ((blocks / scales).round().clamp(-127, 127) * scales).view_as(weight)
    # Of a size that fp16 does not reach, where bf16 is meant.
    return (weight * 2.0**20 if stored == torch.bfloat16 else weight).to(stored).float()


def product(x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], outputs: int, use: Shape) -> torch.Tensor:
    weight, scales = packed
    out, kernel = torch.full((len(x), outputs), torch.nan), compiled(use, SHAPES[use])[weight.dtype]
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    kernel(*pointers, len(x), x.shape[1], outputs, scales.data_ptr())
    return out


@pytest.mark.parametrize("use", SHAPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.int8], ids=str)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), outputs=st.integers(1, 40), inputs=st.integers(1, 9), seed=st.integers(0, 99))
def test_product_is_right_and_a_row_has_the_same_bits_at_every_width(
    use: Shape, stored: torch.dtype, rows: int, outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = 2 * outputs, 32 * inputs
    weight = rounded(torch.randn(outputs, inputs, generator=generator), stored)
    x = torch.randn(rows, inputs, generator=generator)
    packed = lay_out(weight, use)
    assert packed[0].dtype == stored
    found = product(x, packed, outputs, use)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(weight.abs().max()) * inputs)
    for width in {1, 2, rows}:
        assert torch.equal(product(x[:width].contiguous(), packed, outputs, use), found[:width])


@pytest.mark.parametrize("use", SHAPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(5632, 130), (1536, 70)])
def test_inputs_that_are_read_in_pieces_give_the_same_bits_at_every_width(
    use: Shape, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(outputs, inputs, generator=generator).half(), torch.randn(33, inputs, generator=generator)
    packed = lay_out(weight.float(), use)
    found = product(x, packed, outputs, use)
    torch.testing.assert_close(found, (x.double() @ weight.double().t()).float(), rtol=1e-4, atol=1e-2)
    for width in (1, 3, 5, 9, 12, 13):
        assert torch.equal(product(x[:width].contiguous(), packed, outputs, use), found[:width])


def test_threads_share_the_work() -> None:
    use: Any = shape()
    weight, x, threads = torch.randn(6, 64), torch.randn(3, 64), torch.get_num_threads()
    packed = lay_out(weight, use)
    try:
        found = []
        for count in (1, 2, 5):  # the last with more threads than there are parts
            torch.set_num_threads(count)
            found.append(product(x, packed, 6, use))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


def test_code_loops_branches_and_returns_its_arguments() -> None:
    c = Code("sum_of_odd")
    total = c.slot("i64", "0")
    with c.loop(c.argument(0), c.argument(1)) as i:
        odd = c.let(f"trunc i64 {i} to i1")
        with c.when(odd):
            before = c.let(f"load i64, ptr {total}")
            c.do(f"store i64 {c.whole('add', before, i)}, ptr {total}")
    after = c.let(f"load i64, ptr {total}")
    c.do(f"store i64 {after}, ptr {c.at('%args', 2)}")
    run = Library(c.text()).function("sum_of_odd", parallel=False)
    assert list(run(3, 10, -1)) == [3, 10, 3 + 5 + 7 + 9]
    assert list(run(3, 3, -1)) == [3, 3, 0]


def test_what_llvm_does_not_take_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        Library("define void @f(ptr %args) { nonsense }")
    with pytest.raises(AttributeError, match="no function g"):
        Library(Code("f").text()).function("g")
