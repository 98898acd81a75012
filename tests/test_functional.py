import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octav_fx
from octav_fx import OctavError, fake_quantize, optimal_clip
from tests.support.examples import examples
from tests.support.samples import fixed_point

METHODS = ["octav", "octav-grid", "max", "percentile", "mse"]
GRADIENTS = ["pwl", "mad", "ste"]


def test_the_names_are_public():
    assert {"optimal_clip", "fake_quantize", "OctavError"} <= set(octav_fx.__all__)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_the_default_clip_is_that_of_the_paper(bits, signed):
    x = torch.randn(5000)
    # A few roundings of 2**-24 in sums and quotient.
    assert optimal_clip(x, bits, signed=signed).item() == pytest.approx(fixed_point(x, bits, signed), rel=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("method", METHODS)
def test_one_clip_for_each_channel(dim, method):
    x = torch.randn(3, 4, 50) * torch.rand(3, 4, 1)
    clip = optimal_clip(x, 4, dim=dim, method=method)
    assert clip.shape == (x.shape[dim],)
    for channel in range(x.shape[dim]):
        alone = optimal_clip(x.select(dim, channel), 4, method=method)
        # The same values in another order.
        torch.testing.assert_close(clip[channel], alone, rtol=1e-6, atol=0)
    y = fake_quantize(x, clip, 4, dim=dim)
    for channel in range(x.shape[dim]):
        assert torch.equal(y.select(dim, channel), fake_quantize(x.select(dim, channel), clip[channel], 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_clips_are_float32_and_values_keep_their_dtype(dtype):
    x = torch.randn(100).to(dtype)
    clip = optimal_clip(x, 4)
    assert (clip.dtype, clip.shape, fake_quantize(x, clip, 4).dtype) == (torch.float32, (), dtype)


def test_max_clips_nothing_below_the_largest_magnitude():
    x = torch.tensor([1.0, -3.0, 2.0])
    assert optimal_clip(x, 4, method="max").item() == 3
    assert optimal_clip(x, 4, method="max", signed=False).item() == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_clip_has_no_gradient(method):
    assert not optimal_clip(torch.randn(10, requires_grad=True), 4, method=method).requires_grad


@pytest.mark.parametrize(("gradient", "expected"), [("pwl", [0, 1, 0]), ("mad", [0.25, 1, 0.5]), ("ste", [1, 1, 1])])
def test_gradients(gradient, expected):
    x, clip = torch.tensor([-4.0, 1, 2], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, clip, 4, gradient=gradient).sum().backward()
    assert x.grad.tolist() == expected
    assert clip.grad is None


def test_piecewise_linear_is_the_default_gradient():
    x = torch.tensor([-4.0, 1, 2], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), 4).sum().backward()
    assert x.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("clip", [1, 1.0, torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)])
def test_a_clip_can_be_any_number(clip):
    x = torch.randn(100)
    assert torch.equal(fake_quantize(x, clip, 4), fake_quantize(x, torch.tensor(1.0), 4))


@examples(100)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    dim=st.sampled_from([None, 0, 1]),
    method=st.sampled_from(METHODS),
    scale=st.sampled_from([1e-6, 1, 1e6]),
)
def test_no_more_values_than_levels_and_all_within_the_clip(bits, signed, dim, method, scale):
    x = scale * torch.randn(30, 200)
    clip = optimal_clip(x, bits, signed=signed, dim=dim, method=method)
    y = fake_quantize(x, clip, bits, signed=signed, dim=dim)
    rows = [y] if dim is None else y.unbind(dim)
    for row, bound in zip(rows, clip.reshape(-1), strict=True):
        assert len(row.unique()) <= 2**bits
        assert (-bound if signed else 0) <= row.min() <= row.max() < bound


@examples(50)
@given(bits=st.integers(2, 8), signed=st.booleans(), gradient=st.sampled_from(GRADIENTS))
def test_quantizing_twice_is_quantizing_once(bits, signed, gradient):
    x = torch.randn(300)
    clip = optimal_clip(x, bits, signed=signed)
    once = fake_quantize(x, clip, bits, signed=signed, gradient=gradient)
    assert torch.equal(fake_quantize(once, clip, bits, signed=signed, gradient=gradient), once)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(()), torch.empty(0), torch.full((3,), math.nan)])
def test_nothing_to_clip_is_a_clip_of_zero(method, x):
    clip = optimal_clip(x, 4, method=method)
    assert clip.item() == 0
    torch.testing.assert_close(fake_quantize(x, clip, 4), x, rtol=0, atol=0, equal_nan=True)


def test_infinity_is_shown_and_not_fitted():
    x = torch.tensor([1.0, -2.0, math.inf, -math.inf, math.nan])
    clip = optimal_clip(x, 4)
    assert clip.item() == pytest.approx(optimal_clip(x[:2], 4).item(), rel=1e-6)
    torch.testing.assert_close(fake_quantize(x, clip, 4)[2:], x[2:], rtol=0, atol=0, equal_nan=True)


def test_parameters_and_slices_are_accepted():
    weight = torch.nn.Parameter(torch.randn(8, 9))
    part = weight[::2, 1:]
    clip = optimal_clip(part, 4, dim=0)
    assert torch.equal(clip, optimal_clip(part.detach().clone(), 4, dim=0))
    fake_quantize(part, clip, 4, dim=0).sum().backward()
    assert weight.grad[1::2].eq(0).all()


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4, 4.5, "4", None])
def test_bits_have_a_range(bits):
    x = torch.randn(5)
    for call in (lambda: optimal_clip(x, bits), lambda: fake_quantize(x, 1.0, bits)):
        with pytest.raises(OctavError, match=f"bits={bits!r}.*2 to 8"):
            call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_only_floating_point_can_be_quantized(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    for call in (lambda: optimal_clip(x, 4), lambda: fake_quantize(x, 1.0, 4)):
        with pytest.raises(OctavError, match=rf"{dtype}.*\(2, 3\)"):
            call()


@pytest.mark.parametrize(("shape", "dim"), [((), 0), ((), -1), ((3,), 1), ((2, 3), 2), ((2, 3), -3)])
def test_the_axis_has_to_be_there(shape, dim):
    x = torch.randn(shape)
    for call in (lambda: optimal_clip(x, 4, dim=dim), lambda: fake_quantize(x, 1.0, 4, dim=dim)):
        with pytest.raises(OctavError, match=rf"dim={dim} .*\("):
            call()


@pytest.mark.parametrize(("shape", "dim"), [((3,), None), ((1,), None), ((), 0), ((2,), 0), ((3,), 1), ((2, 1), 0)])
def test_the_clip_has_to_fit(shape, dim):
    with pytest.raises(OctavError, match=r"clip of shape .*give a clip of shape"):
        fake_quantize(torch.randn(5, 4), torch.ones(shape), 4, dim=dim)


def test_methods_and_gradients_have_names():
    with pytest.raises(OctavError, match=r"method='newton'.*'octav', 'octav-grid', 'octav-tight', 'max'"):
        optimal_clip(torch.randn(5), 4, method="newton")
    with pytest.raises(OctavError, match=r"gradient='STE'.*'ste', 'pwl', 'mad'"):
        fake_quantize(torch.randn(5), 1.0, 4, gradient="STE")


def test_float8_is_refused():
    with pytest.raises(OctavError):
        fake_quantize(torch.randn(5).to(torch.float8_e4m3fn), 1.0, 4)


def test_bits_are_whole_numbers():
    with pytest.raises(OctavError):
        fake_quantize(torch.randn(5), 1.0, 4.0)
