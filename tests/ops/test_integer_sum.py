"""integer_sum: a sum and its codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.ops.integer_sum import reference
from octav_fx.ops.integer_sum.op import integer_sum
from tests.support.strategies import DTYPES, filled_with_nan, tensors


def equal(found, expected) -> bool:
    """Bit for bit, NaN where NaN is."""
    return all(torch.equal(f.nan_to_num(7), e.nan_to_num(7)) for f, e in zip(found, expected, strict=True))


@settings(max_examples=200)
@given(data=st.data(), bits=st.integers(2, 8), signed=st.booleans(), relu=st.booleans(), seed=st.integers(0, 99))
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data, bits, signed, relu, seed):
    x = data.draw(tensors(DTYPES))
    torch.manual_seed(seed)
    y, scale = torch.empty_like(x).copy_(torch.randn(x.shape)), torch.tensor(0.37)
    with filled_with_nan():
        found = integer_sum(x, y, relu, scale, bits, signed)
    assert equal(found, reference.integer_sum(x, y, relu, scale, bits, signed))
    assert [part.stride() for part in found] == [torch.empty_like(x).stride()] * 2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, count, relu):
    threads(count)
    x, y = torch.randn(2, 5 * 2**14 + 3)
    args = (x, y, relu, torch.tensor(0.02), 8, True)
    assert equal(integer_sum(*args), reference.integer_sum(*args))
    assert kernel_calls == ["octav_integer_sum"]


def test_two_layouts():
    x, y = torch.randn(2, 2, 3, 4, 5)
    y = y.contiguous(memory_format=torch.channels_last)
    args = (x, y, True, torch.tensor(0.2), 4, False)
    assert equal(integer_sum(*args), reference.integer_sum(*args))


def test_opcheck():
    x, y = torch.randn(2, 2, 3, 4, 5)
    torch.library.opcheck(integer_sum.default, (x, y, True, torch.tensor(0.2), 4, False))
