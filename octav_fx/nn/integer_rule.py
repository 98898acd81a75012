"""The arithmetic of a deployed model: what each layer computes of codes, to the last bit.

    layer, read by a quantizer    code = round(f32(sum + bias) * f32(f32(sx * sw) / sy))
    layer, read by anything else  y = f32(sum + bias) * f32(sx * sw)
    x1 + x2                       code = round(fma(r1, c1, fma(r2, c2, f32(zy - (r1 * z1 + r2 * z2)))))
    mean over positions           code = round(f32(sum of codes) * f32(sx / f32(sy * positions)))

with exact sums of products of codes, one rounding to float32 where it says f32, ties to even, and codes saturated
afterwards. s are the scales of inputs, weight and result, r1 and r2 those of x1 and x2 over sy, z the zero points that
unsigned bytes would have. The order of roundings is that of onnxruntime's kernels on x64, which gives the same bits.

The modules return what they compute in units of sy, for a StaticQuantizer that takes it in steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.nn.static import IntegerBias, StaticQuantizer

# float32 holds every integer below this.
EXACT = 2**24


def codes_of(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return levels [...], code * scale rounded to float32, and the scale [] -> the codes [...] in a floating dtype."""
    # Two roundings move the quotient by 2**-23 of itself: far from a tie for codes of a byte.
    return (levels / scale).round().to(dtype)


def linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return sums of products of codes, as F.linear of floating x [..., K]."""
    return _exact(F.linear, x, *args, **kwargs)


def conv1d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return sums of products of codes, as F.conv1d of floating x [N, C, L]."""
    return _exact(F.conv1d, x, *args, **kwargs)


def conv2d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return sums of products of codes, as F.conv2d of floating x [N, C, H, W]."""
    return _exact(F.conv2d, x, *args, **kwargs)


def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return sums of products of codes, as F.conv3d of floating x [N, C, D, H, W]."""
    return _exact(F.conv3d, x, *args, **kwargs)


# By the name of an op.
PRODUCTS = {function.__name__: function for function in (linear, conv1d, conv2d, conv3d)}


def _exact(layer: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a layer; outside of autocast, whose dtypes hold few sums: float16 ends at 65504."""
    if not torch.is_autocast_enabled(x.device.type):
        return layer(x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x, *args, **kwargs)


class Rescale(nn.Module):
    """Sums of products of codes [..., C, ...], exact -> f32(sum + bias) * multiplier [..., C, ...], float32.

    codes: int32 [C], the bias in 2**-fraction of one sum. multiplier: float32 [C]. dim: the channel axis.
    """

    codes: Tensor
    multiplier: Tensor

    def __init__(self, bias: IntegerBias, dim: int, result: StaticQuantizer | None) -> None:
        super().__init__()
        self.fraction, self.dim = bias.fraction, dim
        self.register_buffer("codes", bias.codes)
        self.register_buffer("multiplier", bias.step if result is None else bias.step / result.scale)

    def forward(self, sums: Tensor) -> Tensor:
        """See the class."""
        bias = along(self.codes, sums, self.dim).to(sums.dtype) / 2**self.fraction
        return (sums + bias).float() * along(self.multiplier, sums, self.dim)


class CodeSum(nn.Module):
    """Levels [...] of two quantizers -> their sum in steps of a third [...], rounded to codes but not saturated."""

    scales: Tensor
    ratios: Tensor
    constant: Tensor

    def __init__(self, first: StaticQuantizer, second: StaticQuantizer, result: StaticQuantizer) -> None:
        super().__init__()
        self.zeros = [_zero_point(q) for q in (first, second, result)]
        self.register_buffer("scales", torch.stack([first.scale, second.scale]))
        ratios = self.scales / result.scale
        self.register_buffer("ratios", ratios)
        self.register_buffer("constant", self.zeros[2] - (ratios[0] * self.zeros[0] + ratios[1] * self.zeros[1]))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """See the class."""
        codes = [
            codes_of(x, scale, torch.float64) + zero
            for x, scale, zero in zip((first, second), self.scales, self.zeros, strict=False)
        ]
        # A product of 24 and 9 bits is exact in float64, and so is the sum where it matters: fused multiply-add.
        ratios, constant = self.ratios.double(), self.constant.double()
        inner = (ratios[1] * codes[1] + constant).float()
        return (ratios[0] * codes[0] + inner.double()).float().round() - self.zeros[2]


class CodeMean(nn.Module):
    """Levels [N, C, H, W] of a quantizer -> their mean over two axes, in steps of another, [N, C, 1, 1]."""

    scale: Tensor
    result: Tensor

    def __init__(
        self, source: StaticQuantizer, result: StaticQuantizer, keepdim: bool, axes: tuple[int, int] = (-2, -1)
    ) -> None:
        super().__init__()
        self.keepdim, self.axes = keepdim, axes
        self.register_buffer("scale", source.scale.clone())
        self.register_buffer("result", result.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        # Of a batch of none, too.
        positions = math.prod(x.shape[axis] for axis in self.axes)
        total = codes_of(x, self.scale, torch.float64).sum(self.axes, keepdim=self.keepdim)
        return total.float() * (self.scale / (self.result * positions))


def _zero_point(quantizer: StaticQuantizer) -> int:
    return -Grid(quantizer.bits, quantizer.signed).low
