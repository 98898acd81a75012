"""Learned clips on levels and rows of every kind, against their papers' formulas differentiated in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octav_fx.formats.format import Format
from octav_fx.formats.registry import CODEBOOKS
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.ops.learned_fake_quantize.op import learned_fake_quantize
from tests.support.examples import examples

METHODS = ["pact", "lsq"]
FORMS = ["int2", "int4", "int8", "int8-narrow", "uint2", "uint4", "uint8", *CODEBOOKS]
SHARED = ["tensor", "channel.0", "channel.-1", "token.1", "group-4.1", "group-8.2"]
SHAPE = (3, 8, 16)
# Sums of up to 384 terms are added up by pairs, and each term is rounded a few times: some 16 halves of an ulp.
ROUNDED = 16 * 2.0**-24


class Straight(torch.autograd.Function):
    """Other values with the gradient of these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def levels_of(form: Format) -> Tensor:
    """All levels in steps, ascending, float64."""
    return form.levels(torch.arange(form.low, form.high + 1, dtype=torch.float64))


def nearest(ratio: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to each of ratio [...]."""
    return levels[(ratio.unsqueeze(-1) - levels).abs().argmin(-1)]


def lsq(x: Tensor, step: Tensor, form: Format, scale: float) -> Tensor:
    """Round by arXiv 1902.08153, eq. 1 and 2 and the pseudocode of its appendix, on any levels; step as x."""
    levels = levels_of(form)
    step = step * scale + (step - step * scale).detach()
    code = (x / step).clamp(levels[0].item(), levels[-1].item())
    return Straight.apply(code, nearest(code.detach(), levels)) * step


def pact(x: Tensor, clip: Tensor, form: Format, scale: float) -> Tensor:
    """Round by arXiv 1805.06085, eq. 1 to 3, on any levels; clip as x."""
    inside = torch.minimum(torch.maximum(x, -clip if form.signed else torch.zeros_like(clip)), clip)
    step = clip.detach() / form.steps
    return Straight.apply(inside, nearest(inside.detach() / step, levels_of(form)) * step)


def is_apart(ratio: Tensor, form: Format) -> Tensor:
    """Whether x / step [...] is beyond a few roundings of float32 from all places where something jumps."""
    levels = levels_of(form)
    jumps = torch.cat([(levels[1:] + levels[:-1]) / 2, levels[[0, -1]], torch.tensor([0, form.steps, -form.steps])])
    return ((ratio.unsqueeze(-1) - jumps).abs() > 1e-6 * jumps.abs().clamp(min=1e-3)).all(-1)


@pytest.mark.parametrize("method", METHODS)
@examples(60)
@given(data=st.data())
def test_gradients_are_those_of_float64(method: str, data: st.DataObject) -> None:
    spec = spec_of(f"{data.draw(st.sampled_from(FORMS))}/{data.draw(st.sampled_from(SHARED))}")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # Rows of data have no learned clip.
    is_data = spec.granularity.kind == "tensor" and data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    form, shape = spec.format, spec.clip_shape(SHAPE)
    is_below, clip = torch.rand(shape) < 0.2, torch.rand(shape) + 0.5
    parameter = clip if method == "pact" else clip / form.steps
    # About a quarter lies beyond the ends.
    x = (torch.randn(SHAPE) * spec.granularity.along(clip, torch.empty(SHAPE)) * 0.8).to(dtype)
    grad = torch.randn(SHAPE).to(dtype)
    wide = spec.granularity.along(parameter.double(), x).expand(SHAPE)
    step = wide / form.steps if method == "pact" else wide
    apart = is_apart(x.double() / step, form)
    grad[~apart] = 0

    # Below zero a parameter counts as its magnitude.
    ours, leaf = torch.where(is_below, -parameter, parameter).requires_grad_(), x.clone().requires_grad_()
    y = learned_fake_quantize(leaf, ours, str(spec), method, is_data)
    y.backward(grad)
    theirs, same = parameter.double().requires_grad_(), x.double().requires_grad_()
    count = x.numel() // parameter.numel() // (SHAPE[0] if is_data else 1)
    scale = 1 / math.sqrt(count * form.greatest) if method == "lsq" else 1.0
    expected = {"lsq": lsq, "pact": pact}[method](same, spec.granularity.along(theirs, same), form, scale)
    expected.backward(grad.double())
    assert y.dtype is dtype
    # The clip, its step and the level are rounded, in float32, and the result in its dtype, or to its smallest number.
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(y[apart].double(), expected[apart], rtol=2 * eps, atol=smallest)
    assert leaf.grad is not None
    assert same.grad is not None
    if method == "lsq":
        # The paper's way multiplies and divides by the step.
        same.grad = torch.where(same.grad.abs() > 0, grad.double(), 0)
    assert torch.equal(leaf.grad.double(), same.grad)
    # A slope is the difference of two numbers of steps, none beyond the greatest level.
    size = grad.double().abs() * (1 if method == "pact" else (x.double() / step).abs().clamp(1, form.steps)) * scale
    bound = spec.of_rows(spec.granularity.rows(size).sum(-1), SHAPE) * ROUNDED
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ((ours.grad * torch.where(is_below, -1, 1) - theirs.grad).abs() <= bound).all()


def quantizer(spec: Spec, method: str, x: Tensor) -> FakeQuantizer:
    return FakeQuantizer(Settings(spec, method, "pwl"), spec.clip_shape(x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [127, 124, 60])
@pytest.mark.parametrize("method", METHODS)
def test_they_begin_alike_whatever_the_magnitude(method: str, exponent: int, dtype: torch.dtype) -> None:
    usual = torch.rand(4, 32).to(dtype)
    x = (usual * 2.0**exponent).requires_grad_()
    for spec in (spec_of(f"{form}/{shared}") for form in FORMS for shared in ("tensor", "channel.0", "group-8.1")):
        q, expected = quantizer(spec, method, x), quantizer(spec, method, x)
        y, _ = q(x), expected(usual)
        clip = (expected.used.double() * 2.0**exponent).clamp(max=torch.finfo(torch.float32).max).float()
        # Powers of two are exact; a clip that ends where float32 does is rounded when it becomes a step, and back.
        torch.testing.assert_close(q.used, clip, rtol=2.0**-23, atol=0)
        gradients = torch.autograd.grad(y.sum(), (x, q.learned))
        assert all(value.isfinite().all() for value in (y, q.learned, *gradients)), spec


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_diverged_is_a_clip_beyond_everything(method: str) -> None:
    x = torch.randn(64)
    for spec in map(spec_of, ("int4/tensor", "uint8/tensor", "e4m3/tensor")):
        y = learned_fake_quantize(x, torch.tensor(torch.inf), str(spec), method, False)
        assert not y.any()
