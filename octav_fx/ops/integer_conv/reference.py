"""integer_conv, in pure torch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.ops.onednn import clamped, code_bounds, integers, is_integer

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def integer_conv(
    x: Tensor,
    x_scale: Tensor,
    x_bits: int,
    x_signed: bool,
    w: Tensor,
    w_scale: Tensor,
    shape: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    low: float | None = None,
    high: float | None = None,
    step: Tensor | None = None,
    bits: int = 8,
    signed: bool = False,
    fraction: int = 0,
    table: Tensor | None = None,
) -> Tensor:
    """Return codes x uint8 [N, C, ...] and w of a shape [O, C / groups, ...] -> float32, or codes uint8 [N, O, ...].

    x counts from the lowest level of its grid (integer_codes), w is as IntegerWeight stores it. x_scale [], w_scale []
    or [O], bias [O], step [] float32. The sum of products of codes is exact; then, in float32 and in this order,
    f32(sum) * (x_scale * w_scale) + bias, clamp to low .. high, and with a step the nearest code of the grid of bits
    and signed: rne(value * f32(1 / step) + zero). A bias of int32 counts 2**-fraction of a product of codes, and is
    added to the sum: nn/integer_rule.py, whose bits these are.
    table uint8 [256]: codes are what it says of those in x (lookup).
    """
    check(x, w, x_scale, w_scale, shape, bias, table)
    zero, rank = -Grid(x_bits, x_signed).low, x.dim()
    # Every sum is an integer below 2**53, for any weight that fits a memory: exact in float64, in any order.
    codes = looked_up(x, table).to(torch.float64) - zero
    weight = integers(w, tuple(shape)).to(torch.float64)
    total = CONVOLUTIONS[rank](codes, weight, None, stride, padding, dilation, groups)
    return finished(total, x_scale * w_scale, bias, rank - 2, low, high, step, bits, signed, fraction)


def looked_up(x: Tensor, table: Tensor | None) -> Tensor:
    """Return what a table says of codes; the codes where there is none."""
    return x if table is None else torch.ops.octav.lookup.default(x, table)


def finished(
    total: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    trailing: int,
    low: float | None,
    high: float | None,
    step: Tensor | None,
    bits: int,
    signed: bool,
    fraction: int,
) -> Tensor:
    """Return what follows the sums of integers [..., O, *trailing axes]: see integer_conv."""
    if not is_integer(bias):
        return ended(scaled(total, scale, bias, trailing), low, high, step, bits, signed)
    sums = (total + per_channel(bias.to(total.dtype) / 2**fraction, trailing)).to(torch.float32)
    if step is None:
        return ended(sums * per_channel(scale, trailing), low, high, None, bits, signed)
    codes, grid = (sums * per_channel(scale / step, trailing)).round(), Grid(bits, signed)
    return (codes.clamp(*code_bounds(low, high, step, grid)) - grid.low).to(torch.uint8)


def scaled(total: Tensor, scale: Tensor, bias: Tensor | None, trailing: int) -> Tensor:
    """Return sums of integers [..., O, *trailing axes] -> f32(total) * scale + bias."""
    y = total.to(torch.float32) * per_channel(scale, trailing)
    return y if bias is None else y + per_channel(bias.to(torch.float32), trailing)


def ended(y: Tensor, low: float | None, high: float | None, step: Tensor | None, bits: int, signed: bool) -> Tensor:
    """Return the clamp of y [...], and its codes where there is a step."""
    if step is None:
        return y if low is None and high is None else y.clamp(low, high)
    grid = Grid(bits, signed)
    low, high = clamped(low, high, grid, float(step))
    y = y if low is None and high is None else y.clamp(low, high)
    return (y * (1 / step) - grid.low).round().clamp(0, grid.high - grid.low).to(torch.uint8)


def per_channel(value: Tensor, trailing: int) -> Tensor:
    """[] or [O] -> what broadcasts along the axis before the trailing ones."""
    return value if value.dim() == 0 else value.reshape(-1, *[1] * trailing)


def check(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    shape: list[int],
    bias: Tensor | None,
    table: Tensor | None = None,
) -> None:
    """Raise OctavError for operands that are no codes, or whose scales or table do not fit them."""
    if x.dtype is not torch.uint8 or w.dtype not in (torch.uint8, torch.int8):
        raise OctavError(f"codes are uint8, those of a weight int8 or packed in uint8, not {x.dtype} and {w.dtype}")
    if x_scale.dim() or w_scale.shape not in ((), (shape[0],)) or (bias is not None and bias.shape != (shape[0],)):
        given = None if bias is None else tuple(bias.shape)
        raise OctavError(
            f"a weight {tuple(shape)} takes scales [] and [{shape[0]}] and a bias [{shape[0]}], not "
            f"{tuple(x_scale.shape)}, {tuple(w_scale.shape)} and {given}"
        )
    if table is not None and (table.dtype is not torch.uint8 or table.shape != (256,)):
        raise OctavError(f"a table of {table.dtype} {tuple(table.shape)} where codes are looked up in uint8 [256]")
