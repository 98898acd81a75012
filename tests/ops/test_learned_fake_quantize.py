import math

import pytest
import torch

from octav_fx.clips.learned import MIN_CLIP, clip_from_parameter, initial_clip, parameter_for
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.ops.learned_fake_quantize.op import (
    learned_fake_quantize,
    learned_fake_quantize_backward,
    learned_parameter_backward,
)

METHODS = ["pact", "lsq"]


class Round(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def lsq(x, step, bits, signed, count):
    """The paper's formulas (arXiv 1902.08153, eq. 1, 2 and the pseudocode of its appendix)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = 1 / math.sqrt(count * high)
    step = step * scale + (step - step * scale).detach()
    return Round.apply((x / step).clamp(low, high)) * step


def pact(x, alpha, bits, signed):
    """The paper's (arXiv 1805.06085, eq. 1 to 3), with this library's levels."""
    grid = Grid(bits, signed)
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    if signed:
        y = 0.5 * ((x + alpha).abs() - (x - alpha).abs())
    step = alpha.detach() / grid.steps
    rounded = (y / step).round().clamp(grid.low, grid.high) * step
    return y + (rounded - y).detach()


def data(signed, dtype=torch.float64):
    x = torch.randn(6, 5, 40, dtype=dtype)
    return (x if signed else x.abs()).requires_grad_()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("is_data", [True, False])
def test_lsq_is_the_paper(bits, signed, dim, is_data):
    x, grad = data(signed), torch.randn(6, 5, 40, dtype=torch.float64)
    step = (torch.rand(() if dim is None else (5,), dtype=torch.float64) + 0.5) / 2**bits
    ours, theirs = step.clone().requires_grad_(), step.clone().requires_grad_()
    same = x.detach().clone().requires_grad_()
    count = 6 * 5 * 40 // (6 if is_data else 1) // (1 if dim is None else 5)
    y = learned_fake_quantize(x, ours, integers(bits, signed, dim), "lsq", is_data)
    expected = lsq(same, along(theirs, same, dim), bits, signed, count)
    # The grid's own arithmetic is that of clips in float32 or more: a few roundings of float64 here.
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    y.backward(grad)
    expected.backward(grad)
    # The paper's way multiplies and divides by the step: two roundings.
    torch.testing.assert_close(x.grad, same.grad, rtol=2**-51, atol=0)
    # Sums of 1200 products up to 2**bits, in float64; the paper's way subtracts two of them that are near each other.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert 0 < (x.grad == 0).double().mean() < 0.9


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_pact_is_the_paper(bits, signed):
    x, grad = data(signed), torch.randn(6, 5, 40, dtype=torch.float64)
    ours = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    same = x.detach().clone().requires_grad_()
    y = learned_fake_quantize(x, ours, integers(bits, signed, None), "pact", True)
    expected = pact(same, theirs, bits, signed)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    y.backward(grad)
    expected.backward(grad)
    # Halves of sums of two signs: exact.
    assert torch.equal(x.grad, same.grad)
    # Sums of some 300 products in another order.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_gradients_by_hand():
    x = torch.tensor([-5.0, -2.0, -1.2, 0.0, 0.6, 1.4, 1.5, 2.0, 3.0], requires_grad=True)
    # Two bits signed: codes -2 .. 1. A clip of 2 is a step of 1.
    clip, step = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    grad = 2.0 ** torch.arange(9)
    learned_fake_quantize(x, clip, integers(2, True, None), "pact", False).backward(grad)
    # |x| equal to the clip counts as inside.
    assert x.grad.tolist() == [0, 2, 4, 8, 16, 32, 64, 128, 0]
    assert clip.grad.item() == 256 - 1
    x.grad = None
    learned_fake_quantize(x, step, integers(2, True, None), "lsq", False).backward(grad)
    assert x.grad.tolist() == [0, 2, 4, 8, 16, 0, 0, 0, 0]
    slopes = [-2, 0, 0.2, 0, 0.4, 1, 1, 1, 1]
    expected = sum(s * g for s, g in zip(slopes, grad.tolist(), strict=True)) / math.sqrt(9 * 1)
    assert step.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_forward_is_fake_quantize_with_the_clip_it_stands_for(method, dtype):
    x = torch.randn(5, 7, 3).to(dtype)
    parameter = torch.rand(7) + 0.1
    clip = clip_from_parameter(parameter, Grid(4, True), method)
    assert torch.equal(clip, parameter * (8 if method == "lsq" else 1))
    assert torch.equal(parameter_for(clip, Grid(4, True), method), parameter)
    y = learned_fake_quantize(x, parameter, integers(4, True, 1), method, False)
    assert y.dtype is dtype
    assert torch.equal(y, fake_quantize(x, clip, integers(4, True, 1), "pwl"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, -1e-30, 1e-30])
@pytest.mark.parametrize("signed", [True, False])
def test_a_parameter_of_nothing_counts_as_the_least(method, value, signed):
    x, parameter = torch.rand(100, requires_grad=True), torch.tensor(value, requires_grad=True)
    y = learned_fake_quantize(x, parameter, integers(4, signed, None), method, True)
    # Nothing is flipped, and no level lies beyond the least clip.
    assert ((y >= 0) & (y <= 16 * MIN_CLIP)).all()
    (-y).sum().backward()
    # Larger clips would fit better: the gradient leads away from zero, to the side where the parameter is.
    assert 0 < -parameter.grad.item() * (-1 if value < 0 else 1) < math.inf
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 0])
def test_a_parameter_below_zero_counts_as_its_magnitude(method, dim):
    x, grad = torch.randn(3, 50), torch.randn(3, 50)
    value = torch.tensor(0.3) if dim is None else torch.tensor([0.2, 0.1, 0.4])
    sides = [sign * value for sign in (1, -1)]
    ys = []
    for parameter in sides:
        parameter.requires_grad_(True)
        ys.append(learned_fake_quantize(x, parameter, integers(4, True, dim), method, False))
        ys[-1].backward(grad)
    assert torch.equal(*ys)
    assert torch.equal(sides[0].grad, -sides[1].grad)
    assert sides[0].grad.abs().min() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 0])
def test_inf_and_nan_pass_and_give_the_parameter_nothing(method, dim):
    x = torch.randn(3, 100)
    x[:, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    clean, grad = x.clone(), torch.randn(3, 100)
    clean[:, :3] = 0
    # What comes back through what is not finite is not finite.
    bad = grad.clone()
    bad[:, :3] = math.nan
    parameters = [torch.full(() if dim is None else (3,), 0.2, requires_grad=True) for _ in range(2)]
    y = learned_fake_quantize(x, parameters[0], integers(4, True, dim), method, False)
    torch.testing.assert_close(y[:, :3], x[:, :3], rtol=0, atol=0, equal_nan=True)
    y.backward(bad)
    learned_fake_quantize(clean, parameters[1], integers(4, True, dim), method, False).backward(grad)
    assert torch.equal(parameters[0].grad, parameters[1].grad)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_where_they_begin(bits, signed):
    x = torch.randn(3, 500) if signed else torch.rand(3, 500)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    grid = Grid(bits, signed)
    step = parameter_for(initial_clip(x, grid, "lsq"), grid, "lsq")
    # Sums of 500 floats in another order.
    torch.testing.assert_close(step, 2 * x.abs().mean(-1) / math.sqrt(high), rtol=1e-6, atol=0)
    assert torch.equal(initial_clip(x, grid, "pact"), x.abs().amax(-1))
    for nothing in (torch.zeros(2, 3), torch.empty(2, 0), torch.full((2, 3), math.nan)):
        assert initial_clip(nothing, grid, "lsq").tolist() == initial_clip(nothing, grid, "pact").tolist() == [1, 1]
    worse = torch.cat([x, torch.tensor([math.inf, math.nan]).expand(3, -1)], -1)
    for method in METHODS:
        torch.testing.assert_close(initial_clip(worse, grid, method), initial_clip(x, grid, method), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 1])
def test_opcheck(method, dim):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    shape = () if dim is None else (3,)
    parameter, grad = torch.full(shape, 0.3), torch.randn_like(x)
    torch.library.opcheck(
        learned_fake_quantize.default,
        (x.clone().requires_grad_(), parameter.clone().requires_grad_(), integers(4, True, dim), method, True),
    )
    grad.requires_grad_()
    torch.library.opcheck(learned_fake_quantize_backward.default, (grad, x, parameter, integers(4, True, dim), method))
    torch.library.opcheck(
        learned_parameter_backward.default, (grad, x, parameter, integers(4, True, dim), method, True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_take_the_factors_as_constants(method):
    x, parameter = torch.randn(4, 30, requires_grad=True), torch.full((4,), 0.3, requires_grad=True)
    y = learned_fake_quantize(x, parameter, integers(4, True, 0), method, False)
    one = torch.ones(4, 30, requires_grad=True)
    of_x, of_parameter = torch.autograd.grad(y, (x, parameter), one, create_graph=True)
    v, w = torch.randn(4, 30), torch.randn(4)
    (found,) = torch.autograd.grad([(of_x * v).sum() + (of_parameter * w).sum()], one)
    slopes = torch.autograd.functional.jacobian(
        lambda p: learned_fake_quantize(x.detach(), p, integers(4, True, 0), method, False), parameter.detach()
    ).sum(-1)
    torch.testing.assert_close(found, of_x.detach() * v + slopes * w.unsqueeze(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_traced_whole_with_the_same_values_and_gradients(fresh_dynamo, method):
    def loss(x, parameter):
        return learned_fake_quantize(x * 2, parameter, integers(4, True, 0), method, False).square().sum()

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x, parameter = torch.randn(4, 50, requires_grad=True), torch.full((4,), 0.3, requires_grad=True)
        value = run(x, parameter)
        value.backward()
        found.append((value, x.grad, parameter.grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
