import math

import ml_dtypes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.clips.gradients import piecewise_linear
from octav_fx.formats.floats import FLOATS
from octav_fx.formats.granularity import along, clip_shape
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers, spec_of
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.quantize import reference
from octav_fx.ops.quantize.op import quantize
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import DTYPES, NATIVE, axes, clips, every_number, filled_with_nan, laid_out, tensors

INDEPENDENT = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SIGNED = [True, False]
GRIDS = [(bits, signed) for bits in range(2, 9) for signed in SIGNED]


@pytest.mark.parametrize(
    ("signed", "x", "expected"),
    [
        # Clip 4, 3 bits, step 1: ties go to the even code, codes -4 .. 3.
        (True, [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5], [0, 2, 2, 3, 0, -2, -2, -4]),
        (True, [0.49, 0.51, 3.49, -0.0, 4, 4.1, 1e30, -4, -4.1, -1e30], [0, 1, 3, 0, 3, 4, 4, -4, -5, -5]),
        (True, [math.inf, -math.inf, math.nan], [-128] * 3),
        # Clip 4, 3 bits, step 1/2: codes 0 .. 7.
        (False, [0.25, 0.75, 1.25, 3.25, 3.75, 4, 4.1, 1e30], [0, 2, 2, 6, 7, 7, 8, 8]),
        (False, [0, -0.0, 1e-40, -1e-40, -0.25, -100], [-1, -1, 0, -2, -2, -2]),
        (False, [math.inf, -math.inf, math.nan], [-128] * 3),
    ],
)
def test_codes_by_hand(signed, x, expected):
    for op in (quantize, reference.quantize):
        assert op(torch.tensor(x), torch.tensor(4.0), integers(3, signed, None)).tolist() == expected


def test_codes_at_the_ceiling_of_a_clamp_are_raised():
    # Clip 4, 3 bits, step 1/2: codes 0 .. 7, raised by 16. Beyond the clip is beyond it, at the ceiling or not.
    x = torch.tensor([0, 1, 2.9, 3, 3.5, 5])
    for op in (quantize, reference.quantize):
        assert op(x, torch.tensor(4.0), integers(3, False, None), 3.0).tolist() == [-1, 2, 6, 6 + 16, 7 + 16, 8 + 16]
        # A signed grid has no room for it, and no use.
        assert (
            op(x, torch.tensor(4.0), integers(3, True, None), 3.0).tolist()
            == op(x, torch.tensor(4.0), integers(3, True, None)).tolist()
        )


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_ceiling_changes_no_level(kernels, bits):
    x, clip = (torch.randn(10_000) * 6).clamp(0, 6), torch.tensor(5.0)
    raised, plain = (quantize(x, clip, integers(bits, False, None), ceiling) for ceiling in (6.0, None))
    assert torch.equal(raised, reference.quantize(x, clip, integers(bits, False, None), 6.0))
    assert torch.equal(raised >= Grid(bits, False).ceiling_flag, x == 6)
    levels = [dequantize(codes, clip, integers(bits, False, None), torch.float32) for codes in (raised, plain)]
    assert torch.equal(*levels)


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_levels_have_their_codes(bits, signed):
    grid, clip = Grid(bits, signed), torch.tensor(0.7)
    expected = torch.arange(grid.low, grid.high + 1)
    codes = quantize(expected * grid.step(clip), clip, integers(bits, signed, None))
    if not signed:
        expected[0] = grid.low - 1
    assert codes.dtype is grid.codes_dtype
    assert codes.tolist() == expected.tolist()


@examples(400)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(axes(x))
    clip, (bits, signed) = data.draw(clips(x, dim)), data.draw(st.sampled_from(GRIDS))
    with filled_with_nan() as allocations:
        codes = quantize(x, clip, integers(bits, signed, dim))
    assert allocations[0]
    expected = reference.quantize(x, clip, integers(bits, signed, dim))
    assert codes.dtype is expected.dtype is Grid(bits, signed).codes_dtype
    assert torch.equal(codes, expected)
    assert codes.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_every_number_has_the_code_of_the_reference(kernel_calls, dtype, bits, signed):
    x = every_number(dtype)
    for clip in (torch.tensor(0.7), torch.tensor(1e-6), torch.tensor(3e4)):
        codes = quantize(x, clip, integers(bits, signed, None), 6.0)
        assert torch.equal(codes, reference.quantize(x, clip, integers(bits, signed, None), 6.0))
    assert kernel_calls == ["octav_quantize"] * 3


# A block of the kernel is 2**14 elements; from four on they are shared among the threads.
LARGE = [((5 * 2**14 + 3,), None), ((2, 3, 2**14 + 5), 1), ((7, 2**14 + 1), 0), ((2**13, 9), 1)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "dim"), LARGE)
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, shape, dim, bits, count):
    threads(count)
    x, clip = torch.randn(shape), torch.rand(() if dim is None else shape[dim]) + 0.5
    with filled_with_nan():
        codes = quantize(x, clip, integers(bits, True, dim))
    assert torch.equal(codes, reference.quantize(x, clip, integers(bits, True, dim)))
    assert kernel_calls == ["octav_quantize"]


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense_tensors_in_any_order_reach_the_kernel(kernel_calls, order, dim, bits, dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype).permute(order)
    quantize(x, torch.ones(clip_shape(x, dim)), integers(bits, True, dim))
    assert kernel_calls == ["octav_quantize"]


@pytest.mark.parametrize("dtype", NATIVE)
def test_tensors_with_gaps_reach_the_kernel_too(kernel_calls, dtype):
    x = torch.randn(6, 10).to(dtype)
    for gaps in (x[:, ::2], x[:1].expand(4, 10)):
        codes = quantize(gaps, torch.tensor(1.0), integers(4, True, None))
        assert torch.equal(codes, reference.quantize(gaps, torch.tensor(1.0), integers(4, True, None)))
    assert kernel_calls == ["octav_quantize"] * 2


@examples(200)
@given(data=st.data())
def test_codes_tell_what_the_gradients_ask(data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(axes(x))
    clip, (bits, signed) = data.draw(clips(x, dim)), data.draw(st.sampled_from(GRIDS))
    grid, codes = Grid(bits, signed), quantize(x, clip, integers(bits, signed, dim)).to(torch.int64)
    finite = x.isfinite()
    assert torch.equal(codes == torch.iinfo(grid.codes_dtype).min, ~finite)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = piecewise_linear(value, along(clip, x, dim).to(value.dtype), signed).bool()
    cut = (codes == grid.underflow_code) | (codes > grid.high)
    assert torch.equal(cut[finite], ~inside[finite])
    if not signed:
        assert torch.equal((codes < 0)[finite], (x <= 0)[finite])


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_clip_itself_is_inside_and_the_next_number_is_not(bits, signed, dtype):
    grid, clip = Grid(bits, signed), torch.tensor(0.7)
    edge = torch.stack([clip, -clip]).to(dtype)
    beyond = edge.nextafter(2 * edge)
    assert quantize(edge, clip, integers(bits, signed, None)).tolist() == [
        grid.high,
        grid.low if signed else grid.underflow_code,
    ]
    assert quantize(beyond, clip, integers(bits, signed, None)).tolist() == [grid.high + 1, grid.underflow_code]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_everything_but_zero_is_beyond_a_clip_of_zero(dtype, bits, signed):
    grid, x = Grid(bits, signed), torch.tensor([[1.0, -1.0, 0.0, -0.0]], dtype=dtype)
    zero = 0 if signed else grid.low - 1
    expected = [grid.high + 1, grid.underflow_code, zero, zero]
    assert quantize(x, torch.tensor(0.0), integers(bits, signed, None)).tolist() == [expected]
    # In one channel only.
    codes = quantize(x.expand(2, 4), torch.tensor([0.0, 2.0]), integers(bits, signed, 0))
    assert codes[0].tolist() == expected
    assert codes[1, 0] <= grid.high


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("bits", [4, 8])
def test_empty_tensors_have_no_codes(shape, dim, bits):
    x = torch.empty(shape)
    codes = quantize(x, torch.ones(clip_shape(x, dim)), integers(bits, True, dim))
    assert codes.shape == shape
    assert codes.dtype is Grid(bits, True).codes_dtype


@pytest.mark.parametrize("dim", [None, 0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_stays_channels_last(dtype, dim):
    x = torch.randn(2, 5, 7, 3).to(dtype, memory_format=torch.channels_last)
    clip = torch.rand(clip_shape(x, dim)) + 0.5
    codes = quantize(x, clip, integers(4, True, dim))
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, quantize(x.contiguous(), clip, integers(4, True, dim)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_out_is_written_in_its_own_layout(dtype, dim, bits):
    x, code = torch.randn(2, 3, 4, 5).to(dtype), Grid(bits, True).codes_dtype
    clip = torch.rand(clip_shape(x, dim)) + 0.5
    for out in laid_out(code):
        stride = out.stride()
        assert quantize(x, clip, integers(bits, True, dim), out=out) is None
        assert out.stride() == stride
        assert torch.equal(out, quantize(x, clip, integers(bits, True, dim)))


@pairwise(
    {
        "dim, channels_last": [(None, False), (0, False), (1, True)],
        "dtype": [torch.float32, torch.bfloat16],
        "bits": [4, 8],
    }
)
def test_opcheck(dim, channels_last, dtype, bits):
    x = torch.randn(2, 3, 4, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    args = (x, torch.rand(clip_shape(x, dim)) + 0.5, integers(bits, True, dim))
    torch.library.opcheck(quantize.default, args)
    torch.library.opcheck(quantize.out, args, {"out": torch.empty_like(x, dtype=Grid(bits, True).codes_dtype)})


def test_codes_need_no_gradient():
    x = torch.randn(5, requires_grad=True)
    assert not quantize(x, torch.tensor(1.0), integers(4, True, None)).requires_grad


@pytest.mark.parametrize("signed", SIGNED)
def test_the_host_reads_no_value(signed):
    x, clip = torch.empty(3, 5, device="meta"), torch.empty(3, device="meta")
    assert reference.quantize(x, clip, integers(4, signed, 0)).shape == x.shape


@examples(60)
@given(st.data())
def test_codes_of_floating_point_levels_are_those_of_an_independent_encoder(data):
    form = data.draw(st.sampled_from(FLOATS))
    x = data.draw(tensors(NATIVE))
    axis = data.draw(st.integers(0, x.dim() - 1)) if x.dim() else None
    shared = "tensor" if axis is None else data.draw(st.sampled_from([f"token.{axis}", f"channel.{axis}", "tensor"]))
    spec = spec_of(f"{form.name}/{shared}/{data.draw(st.sampled_from(['float32', 'e8m0', 'e4m3']))}")
    shape = spec.clip_shape(x.shape)
    clip = torch.ops.octav.optimal_clip(x, torch.zeros(() if spec.granularity.is_short else shape), str(spec), "octav")
    codes = torch.ops.octav.quantize(x, clip, str(spec)).long().clamp(form.low, form.high)
    step = form.step(spec.granularity.along(clip, x)).expand_as(x)
    # What has no step, or is not finite, has no code there.
    there = x.isfinite() & (step > 0)
    ratio = (x.float() / step)[there].clamp(form.least, form.greatest)
    stored = torch.from_numpy(ratio.numpy().astype(INDEPENDENT[form.name]).view("uint8").astype("int64"))
    magnitude, negative = stored & (2 ** (form.bits - 1) - 1), stored >> (form.bits - 1) & 1
    assert torch.equal(codes[there], torch.where(negative == 1, -magnitude, magnitude))
