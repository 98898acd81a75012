import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from octav_fx.ops.fake_quantize_filters import reference
from octav_fx.ops.fake_quantize_filters.op import fake_quantize_filters, fake_quantize_filters_backward
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.strategies import DTYPES, NATIVE, SIZES, SPECIAL, TIE, clips, filled_with_nan

SIGNED = [True, False]


@st.composite
def filters(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """[C, I, K]: normal values, ties and what is not a normal number; contiguous, or input channels last in memory."""
    channels, inputs, positions = (draw(st.sampled_from(SIZES)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (channels, inputs, positions)
    values = torch.randn(shape, generator=generator)
    ties = torch.randint(-600, 600, shape, generator=generator) * TIE
    values = torch.where(torch.rand(shape, generator=generator) < 0.3, ties, values)
    others = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    values = torch.where(torch.rand(shape, generator=generator) < 0.1, others, values)
    values = values.to(draw(st.sampled_from(dtypes)))
    return values if draw(st.booleans()) else values.transpose(1, 2).contiguous().transpose(1, 2)


def layouts(grad: Tensor) -> dict[str, Tensor]:
    """The same gradient [C, I, *spatial] as it may lie in memory."""
    return {
        "contiguous": grad,
        "channels last": grad.movedim(1, -1).contiguous().movedim(-1, 1),
        "transposed": grad.transpose(0, -1).contiguous().transpose(0, -1),
        "strided": torch.stack([grad, grad], -1)[..., 0],
        "flipped": grad.movedim(0, 1).contiguous().movedim(1, 0),
    }


def test_by_hand_input_channels_come_last():
    # Clip 4 and 2, 3 bits: steps 1 and 1/2.
    x = torch.tensor([[[0.5, 1.5, 9], [2.5, -9, 0]], [[0.25, 0.75, 9], [-9, 1, 0.1]]])
    y = fake_quantize_filters(x, torch.tensor([4.0, 2.0]), integers(3, True, 0))
    assert y.tolist() == [[[0, 2], [2, -4], [3, 0]], [[0, -2], [1, 1], [1.5, 0]]]
    assert y.is_contiguous()


@examples(300)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(kernels, data):
    x = data.draw(filters())
    clip, bits, signed = data.draw(clips(x, 0)), data.draw(st.integers(2, 8)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([None, *DTYPES]))
    with filled_with_nan() as allocations:
        y = fake_quantize_filters(x, clip, integers(bits, signed, 0), dtype)
    assert allocations[0]
    assert y.dtype is (dtype or x.dtype)
    assert_same_bits(y, reference.fake_quantize_filters(x, clip, integers(bits, signed, 0), dtype))
    assert y.is_contiguous()


@examples(200)
@given(data=st.data())
def test_values_are_those_of_fake_quantize(data):
    x = data.draw(filters())
    clip, bits, signed = data.draw(clips(x, 0)), data.draw(st.integers(2, 8)), data.draw(st.booleans())
    y = fake_quantize_filters(x, clip, integers(bits, signed, 0))
    assert_same_bits(y, fake_quantize(x, clip, integers(bits, signed, 0), "ste").permute(0, 2, 1))


@examples(300)
@given(data=st.data())
def test_the_backward_kernel_is_the_reference_bit_for_bit(kernels, data):
    x = data.draw(filters())
    gradient, signed = data.draw(st.sampled_from(list(GRADIENTS))), data.draw(st.booleans())
    # "ste" asks nothing of x, and NaN in it is below.
    x = x.nan_to_num(posinf=math.inf, neginf=-math.inf) if gradient == "ste" else x
    clip = data.draw(clips(x, 0))
    grad = torch.randn(x.shape, dtype=data.draw(st.sampled_from([x.dtype, *DTYPES])))
    grad = data.draw(st.sampled_from(list(layouts(grad).values())))
    with filled_with_nan() as allocations:
        result = fake_quantize_filters_backward(grad, x, clip, integers(4, signed, 0), gradient)
    assert allocations[0]
    assert_same_bits(result, reference.fake_quantize_filters_backward(grad, x, clip, integers(4, signed, 0), gradient))
    assert result.dtype is x.dtype


def test_straight_through_passes_the_gradient_of_nan_too(kernels):
    x, grad = torch.tensor([[[math.nan]]]), torch.tensor([[[3.0]]])
    assert fake_quantize_filters_backward(grad, x, torch.ones(1), integers(4, True, 0), "ste").item() == 3


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("layout", layouts(torch.ones(1, 1, 1, 1)))
def test_a_gradient_in_any_layout_is_that_of_fake_quantize(layout, signed, gradient):
    w, clip = torch.randn(5, 3, 2, 4), torch.tensor([0.3, 1.0, 0.7, 0.0, 2.0])
    grad = layouts(torch.randn(w.shape))[layout]
    rows = fake_quantize_filters_backward(grad, w.view(5, 3, 8), clip, integers(4, signed, 0), gradient)
    assert rows.is_contiguous()
    assert_same_bits(rows.view(w.shape), fake_quantize_backward(grad, w, clip, integers(4, signed, 0), gradient))


@pytest.mark.parametrize("layout", layouts(torch.ones(1, 1, 1, 1)))
@pytest.mark.parametrize("half", NATIVE)
@pytest.mark.parametrize("dtype", NATIVE)
def test_all_layouts_and_dtypes_reach_the_kernels(kernel_calls, layout, dtype, half):
    x, clip, grad = torch.randn(5, 3, 8).to(dtype), torch.ones(5), torch.randn(5, 3, 2, 4).to(half)
    fake_quantize_filters(x, clip, integers(4, True, 0), half)
    fake_quantize_filters_backward(layouts(grad)[layout], x, clip, integers(4, True, 0), "pwl")
    assert kernel_calls == ["octav_fake_quantize_filters", "octav_fake_quantize_filters_backward"]


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_stay_what_they_are_and_disturb_no_other(special, signed):
    x, clip = torch.randn(3, 4, 5), torch.ones(3)
    expected = fake_quantize_filters(x, clip, integers(4, signed, 0))
    x[1, 2, 3] = expected[1, 3, 2] = special
    assert_same_bits(fake_quantize_filters(x, clip, integers(4, signed, 0)), expected)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clip_of_zero_makes_zeros_of_its_channel(dtype, signed):
    x, clip = torch.randn(3, 9, 4).to(dtype), torch.tensor([1.0, 0, 1])
    y = fake_quantize_filters(x, clip, integers(4, signed, 0))
    assert y.dtype is dtype
    assert y.flatten(1).any(1).tolist() == [True, False, True]
    assert_same_bits(y[1], torch.zeros(4, 9, dtype=dtype))


# More than 2**16 elements are shared among the threads, channel by channel.
@pytest.mark.parametrize("shape", [(5, 300, 49), (70, 111, 9), (2**16 + 1, 1, 1), (1, 2**9, 2**8), (3, 2**15, 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_several_threads_compute_what_one_does(kernels, threads, shape, count):
    channels, inputs, positions = shape
    x, clip = torch.randn(shape), torch.rand(channels) + 0.5
    grads = [torch.randn(shape), torch.randn(channels, positions, inputs).transpose(1, 2)]

    def results():
        with filled_with_nan():
            yield fake_quantize_filters(x, clip, integers(4, True, 0))
            for grad in grads:
                yield fake_quantize_filters_backward(grad, x, clip, integers(4, True, 0), "mad")

    threads(1)
    expected = list(results())
    threads(count)
    for y, one in zip(results(), expected, strict=True):
        assert_same_bits(y, one)
    assert_same_bits(expected[0], reference.fake_quantize_filters(x, clip, integers(4, True, 0)))


@pytest.mark.parametrize("shape", [(0, 3, 9), (3, 0, 9), (3, 5, 0), (0, 0, 0)])
def test_empty_filters_pass_through(shape):
    x, clip = torch.empty(shape), torch.ones(shape[0])
    assert fake_quantize_filters(x, clip, integers(4, True, 0)).shape == (shape[0], shape[2], shape[1])
    assert fake_quantize_filters_backward(x, x, clip, integers(4, True, 0), "pwl").shape == shape


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_out_is_written_in_its_own_layout_and_returned(gradient):
    x, clip = torch.randn(5, 3, 4), torch.rand(5) + 0.5
    y, grad = fake_quantize_filters(x, clip, integers(4, True, 0)), torch.randn(5, 3, 4)
    for out in (torch.empty(5, 4, 3), torch.empty(5, 3, 4).transpose(1, 2), torch.empty(5, 4, 6)[..., ::2]):
        stride = out.stride()
        assert fake_quantize_filters(x, clip, integers(4, True, 0), out=out) is None
        assert out.stride() == stride
        assert_same_bits(out, y)
    dx = fake_quantize_filters_backward(grad, x, clip, integers(4, True, 0), gradient)
    for out in (torch.empty(5, 3, 4), torch.empty(5, 4, 3).transpose(1, 2), torch.empty(5, 3, 8)[..., ::2]):
        assert fake_quantize_filters_backward(grad, x, clip, integers(4, True, 0), gradient, out=out) is None
        assert_same_bits(out, dx)


def test_filters_are_not_modified():
    x = torch.randn(5, 3, 4)
    before = x.clone()
    fake_quantize_filters_backward(
        fake_quantize_filters(x, torch.ones(5), integers(4, True, 0)), x, torch.ones(5), integers(4, True, 0), "mad"
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, clip = torch.randn(5, 3, 4, dtype=dtype), torch.rand(5) + 0.5
    torch.library.opcheck(fake_quantize_filters.default, (x, clip, integers(4, True, 0)))
    torch.library.opcheck(fake_quantize_filters.default, (x, clip, integers(4, True, 0), torch.float16))
    torch.library.opcheck(
        fake_quantize_filters.out, (x, clip, integers(4, True, 0)), {"out": torch.empty(5, 4, 3, dtype=dtype)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_opcheck_of_the_gradient(layout, gradient):
    x, clip, grad = torch.randn(5, 3, 8), torch.rand(5) + 0.5, layouts(torch.randn(5, 3, 2, 4))[layout]
    torch.library.opcheck(fake_quantize_filters_backward.default, (grad, x, clip, integers(4, True, 0), gradient))
    out = {"out": torch.empty_like(x)}
    torch.library.opcheck(fake_quantize_filters_backward.out, (grad, x, clip, integers(4, True, 0), gradient), out)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_host_reads_no_value(gradient):
    x, clip = torch.empty(3, 5, 9, device="meta"), torch.empty(3, device="meta")
    assert reference.fake_quantize_filters(x, clip, integers(4, True, 0)).shape == (3, 9, 5)
    assert reference.fake_quantize_filters_backward(x, x, clip, integers(4, True, 0), gradient).shape == x.shape
