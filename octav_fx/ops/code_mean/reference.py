"""code_mean, in pure torch: the definition."""

from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops.code_sum.reference import saturated


def code_mean(
    x: Tensor,
    x_scale: Tensor,
    step: Tensor,
    x_bits: int,
    x_signed: bool,
    bits: int,
    signed: bool,
    keepdim: bool,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Return the codes of the mean over positions: codes uint8 [N, C, H, W] -> uint8 [N, C], or [N, C, 1, 1].

    Codes count from the lowest level of their grids (integer_codes); the scale and the step are [] float32. In float32,
    rne(f32(sum of codes) * (x_scale / (step * positions))); then the codes of the clamp to low .. high, and of the
    grid. It is CodeMean of nn/integer_rule.py.
    """
    positions = x.shape[2] * x.shape[3]
    # An integer, in int64 whatever the size.
    total = x.long().sum((2, 3), keepdim=keepdim) + Grid(x_bits, x_signed).low * positions
    codes = (total.float() * (x_scale / (step * positions))).round()
    return saturated(codes, step, bits, signed, low, high)
