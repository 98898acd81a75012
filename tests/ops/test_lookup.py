"""lookup: a table of 256 codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx import OctavError
from octav_fx.ops.lookup import reference
from octav_fx.ops.lookup.op import lookup
from tests.support.strategies import filled_with_nan


def operands(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(0, 256, size, dtype=torch.uint8) for size in (shape, (256,)))


@settings(max_examples=100)
# Around the 64 codes that are looked up at once.
@given(count=st.integers(0, 200), begin=st.integers(0, 3))
def test_the_kernel_is_the_definition(kernels, count, begin):
    codes, table = operands(begin + count)
    with filled_with_nan():
        found = lookup(codes[begin:], table)
    assert torch.equal(found, reference.lookup(codes[begin:], table))


@pytest.mark.parametrize("count", [1, 2])
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, count):
    threads(count)
    codes, table = operands(5 * 2**14 + 3)
    assert torch.equal(lookup(codes, table), reference.lookup(codes, table))
    assert kernel_calls == ["octav_lookup"]


@pytest.mark.parametrize("make", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :, ::2]])
def test_layouts(make):
    codes, table = operands(2, 3, 4, 5)
    codes = make(codes)
    assert torch.equal(lookup(codes, table), reference.lookup(codes, table))


def test_a_table_of_another_size():
    codes, table = operands(3)
    with pytest.raises(OctavError, match=r"a table of torch.uint8 \(255,\) where lookup takes uint8 \[256\]"):
        lookup(codes, table[:255])


def test_opcheck():
    torch.library.opcheck(lookup.default, operands(2, 3, 4, 5))
