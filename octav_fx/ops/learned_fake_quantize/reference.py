"""learned_fake_quantize and its two gradients, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.learned import LEARNED, clip_from_parameter, sign_of
from octav_fx.formats.granularity import along, clip_shape, to_rows
from octav_fx.formats.grid import Grid
from octav_fx.ops.fake_quantize import reference


def learned_fake_quantize(
    x: Tensor, parameter: Tensor, bits: int, signed: bool, dim: int | None, method: str, is_data: bool
) -> Tensor:
    """Map x [...], parameter [] or [C] -> [...]: x rounded to the grid of a learned clip (clips/learned.py).

    method: "pact", the parameter is the clip, or "lsq", it is the step. is_data: the first axis of x is the batch,
    which does not count as features in LSQ's gradient scale.
    """
    return reference.fake_quantize(
        x, clip_from_parameter(parameter, Grid(bits, signed), method), bits, signed, dim, "pwl"
    )


def learned_fake_quantize_backward(
    grad: Tensor, x: Tensor, parameter: Tensor, bits: int, signed: bool, dim: int | None, method: str
) -> Tensor:
    """Grad and x [...], parameter [] or [C] -> the gradient of x [...], the dtype of grad: 1 inside, 0 outside."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    grid = Grid(bits, signed)
    clip = along(clip_from_parameter(parameter, grid, method), x, dim).to(value.dtype)
    return torch.where(LEARNED[method].inside(value, clip, grid), grad, 0)


def learned_parameter_backward(
    grad: Tensor, x: Tensor, parameter: Tensor, bits: int, signed: bool, dim: int | None, method: str, is_data: bool
) -> Tensor:
    """Grad and x [...], parameter [] or [C] -> the gradient of the parameter, [] or [C]. inf and NaN in x give none."""
    slopes = learned_slopes(x, parameter, bits, signed, dim, method, is_data)
    products = torch.where(x.isfinite(), grad.to(slopes.dtype) * slopes, 0)
    return to_rows(products, dim).sum(-1).to(parameter.dtype).reshape(clip_shape(x, dim))


def learned_slopes(
    x: Tensor, parameter: Tensor, bits: int, signed: bool, dim: int | None, method: str, is_data: bool
) -> Tensor:
    """Return the derivative of each rounded value, times the method's scale, [...]; 0 for inf and NaN."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    grid = Grid(bits, signed)
    clip = along(clip_from_parameter(parameter, grid, method), x, dim).to(value.dtype)
    count = x.numel() // max(parameter.numel(), 1)
    if is_data and x.dim() > 1:
        count //= max(x.shape[0], 1)
    scale = LEARNED[method].scale(count, grid) * along(sign_of(parameter), x, dim).to(value.dtype)
    slopes = LEARNED[method].slope(value, clip, grid) * scale
    return torch.where(x.isfinite(), slopes, 0)
