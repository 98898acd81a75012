"""integer_linear, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops.integer_conv.reference import check, finished, looked_up
from octav_fx.ops.onednn import integers


def integer_linear(
    x: Tensor,
    x_scale: Tensor,
    x_bits: int,
    x_signed: bool,
    w: Tensor,
    w_scale: Tensor,
    shape: list[int],
    bias: Tensor | None,
    low: float | None = None,
    high: float | None = None,
    step: Tensor | None = None,
    bits: int = 8,
    signed: bool = False,
    fraction: int = 0,
    table: Tensor | None = None,
) -> Tensor:
    """Return codes x uint8 [..., K] and w of a shape [O, K] -> float32, or codes uint8 [..., O]: as integer_conv."""
    check(x, w, x_scale, w_scale, shape, bias, table)
    codes = looked_up(x, table).to(torch.float64) + Grid(x_bits, x_signed).low
    total = codes @ integers(w, tuple(shape)).to(torch.float64).t()
    return finished(total, x_scale * w_scale, bias, 0, low, high, step, bits, signed, fraction)
