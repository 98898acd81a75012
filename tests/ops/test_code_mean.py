"""code_mean: the codes of the mean of codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer_rule import CodeMean
from octav_fx.ops.code_mean import reference
from octav_fx.ops.code_mean.op import code_mean
from tests.support.strategies import filled_with_nan

BITS = st.integers(2, 8)
SCALES = st.sampled_from([2.0**-9, 0.0037, 0.04, 0.31, 1.0, 311.0])


def several(one: st.SearchStrategy, count: int) -> st.SearchStrategy:
    return st.tuples(*[one] * count)


def test_by_hand():
    x = torch.tensor([[[[0, 1], [2, 7]]], [[[4, 4], [4, 6]]]], dtype=torch.uint8)
    one = torch.tensor(1.0)
    # Means 2.5 and 4.5, ties to the even code; signed: -1.5 and 0.5.
    assert code_mean(x, one, one, 3, False, 3, False, False).tolist() == [[2], [4]]
    assert code_mean(x, one, one, 3, True, 8, True, False).tolist() == [[126], [128]]
    assert code_mean(x, one, one, 3, True, 8, True, True, 0.0).tolist() == [[[[128]]], [[[128]]]]


@pytest.mark.slow
@settings(max_examples=100)
@given(
    bits=st.tuples(BITS, BITS),
    signs=st.tuples(st.booleans(), st.booleans()),
    scales=st.tuples(SCALES, SCALES),
    data=st.data(),
)
def test_the_kernel_is_the_definition_bit_for_bit(kernels, bits, signs, scales, data):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)))
    x = torch.randint(0, 2 ** bits[0], shape, dtype=torch.uint8)
    x = x.contiguous(memory_format=data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))
    keepdim, (scale, step) = data.draw(st.booleans()), (torch.tensor(value) for value in scales)
    args = (x, scale, step, bits[0], signs[0], bits[1], signs[1], keepdim)
    with filled_with_nan():
        found = code_mean(*args)
    assert torch.equal(found, reference.code_mean(*args))
    if not x.numel():
        return
    # And of the module that says what a deployed model computes.
    source, result = (
        StaticQuantizer(value * Grid(*grid).steps, *grid, None)
        for value, grid in zip((scale, step), zip(bits, signs, strict=True), strict=True)
    )
    result.in_steps = True
    expected = result(CodeMean(source, result, keepdim)((x.float() + Grid(bits[0], signs[0]).low) * scale))
    assert torch.equal((found.float() + Grid(bits[1], signs[1]).low) * step, expected)


@pytest.mark.parametrize("keepdim", [True, False])
def test_opcheck(keepdim):
    x, one = torch.randint(0, 255, (2, 3, 4, 5), dtype=torch.uint8), torch.tensor(1.0)
    torch.library.opcheck(code_mean.default, (x, one, one, 8, False, 8, True, keepdim))
