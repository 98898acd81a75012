"""learned_fake_quantize and its two gradients, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.learned import LEARNED, clip_from_parameter, sign_of
from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize import reference


def learned_fake_quantize(x: Tensor, parameter: Tensor, spec: str, method: str, is_data: bool) -> Tensor:
    """Map x [...], parameter [] or [C] -> [...]: x rounded to the grid of a learned clip (clips/learned.py).

    method: "pact", the parameter is the clip, or "lsq", it is the step. is_data: the first axis of x is the batch,
    which does not count as features in LSQ's gradient scale.
    """
    return reference.fake_quantize(x, clip_from_parameter(parameter, spec_of(spec).format, method), spec, "pwl")


def learned_fake_quantize_backward(grad: Tensor, x: Tensor, parameter: Tensor, spec: str, method: str) -> Tensor:
    """Grad and x [...], parameter [] or [C] -> the gradient of x [...], the dtype of grad: 1 inside, 0 outside."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    represented = spec_of(spec)
    form = represented.format
    clip = represented.granularity.along(clip_from_parameter(parameter, form, method), x).to(value.dtype)
    return torch.where(LEARNED[method].inside(value, clip, form), grad, 0)


def learned_parameter_backward(
    grad: Tensor, x: Tensor, parameter: Tensor, spec: str, method: str, is_data: bool
) -> Tensor:
    """Grad and x [...], parameter [] or [C] -> the gradient of the parameter, [] or [C]. inf and NaN in x give none."""
    slopes = learned_slopes(x, parameter, spec, method, is_data)
    products = torch.where(x.isfinite(), grad.to(slopes.dtype) * slopes, 0)
    shared = spec_of(spec).granularity
    return shared.of_rows(shared.rows(products).sum(-1).to(parameter.dtype), x.shape)


def learned_slopes(x: Tensor, parameter: Tensor, spec: str, method: str, is_data: bool) -> Tensor:
    """Return the derivative of each rounded value, times the method's scale, [...]; 0 for inf and NaN."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    represented = spec_of(spec)
    form = represented.format
    clip = represented.granularity.along(clip_from_parameter(parameter, form, method), x).to(value.dtype)
    count = x.numel() // max(parameter.numel(), 1)
    if is_data and x.dim() > 1:
        count //= max(x.shape[0], 1)
    scale = LEARNED[method].scale(count, form) * represented.granularity.along(sign_of(parameter), x).to(value.dtype)
    slopes = LEARNED[method].slope(value, clip, form) * scale
    return torch.where(x.isfinite(), slopes, 0)
