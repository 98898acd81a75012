"""What the graph of an integer model calls: ops on codes, as functions, so that a graph copies and pickles."""

import math
from typing import Any, Final

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops.integer_codes import reference
from octav_fx.ops.integer_sum import reference as sums

# Where the shape of a weight stands among the arguments of a layer.
_SHAPE: Final = 6


def integer_codes(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the codes of ops/fake_quantize for finite x [...] and a clip [] or [C]: int8 [...]; signed grids."""
    # Written out, so that a compiler can put it at the end of what computes x.
    if torch.compiler.is_compiling():
        return reference.integer_codes(x, scale, bits, signed)
    return torch.ops.octav.integer_codes.default(x, scale, bits, signed)


def levels(codes: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the levels of codes that count from the lowest, uint8 [...] -> float32 [...]: those of StaticQuantizer."""
    return (codes.to(torch.float32) + Grid(bits, signed).low) * scale


def code_sum(*args: Any) -> Tensor:
    """Return the codes of the sum of two tensors of codes, uint8 [...] -> uint8 [...]: ops/code_sum."""
    return torch.ops.octav.code_sum.default(*args)


def code_mean(x: Tensor, *args: Any, axes: tuple[int, int]) -> Tensor:
    """Return the codes of the mean of codes over two axes, uint8 [N, C, H, W] -> uint8 [N, C, ...]: ops/code_mean."""
    if x.dim() == 4 and axes in ((2, 3), (-2, -1)):
        return torch.ops.octav.code_mean.default(x, *args)
    # What has other axes than images: all else are channels of one image.
    last = x.movedim(axes, (-2, -1))
    *others, height, width = last.shape
    codes = torch.ops.octav.code_mean.default(last.reshape(1, math.prod(others), height, width), *args)
    kept = [1 if axis in (axes[0] % x.dim(), axes[1] % x.dim()) else size for axis, size in enumerate(x.shape)]
    return codes.reshape(kept if codes.dim() == 4 else others)


def code_cat(codes: list[Tensor], step: Tensor, dim: int) -> Tensor:
    """Return codes of one step, uint8, one behind the other along an axis."""
    return torch.cat(codes, dim)


def gated_codes(
    x: Tensor, x_scale: Tensor, gate: Tensor, step: Tensor, x_bits: int, x_signed: bool, bits: int, signed: bool
) -> Tensor:
    """Return the codes of levels times a gate, codes uint8 [N, C, H, W] and [N, C, 1, 1] -> uint8: ops/gated_codes."""
    if x.dim() != 4 or gate.shape != (*x.shape[:2], 1, 1):
        # Any other product, of the shape that both are broadcast to.
        return integer_codes(levels(x, x_scale, x_bits, x_signed) * gate, step, bits, signed)
    found: Tensor = torch.ops.octav.gated_codes.default(x, x_scale, gate, step, x_bits, x_signed, bits, signed)
    return found


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """Return a function of each code from a table, uint8 [...] and uint8 [256] -> uint8 [...]: ops/lookup."""
    found: Tensor = torch.ops.octav.lookup.default(codes, table)
    return found


def integer_conv(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return codes uint8 [N, C, ...] -> float32, or the codes of a next layer, [N, O, ...]: ops/integer_conv."""
    shape = args[_SHAPE - 1]
    if x.dim() < len(shape):
        return torch.ops.octav.integer_conv.default(x.unsqueeze(0), *args, **kwargs).squeeze(0)
    return torch.ops.octav.integer_conv.default(x, *args, **kwargs)


def integer_linear(*args: Any, **kwargs: Any) -> Tensor:
    """Return codes uint8 [..., K] -> float32, or the codes of a next layer, [..., O]: ops/integer_linear."""
    return torch.ops.octav.integer_linear.default(*args, **kwargs)


def max_pool(x: Tensor, *args: Any) -> Tensor:
    """Return codes uint8 or floats [N, C, H, W] -> the largest of each window, channels last: ops/max_pool."""
    if x.dim() == 3:
        return torch.ops.octav.max_pool.default(x.unsqueeze(0), *args).squeeze(0)
    return torch.ops.octav.max_pool.default(x, *args)


def integer_sum(x: Tensor, y: Tensor, relu: bool, scale: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Map x and y [...] -> their sum or its relu, and the codes of that: ops/integer_sum."""
    alike = isinstance(y, Tensor) and isinstance(x, Tensor) and x.shape == y.shape and x.dtype is y.dtype
    if torch.compiler.is_compiling() or not alike:
        return sums.integer_sum(x, y, relu, scale, bits, signed)
    total, codes = torch.ops.octav.integer_sum.default(x, y, relu, scale, bits, signed)
    return total, codes
