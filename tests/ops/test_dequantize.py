import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.dequantize import reference
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.ops.quantize.op import quantize
from tests.support.compare import EXACT, assert_same_bits
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import DTYPES, NATIVE, axes, clips, codes, filled_with_nan, laid_out, tensors

SIGNED = [True, False]
GRIDS = [(bits, signed) for bits in range(2, 9) for signed in SIGNED]


def some_codes(shape, bits=4, signed=True):
    grid = Grid(bits, signed)
    return torch.randint(grid.underflow_code, grid.high + 2, shape, dtype=grid.codes_dtype)


@pytest.mark.parametrize(
    ("signed", "values", "expected"),
    [
        # Clip 4, 3 bits, step 1, beyond the clip 4 and -5.
        (True, [-4, -1, 0, 3, 4, -5, -128], [-4, -1, 0, 3, 3, -4, math.nan]),
        # Clip 4, 3 bits, step 1/2, beyond the clip 8 and -2, zero -1.
        (False, [0, 1, 7, 8, -1, -2, -128], [0, 0.5, 3.5, 3.5, 0, 0, math.nan]),
    ],
)
def test_levels_by_hand(signed, values, expected):
    for op in (dequantize, reference.dequantize):
        y = op(torch.tensor(values, dtype=torch.int8), torch.tensor(4.0), integers(3, signed, None), torch.float32)
        assert_same_bits(y, torch.tensor(expected))


@examples(400)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data):
    bits, signed = data.draw(st.sampled_from(GRIDS))
    stored = data.draw(codes(Grid(bits, signed)))
    dim, dtype = data.draw(axes(stored)), data.draw(st.sampled_from(DTYPES))
    clip = data.draw(clips(stored, dim))
    with filled_with_nan() as allocations:
        y = dequantize(stored, clip, integers(bits, signed, dim), dtype)
    assert allocations[0]
    assert y.dtype is dtype
    assert_same_bits(y, reference.dequantize(stored, clip, integers(bits, signed, dim), dtype))
    assert y.stride() == torch.empty_like(stored).stride()


@examples(300)
@given(data=st.data())
def test_after_quantize_it_is_fake_quantize_where_x_is_finite_and_nan_elsewhere(data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(axes(x))
    clip, (bits, signed) = data.draw(clips(x, dim)), data.draw(st.sampled_from(GRIDS))
    y = dequantize(quantize(x, clip, integers(bits, signed, dim)), clip, integers(bits, signed, dim), x.dtype)
    expected = fake_quantize(x, clip, integers(bits, signed, dim), "pwl").where(x.isfinite(), math.nan)
    # Integers have one zero.
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_the_codes_of_the_levels_are_the_codes(bits, signed):
    grid, clip = Grid(bits, signed), torch.tensor(0.7)
    stored = torch.arange(grid.low if signed else 1, grid.high + 1, dtype=grid.codes_dtype)
    levels = dequantize(stored, clip, integers(bits, signed, None), torch.float32)
    assert torch.equal(quantize(levels, clip, integers(bits, signed, None)), stored)


# A block of the kernel is 2**14 elements; from four on they are shared among the threads.
LARGE = [((5 * 2**14 + 3,), None), ((2, 3, 2**14 + 5), 1), ((7, 2**14 + 1), 0), ((2**13, 9), 1)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "dim"), LARGE)
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, shape, dim, bits, count):
    threads(count)
    stored, clip = some_codes(shape, bits), torch.rand(() if dim is None else shape[dim]) + 0.5
    with filled_with_nan():
        y = dequantize(stored, clip, integers(bits, True, dim), torch.float32)
    assert_same_bits(y, reference.dequantize(stored, clip, integers(bits, True, dim), torch.float32))
    assert kernel_calls == ["octav_dequantize"]


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_every_code_has_the_level_of_the_reference(kernel_calls, dtype, bits, signed):
    values = torch.iinfo(Grid(bits, signed).codes_dtype)
    stored = torch.arange(values.min, values.max + 1).to(Grid(bits, signed).codes_dtype)
    # In half precision some of these levels are subnormal numbers, and some beyond the largest of float16.
    clips = [0.7, 1e-6, 1e-40, 7e4]
    for clip in map(torch.tensor, clips):
        y = dequantize(stored, clip, integers(bits, signed, None), dtype)
        assert_same_bits(y, reference.dequantize(stored, clip, integers(bits, signed, None), dtype))
    assert kernel_calls == ["octav_dequantize"] * len(clips)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense_tensors_in_any_order_reach_the_kernel(kernel_calls, order, dim, bits, dtype):
    stored = some_codes((2, 3, 4, 5), bits).permute(order)
    dequantize(stored, torch.ones(clip_shape(stored, dim)), integers(bits, True, dim), dtype)
    assert kernel_calls == ["octav_dequantize"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_a_clip_of_zero_makes_zeros(dtype, bits, signed):
    stored = some_codes((3, 50), bits, signed)
    assert not dequantize(stored, torch.tensor(0.0), integers(bits, signed, None), dtype).any()
    # In one channel only.
    y = dequantize(stored, torch.tensor([1.0, 0, 1]), integers(bits, signed, 0), dtype)
    assert y.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_tensors_have_no_levels(shape, dim, dtype):
    stored = some_codes(shape)
    y = dequantize(stored, torch.ones(clip_shape(stored, dim)), integers(4, True, dim), dtype)
    assert y.shape == shape
    assert y.dtype is dtype


@pytest.mark.parametrize("dim", [None, 0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_stays_channels_last(dtype, dim):
    stored = some_codes((2, 5, 7, 3)).to(memory_format=torch.channels_last)
    clip = torch.rand(clip_shape(stored, dim)) + 0.5
    y = dequantize(stored, clip, integers(4, True, dim), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(y, dequantize(stored.contiguous(), clip, integers(4, True, dim), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_out_is_written_in_its_own_layout(dtype, dim, bits):
    stored = some_codes((2, 3, 4, 5), bits)
    clip = torch.rand(clip_shape(stored, dim)) + 0.5
    for out in laid_out(dtype):
        stride = out.stride()
        assert dequantize(stored, clip, integers(bits, True, dim), dtype, out=out) is None
        assert out.stride() == stride
        assert_same_bits(out, dequantize(stored, clip, integers(bits, True, dim), dtype))


@pytest.mark.slow
@pairwise(
    {
        "dim, channels_last": [(None, False), (0, False), (1, True)],
        "dtype": [torch.float32, torch.bfloat16],
        "bits": [4, 8],
    }
)
def test_opcheck(dim, channels_last, dtype, bits):
    stored = some_codes((2, 3, 4, 5), bits)
    stored = stored.to(memory_format=torch.channels_last) if channels_last else stored
    args = (stored, torch.rand(clip_shape(stored, dim)) + 0.5, integers(bits, True, dim), dtype)
    torch.library.opcheck(dequantize.default, args)
    torch.library.opcheck(dequantize.out, args, {"out": torch.empty_like(stored, dtype=dtype)})


def test_the_host_reads_no_value():
    stored, clip = torch.empty(3, 5, dtype=torch.int8, device="meta"), torch.empty(3, device="meta")
    assert reference.dequantize(stored, clip, integers(4, True, 0), torch.float16).shape == stored.shape
