import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import integers
from octav_fx.ops.dynamic_fake_quantize import reference
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.ops.optimal_clip.op import optimal_clip
from tests.support.compare import EXACT
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import DTYPES, METHODS, axes, filled_with_nan, tensors

COLD = torch.tensor(0.0)


@examples(150)
@given(data=st.data())
def test_it_is_the_composition_of_the_two_ops(data):
    x = data.draw(tensors(DTYPES))
    dim, method = data.draw(axes(x)), data.draw(st.sampled_from(list(METHODS)))
    bits, signed = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    hint = torch.zeros(clip_shape(x, dim))
    with filled_with_nan():
        y, clip = dynamic_fake_quantize(x, hint, integers(bits, signed, dim), method, "pwl")
    expected = optimal_clip(x, hint, integers(bits, signed, dim), method)
    torch.testing.assert_close(clip, expected, **EXACT)
    torch.testing.assert_close(y, fake_quantize(x, expected, integers(bits, signed, dim), "pwl"), **EXACT)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dim", [None, 1])
def test_the_gradient_is_that_of_rounding_to_a_constant_clip(gradient, signed, dim):
    x, grad = torch.randn(20, 30, requires_grad=True), torch.randn(20, 30)
    y, clip = dynamic_fake_quantize(x, torch.zeros(clip_shape(x, dim)), integers(4, signed, dim), "octav", gradient)
    same = x.detach().clone().requires_grad_()
    y.backward(grad)
    fake_quantize(same, clip, integers(4, signed, dim), gradient).backward(grad)
    assert torch.equal(x.grad, same.grad)


def test_the_clip_is_not_differentiable():
    x = torch.randn(10, requires_grad=True)
    y, clip = dynamic_fake_quantize(x, COLD, integers(4, True, None), "octav", "pwl")
    assert y.requires_grad
    assert not clip.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_derivatives(gradient):
    x, v = torch.randn(100, requires_grad=True), torch.randn(100)
    y, clip = dynamic_fake_quantize(x, COLD, integers(4, True, None), "octav", gradient)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), x)
    factor = GRADIENTS[gradient](x.detach(), clip, True)
    # Three products in another order: two roundings apart.
    torch.testing.assert_close(second, 2 * v * factor * factor, rtol=2**-22, atol=0)


@pytest.mark.parametrize("hint", [0.0, 1.0, 3.0, 1000.0, math.inf, math.nan])
def test_the_hint_does_not_change_the_result(hint):
    x = torch.randn(1000)
    y, clip = dynamic_fake_quantize(x, torch.tensor(hint), integers(4, True, None), "octav", "pwl")
    expected, fixed = dynamic_fake_quantize(x, COLD, integers(4, True, None), "octav", "pwl")
    # The same fixed point up to the rounding of its sums; with this seed no value lies that close to a tie.
    torch.testing.assert_close(clip, fixed, rtol=1e-6, atol=0)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_inf_and_nan_pass_and_the_clip_is_of_the_others(dtype, method):
    x = torch.randn(1000).to(dtype)
    x[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    y, clip = dynamic_fake_quantize(x, COLD, integers(4, True, None), method, "pwl")
    torch.testing.assert_close(y[:3], x[:3], **EXACT)
    assert y[3:].isfinite().all()
    # The same values, perhaps summed in another order.
    expected = optimal_clip(x[3:].clone(), COLD, integers(4, True, None), method)
    torch.testing.assert_close(clip, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(dtype, method):
    x = torch.zeros(3, 9, dtype=dtype, requires_grad=True)
    y, clip = dynamic_fake_quantize(x, torch.ones(3), integers(4, True, 0), method, "mad")
    y.sum().backward()
    assert not y.any()
    assert clip.tolist() == [0, 0, 0]
    # |x| == clip counts as inside.
    assert x.grad.eq(1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[0.7] * 9, [-0.7] * 9, [0.0, -0.7, 0.0]])
def test_one_value_is_kept_to_a_step(method, values):
    x = torch.tensor(values)
    y, clip = dynamic_fake_quantize(x, COLD, integers(4, True, None), method, "pwl")
    # The highest level is a step below the clip: an eighth, and the clip's own rounding.
    assert ((y - x).abs() <= 0.7 / 8 * (1 + 1e-6)).all()
    assert clip > 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("dim", [None, 0])
def test_empty_tensors_pass_through(shape, dim):
    x = torch.empty(shape, requires_grad=True)
    y, clip = dynamic_fake_quantize(x, torch.zeros(clip_shape(x, dim)), integers(4, True, dim), "octav", "mad")
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not clip.any()


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
    hint = torch.zeros(clip_shape(x, dim))
    torch.library.opcheck(dynamic_fake_quantize, (x.requires_grad_(), hint, integers(4, True, dim), "octav", gradient))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_traced_whole_with_the_same_values_and_gradients(fresh_dynamo, method, gradient):
    x = torch.randn(4, 50)

    def loss(x):
        y, clip = dynamic_fake_quantize(x * 2, torch.zeros(4), integers(4, True, 0), method, gradient)
        return (y**2).sum(), clip

    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, clip = loss(eager)
    expected.backward()
    result, traced_clip = torch.compile(loss, backend="aot_eager", fullgraph=True)(traced)
    result.backward()
    assert torch.equal(result, expected)
    assert torch.equal(traced_clip, clip)
    assert torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize("method", METHODS)
def test_the_host_reads_no_value(method):
    x, hint = torch.empty(3, 5, device="meta"), torch.empty(3, device="meta")
    y, clip = reference.dynamic_fake_quantize(x, hint, integers(4, True, 0), method, "pwl")
    assert (y.shape, clip.shape) == ((3, 5), (3,))
