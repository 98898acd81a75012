"""code_sum: the codes of a sum of codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer_rule import CodeSum
from octav_fx.ops.code_sum import reference
from octav_fx.ops.code_sum.op import code_sum
from tests.support.strategies import filled_with_nan

BITS = st.integers(2, 8)
# Within 2**20 of each other, where the kernel and the reference are the same bits.
SCALES = st.sampled_from([2.0**-9, 0.0037, 0.04, 0.31, 1.0, 311.0])

BOUNDS = st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (7.0, 8.0)])
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


def several(one: st.SearchStrategy, count: int) -> st.SearchStrategy:
    return st.tuples(*[one] * count)


def codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


def test_by_hand():
    x, y = torch.tensor([0, 1, 8, 15, 15], dtype=torch.uint8), torch.tensor([0, 1, 8, 8, 15], dtype=torch.uint8)
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    # (x - 8) / 2 + y on a signed grid of 4 bits: -4, -2.5, 8, 11.5, 18.5; ties to even among codes of zero point 8.
    assert code_sum(x, y, half, one, one, 4, True, 4, False, 4, True).tolist() == [4, 6, 15, 15, 15]
    assert code_sum(x, y, half, one, one, 4, True, 4, False, 8, True).tolist() == [124, 126, 136, 140, 146]
    assert code_sum(x, y, half, one, one, 4, True, 4, False, 8, True, 0.0, 6.0).tolist() == [128, 128, 134, 134, 134]


@settings(max_examples=200)
@given(
    bits=st.tuples(BITS, BITS, BITS),
    signs=st.tuples(*[st.booleans()] * 3),
    scales=st.tuples(*[SCALES] * 3),
    data=st.data(),
)
def test_the_kernel_is_the_definition_bit_for_bit(kernels, bits, signs, scales, data):
    shape = data.draw(st.sampled_from([(), (0,), (7,), (2, 3, 5, 4)]))
    x, y = (codes(shape, width) for width in bits[:2])
    if len(shape) == 4:
        x, y = (tensor.contiguous(memory_format=data.draw(LAYOUTS)) for tensor in (x, y))
    low, high = data.draw(BOUNDS)
    steps = [torch.tensor(scale) for scale in scales]
    grids = [part for grid in zip(bits, signs, strict=True) for part in grid]
    with filled_with_nan():
        found = code_sum(x, y, *steps, *grids, low, high)
    assert torch.equal(found, reference.code_sum(x, y, *steps, *grids, low, high))
    assert found.stride() == torch.empty_like(x).stride()
    # And of the module that says what a deployed model computes.
    first, second, result = (
        StaticQuantizer(scale * Grid(*grid).steps, *grid, None)
        for scale, grid in zip(steps, zip(bits, signs, strict=True), strict=True)
    )
    result.narrow(low, high)
    result.in_steps = True
    levels = [
        (code.float() + Grid(*grid).low) * scale
        for code, scale, grid in zip((x, y), steps, zip(bits, signs, strict=True), strict=False)
    ]
    expected = result(CodeSum(first, second, result)(*levels))
    assert torch.equal((found.float() + Grid(bits[2], signs[2]).low) * steps[2], expected)


@pytest.mark.parametrize("count", [1, 2])
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, count):
    threads(count)
    x, y = codes((5 * 2**14 + 3,), 8), codes((5 * 2**14 + 3,), 8)
    args = (x, y, torch.tensor(0.02), torch.tensor(0.03), torch.tensor(0.04), 8, False, 8, True, 8, True)
    assert torch.equal(code_sum(*args), reference.code_sum(*args))
    assert kernel_calls == ["octav_code_sum"]


def test_broadcast():
    x, y, one = codes((2, 3, 4, 5), 8), codes((2, 3, 1, 1), 8), torch.tensor(1.0)
    args = (one, one, torch.tensor(2.0), 8, False, 8, False, 8, False)
    assert torch.equal(code_sum(x, y, *args), code_sum(x, y.expand_as(x), *args))
    assert code_sum(y, x, *args).shape == x.shape


def test_opcheck():
    x, y, one = codes((2, 3, 4, 5), 8), codes((2, 3, 4, 5), 8), torch.tensor(1.0)
    args = (x, y, one, one, one, 8, False, 8, False, 8, True, 0.0)
    torch.library.opcheck(code_sum.default, args)
