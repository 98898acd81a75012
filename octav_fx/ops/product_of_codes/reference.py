"""product_of_codes, in pure torch: the definition."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops.dequantize.reference import dequantize
from octav_fx.ops.integer_conv.reference import per_channel
from octav_fx.ops.quantize.reference import quantize


def product_of_codes(
    codes: Tensor,
    clip: Tensor,
    spec: str,
    w: Tensor,
    w_clip: Tensor,
    w_spec: str,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the layer of the levels that codes [M, K] or [N, C, H, W] stand for, with a weight, in a dtype.

    codes, clip [] and spec are those of quantize; w [O, K] or [O, C / groups, *kernel] is a float weight, w_clip [] or
    [O] and w_spec those of its quantizer; bias [O]. The result is F.linear or F.conv2d of dequantize(codes) and
    fake_quantize(w) but for rounding: the sum of products of codes is exact, then, in float32 and in this order,
    f32(sum) * (step * w_step) + bias, which is rounded to dtype. What is not finite is NaN, and so is what reads it.
    """
    x, v = integers(codes, spec), integers(quantize(w, w_clip, w_spec), w_spec)
    total, trailing = product(x, v, stride, padding, dilation, groups), codes.dim() - 2
    y = total.to(torch.float32) * per_channel(scale_of(clip, spec, w_clip, w_spec), trailing)
    return (y if bias is None else y + per_channel(bias, trailing)).to(dtype)


def product(x: Tensor, w: Tensor, *window: Any) -> Tensor:
    """Return the matmul of x [M, K] and w [O, K], or the convolution of x [N, C, H, W] and w [O, C / groups, ...]."""
    return F.linear(x, w) if x.dim() == 2 else F.conv2d(x, w, None, *window)


def integers(codes: Tensor, spec: str) -> Tensor:
    """Return the codes of the grid as float64, in which sums of products are exact; NaN where nothing was finite."""
    grid, of_channel = grid_of(spec), spec_of(spec).granularity
    # Where the clip is as many steps, a step is 1 and levels are codes.
    ones = torch.full(of_channel.clip_shape(codes.shape), float(grid.steps), device=codes.device)
    return dequantize(codes, ones, spec, torch.float64)


def scale_of(clip: Tensor, spec: str, w_clip: Tensor, w_spec: str) -> Tensor:
    """Return the product of the steps, [] or [O], float32."""
    return clip.to(torch.float32) / grid_of(spec).steps * (w_clip.to(torch.float32) / grid_of(w_spec).steps)


def grid_of(spec: str) -> Grid:
    """Return the integer grid of a spec that has one."""
    plain = spec_of(spec).plain
    assert plain is not None
    return plain[0]
