import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize import reference
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from tests.support.compare import EXACT, assert_same_bits
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import DTYPES, NATIVE, axes, clips, every_number, filled_with_nan, tensors

SIGNED = [True, False]


def promised_strides(x):
    return torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("signed", "x", "expected"),
    [
        # Clip 4, 3 bits, step 1: ties go to the even code, codes -4 .. 3.
        (True, [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, -4.5], [0, 2, 2, 3, 0, -2, -2, -4, -4]),
        (True, [0.49, 0.51, 3.49, 100, -4.49, -100, 0], [0, 1, 3, 3, -4, -4, 0]),
        # Clip 4, 3 bits, step 1/2: codes 0 .. 7.
        (False, [0.25, 0.75, 1.25, 3.25, 3.75, 4, 100, -0.25, -3], [0, 1, 1, 3, 3.5, 3.5, 3.5, 0, 0]),
    ],
)
def test_the_nearest_level_and_ties_to_the_even_code(signed, x, expected):
    for quantize in (fake_quantize, reference.fake_quantize):
        assert quantize(torch.tensor(x), torch.tensor(4.0), integers(3, signed, None), "pwl").tolist() == expected


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", SIGNED)
def test_levels_are_kept_and_are_all_there_are(bits, signed):
    grid, clip = Grid(bits, signed), torch.tensor(0.7)
    levels = torch.arange(grid.low, grid.high + 1) * grid.step(clip)
    assert torch.equal(fake_quantize(levels, clip, integers(bits, signed, None), "pwl"), levels)
    assert torch.equal(fake_quantize(torch.randn(10**5), clip, integers(bits, signed, None), "pwl").unique(), levels)


@examples(300)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(axes(x))
    clip, bits, signed = data.draw(clips(x, dim)), data.draw(st.integers(2, 8)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([None, *DTYPES]))
    with filled_with_nan():
        y = fake_quantize(x, clip, integers(bits, signed, dim), "pwl", dtype)
    assert y.dtype is (dtype or x.dtype)
    assert_same_bits(y, reference.fake_quantize(x, clip, integers(bits, signed, dim), "pwl", dtype))
    assert y.stride() == promised_strides(x)


@examples(300)
@given(data=st.data())
def test_the_backward_kernel_is_the_reference_bit_for_bit(kernels, data):
    x = data.draw(tensors(DTYPES))
    dim, gradient = data.draw(axes(x)), data.draw(st.sampled_from(list(GRADIENTS)))
    clip, signed = data.draw(clips(x, dim)), data.draw(st.booleans())
    # Autograd hands over gradients that lie otherwise than x, or are expanded.
    grad = torch.randn(x.shape, dtype=data.draw(st.sampled_from([x.dtype, *DTYPES])))
    if x.dim():
        grad = data.draw(
            st.sampled_from([grad, grad.movedim(0, -1).contiguous().movedim(-1, 0), grad[:1].expand_as(x)])
        )
    with filled_with_nan():
        result = fake_quantize_backward(grad, x, clip, integers(4, signed, dim), gradient)
    assert result.dtype is x.dtype
    assert_same_bits(result, reference.fake_quantize_backward(grad, x, clip, integers(4, signed, dim), gradient))
    assert result.stride() == promised_strides(x)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("signed", SIGNED)
def test_every_number_has_the_level_and_the_gradient_of_the_reference(kernel_calls, dtype, signed):
    x = every_number(dtype)
    for clip in (torch.tensor(0.7), torch.tensor(1e-6), torch.tensor(3e4)):
        y = fake_quantize(x, clip, integers(4, signed, None), "pwl")
        assert_same_bits(y, reference.fake_quantize(x, clip, integers(4, signed, None), "pwl"))
        # The number itself as gradient: products that are subnormal, or beyond the largest.
        for gradient in ("pwl", "mad"):
            result = fake_quantize_backward(x, x, clip, integers(4, signed, None), gradient)
            assert_same_bits(result, reference.fake_quantize_backward(x, x, clip, integers(4, signed, None), gradient))
    assert kernel_calls == ["octav_fake_quantize", *["octav_fake_quantize_backward"] * 2] * 3


@pytest.mark.parametrize("out", DTYPES)
def test_a_dtype_is_a_conversion_afterwards(out):
    x = torch.cat([torch.randn(1000), torch.tensor([math.inf, -math.inf, math.nan])])
    y = fake_quantize(x, torch.tensor(0.7), integers(8, True, None), "pwl", out)
    assert_same_bits(y, fake_quantize(x, torch.tensor(0.7), integers(8, True, None), "pwl").to(out))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_has_the_dtype_of_x_whatever_that_of_the_levels(gradient):
    x, clip, grad = torch.randn(3, 5), torch.tensor([0.3, 1.0, 0.0]), torch.randn(3, 5).bfloat16()
    x.requires_grad_()
    fake_quantize(x, clip, integers(4, True, 0), gradient, torch.bfloat16).backward(grad)
    expected = grad.float() * GRADIENTS[gradient](x.detach(), clip.unsqueeze(1), True)
    torch.testing.assert_close(x.grad, expected, **EXACT)


# A block of the kernel is 2**14 elements; from four on they are shared among the threads.
LARGE = [((2**14 + 1,), None), ((5 * 2**14 + 3,), None), ((2, 3, 2**14 + 5), 1), ((7, 2**14 + 1), 0), ((2**13, 9), 1)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("shape", "dim"), LARGE)
def test_no_element_is_left_out_of_a_large_tensor(kernels, threads, shape, dim, count):
    threads(count)
    x, grad = torch.randn(shape), torch.randn(shape)
    clip = torch.tensor(1.0) if dim is None else torch.rand(shape[dim]) + 0.5
    with filled_with_nan() as allocations:
        y = fake_quantize(x, clip, integers(4, True, dim), "mad")
        backward = fake_quantize_backward(grad, x, clip, integers(4, True, dim), "mad")
    # Both took their output from the allocators that fill it.
    assert allocations[0] >= 2
    assert_same_bits(y, reference.fake_quantize(x, clip, integers(4, True, dim), "mad"))
    assert_same_bits(backward, reference.fake_quantize_backward(grad, x, clip, integers(4, True, dim), "mad"))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_dense_tensors_in_any_order_reach_the_kernel(kernel_calls, order, dim, dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype).permute(order)
    clip = torch.tensor(1.0) if dim is None else torch.ones(x.shape[dim])
    fake_quantize(x, clip, integers(4, True, dim), "pwl")
    fake_quantize_backward(torch.randn(x.shape), x, clip, integers(4, True, dim), "pwl")
    assert kernel_calls == ["octav_fake_quantize", "octav_fake_quantize_backward"]


@pytest.mark.parametrize("dim", [None, 0, 1, 3])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_channels_last_stays_channels_last(gradient, dim):
    x = torch.randn(2, 5, 7, 3).to(memory_format=torch.channels_last)
    clip = torch.tensor(1.0) if dim is None else torch.rand(x.shape[dim]) + 0.5
    y = fake_quantize(x, clip, integers(4, True, dim), gradient)
    grad = fake_quantize_backward(torch.randn(x.shape), x, clip, integers(4, True, dim), gradient)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, fake_quantize(x.contiguous(), clip, integers(4, True, dim), gradient), **EXACT)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dim", [None, 1])
def test_out_is_written_in_its_own_layout_and_returned(gradient, dim):
    x, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    clip = torch.rand(clip_shape(x, dim)) + 0.5
    for out in (torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 10)[..., ::2], torch.empty(5, 3, 4, 2).transpose(0, 3)):
        assert fake_quantize(x, clip, integers(4, True, dim), gradient, out=out) is None
        assert_same_bits(out, fake_quantize(x, clip, integers(4, True, dim), gradient))
        assert fake_quantize_backward(grad, x, clip, integers(4, True, dim), gradient, out=out) is None
        assert_same_bits(out, fake_quantize_backward(grad, x, clip, integers(4, True, dim), gradient))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_rounded_in_float32(dtype):
    x, clip = torch.randn(1000).to(dtype), torch.tensor(0.7)
    y = fake_quantize(x, clip, integers(4, True, None), "pwl")
    assert y.dtype is dtype
    if dtype is not torch.float64:
        torch.testing.assert_close(y, fake_quantize(x.float(), clip, integers(4, True, None), "pwl").to(dtype), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", SIGNED)
def test_inf_and_nan_stay_what_they_are_and_disturb_no_other(dtype, signed):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.3, 9.0], dtype=dtype)
    y = fake_quantize(x, torch.tensor(1.0), integers(4, signed, None), "pwl")
    torch.testing.assert_close(y[:3], x[:3], **EXACT)
    assert torch.equal(y[3:], fake_quantize(x[3:], torch.tensor(1.0), integers(4, signed, None), "pwl"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", SIGNED)
def test_a_clip_of_zero_makes_zeros(dtype, signed):
    x = torch.randn(3, 9).to(dtype)
    assert not fake_quantize(x, torch.tensor(0.0), integers(4, signed, None), "pwl").any()
    # In one channel only.
    y = fake_quantize(x, torch.tensor([1.0, 0, 1]), integers(4, signed, 0), "pwl")
    assert y.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("dim", [None, 0])
def test_empty_tensors_pass_through(shape, dim):
    x = torch.empty(shape, requires_grad=True)
    clip = torch.tensor(1.0) if dim is None else torch.ones(shape[dim])
    y = fake_quantize(x, clip, integers(4, True, dim), "pwl")
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_a_number_is_a_tensor_too():
    x = torch.tensor(0.6, requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl")
    y.backward()
    assert (y.item(), x.grad.item()) == (0.625, 1)


def test_x_is_not_modified():
    x = torch.randn(100)
    before = x.clone()
    fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl")
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("gradient", "signed", "expected"),
    [
        ("ste", True, [10, 20, 30, 40, 50]),
        ("pwl", True, [0, 20, 30, 40, 0]),
        ("mad", True, [5, 20, 30, 40, 25]),
        ("ste", False, [10, 20, 30, 40, 50]),
        ("pwl", False, [0, 0, 30, 40, 0]),
        ("mad", False, [0, 0, 30, 40, 25]),
    ],
)
def test_gradients_by_hand(gradient, signed, expected):
    # The clip is 2; twice that is halved by "mad", and 2 itself is inside.
    x = torch.tensor([-4.0, -2.0, 1.0, 2.0, 4.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(2.0), integers(4, signed, None), gradient)
    y.backward(torch.tensor([10.0, 20, 30, 40, 50]))
    assert x.grad.tolist() == expected


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_clip_gets_no_gradient(gradient):
    x, clip = torch.randn(10, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, clip, integers(4, True, None), gradient).sum().backward()
    assert x.grad is not None
    assert clip.grad is None


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("signed", SIGNED)
def test_backward_is_linear_in_the_gradient_and_its_derivative_is_itself(gradient, signed):
    # The one part that is differentiable: finite differences against the gradient that is registered, twice over.
    x, clip = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64)
    grad = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def backward(grad):
        return fake_quantize_backward(grad, x, clip, integers(4, signed, 0), gradient)

    assert torch.autograd.gradcheck(backward, grad)
    assert torch.autograd.gradgradcheck(backward, grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("signed", SIGNED)
def test_second_derivatives(gradient, signed):
    x, clip, v = torch.randn(100, requires_grad=True), torch.tensor(0.8), torch.randn(100)
    y = fake_quantize(x, clip, integers(4, signed, None), gradient)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    factor = GRADIENTS[gradient](x.detach(), clip, signed)
    torch.testing.assert_close(first.detach(), 2 * y.detach() * factor, **EXACT)
    # d(2 y factor)/dx with the factor a constant and dy/dx the factor again.
    (second,) = torch.autograd.grad((first * v).sum(), x)
    # Three products in another order: two roundings apart.
    torch.testing.assert_close(second, 2 * v * factor * factor, rtol=2**-22, atol=0)


@pairwise(
    {
        "gradient": GRADIENTS,
        "dim, channels_last": [(None, False), (0, False), (1, True)],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_opcheck(gradient, dim, channels_last, dtype):
    x = torch.randn(2, 3, 4, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    clip = torch.tensor(1.0) if dim is None else torch.rand(x.shape[dim]) + 0.5
    x.requires_grad_()
    torch.library.opcheck(fake_quantize.default, (x, clip, integers(4, True, dim), gradient))
    torch.library.opcheck(fake_quantize.default, (x, clip, integers(4, True, dim), gradient, torch.float16))
    grad = torch.randn(x.shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(fake_quantize_backward.default, (grad, x.detach(), clip, integers(4, True, dim), gradient))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_traced_whole_with_the_same_values_and_gradients(fresh_dynamo, gradient):
    x, clip = torch.randn(4, 9), torch.tensor([0.3, 1.0, 2.0, 0.0])

    def loss(x):
        return (fake_quantize(x * 2, clip, integers(4, True, 0), gradient) ** 2).sum()

    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = loss(eager)
    expected.backward()
    result = torch.compile(loss, backend="aot_eager", fullgraph=True)(traced)
    result.backward()
    assert torch.equal(result, expected)
    assert torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_host_reads_no_value(gradient):
    x, clip = torch.empty(3, 5, device="meta"), torch.empty(3, device="meta")
    assert reference.fake_quantize(x, clip, integers(4, True, 0), gradient).shape == x.shape
    assert reference.fake_quantize_backward(x, x, clip, integers(4, True, 0), gradient).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", ["int4/token.1", "int8/channel.0/e8m0", "e2m1/group-16.1/e4m3", "nf4/tensor/float16"])
def test_near_the_end_of_a_dtype_levels_are_finite(spec, dtype):
    greatest = torch.finfo(dtype).max
    x = (torch.rand(16, 32) * 2 - 1).to(dtype) * greatest
    x[0, 0], x[1, 1], x[2, 2] = greatest, -greatest, torch.inf
    shape = () if "token" in spec or "group" in spec or "tensor" in spec else (16,)
    clip = torch.ops.octav.optimal_clip(x, torch.zeros(shape), spec, "octav")
    y = fake_quantize(x, clip, spec, "ste")
    assert torch.equal(y.isfinite(), x.isfinite())
    assert_same_bits(y, reference.fake_quantize(x, clip, spec, "ste"))
    levels = torch.ops.octav.dequantize(torch.ops.octav.quantize(x, clip, spec), clip, spec, dtype)
    assert torch.equal(levels[x.isfinite()], y[x.isfinite()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_clip_makes_no_number_is_none(dtype):
    x, codes, spec = torch.randn(64).to(dtype), torch.arange(-7, 8, dtype=torch.int8), integers(4, True, None)
    for quantized in (fake_quantize, reference.fake_quantize):
        assert quantized(x, torch.tensor(torch.inf), spec, "ste").isnan().all()
    assert torch.ops.octav.dequantize(codes, torch.tensor(torch.nan), spec, dtype).isnan().all()
