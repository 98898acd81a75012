"""integer_codes: the codes of StaticQuantizer, counted from the lowest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.nn import StaticQuantizer
from octav_fx.ops.integer_codes import reference
from octav_fx.ops.integer_codes.op import integer_codes
from tests.support.strategies import DTYPES, filled_with_nan, laid_out, tensors

GRIDS = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_by_hand(dtype):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -9, 9, math.inf, -math.inf, math.nan], dtype=dtype)
    one = torch.tensor(1.0)
    for op in (integer_codes, reference.integer_codes):
        assert op(x, one, 3, True).tolist() == [4, 6, 6, 4, 2, 0, 7, 7, 0, 0]
        assert op(x, one, 3, False).tolist() == [0, 2, 2, 0, 0, 0, 7, 7, 0, 0]


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data):
    x, (bits, signed) = data.draw(tensors(DTYPES)), data.draw(st.sampled_from(GRIDS))
    scale = torch.tensor(data.draw(st.sampled_from([2.0**-9, 0.037, 1.0, 311.0])))
    with filled_with_nan() as allocations:
        codes = integer_codes(x, scale, bits, signed)
    assert allocations[0]
    assert torch.equal(codes, reference.integer_codes(x, scale, bits, signed))


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_they_are_the_codes_of_the_quantizer(bits, signed):
    quantizer = StaticQuantizer(torch.tensor(1.7), bits, signed, None)
    x = torch.randn(5000) * 1.5
    codes = integer_codes(x, quantizer.scale, bits, signed).float() + Grid(bits, signed).low
    assert torch.equal(codes * quantizer.scale, quantizer(x))


@pytest.mark.parametrize("count", [1, 2])
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, count):
    threads(count)
    x, scale = torch.randn(5 * 2**14 + 3), torch.tensor(0.02)
    with filled_with_nan():
        codes = integer_codes(x, scale, 8, True)
    assert torch.equal(codes, reference.integer_codes(x, scale, 8, True))
    assert kernel_calls == ["octav_integer_codes"]


def test_layouts(kernel_calls):
    scale = torch.tensor(0.3)
    for x in laid_out(torch.float32):
        x.normal_()
        for out in laid_out(torch.uint8):
            integer_codes(x, scale, 4, True, out=out)
            assert torch.equal(out, reference.integer_codes(x, scale, 4, True))
    assert integer_codes(laid_out(torch.float32)[1], scale, 4, True).is_contiguous(memory_format=torch.channels_last)
    assert kernel_calls


def test_opcheck():
    args = (torch.randn(2, 3, 4, 5), torch.tensor(0.3), 4, True)
    torch.library.opcheck(integer_codes.default, args)
    torch.library.opcheck(integer_codes.out, args, {"out": torch.empty(2, 3, 4, 5, dtype=torch.uint8)})
