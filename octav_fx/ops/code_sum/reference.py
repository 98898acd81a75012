"""code_sum, in pure torch: the definition."""

from torch import Tensor

from octav_fx.formats.grid import Grid


def code_sum(
    x: Tensor,
    y: Tensor,
    x_scale: Tensor,
    y_scale: Tensor,
    step: Tensor,
    x_bits: int,
    x_signed: bool,
    y_bits: int,
    y_signed: bool,
    bits: int,
    signed: bool,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Return the codes of the sum of two tensors of codes x and y, uint8 [...] -> uint8 [...], as they broadcast.

    Codes count from the lowest level of their grids (integer_codes); scales and the step are [] float32. In float32,
    rne(fma(x_scale / step, x, fma(y_scale / step, y, constant))), where the constant says what zero is; then the codes
    of the clamp to low .. high, and of the grid. It is CodeSum of nn/integer_rule.py.
    """
    zeros = [-Grid(*grid).low for grid in ((x_bits, x_signed), (y_bits, y_signed), (bits, signed))]
    first, second = x_scale / step, y_scale / step
    constant = zeros[2] - (first * zeros[0] + second * zeros[1])
    # Products of 24 and 8 bits are exact in float64, and so are the sums where scales are within 2**20 of each other.
    inner = (second.double() * y.double() + constant.double()).float()
    total = (first.double() * x.double() + inner.double()).float()
    return saturated(total.round() - zeros[2], step, bits, signed, low, high)


def saturated(codes: Tensor, step: Tensor, bits: int, signed: bool, low: float | None, high: float | None) -> Tensor:
    """Return whole numbers in steps [...] as codes of a grid, uint8 [...]: those of levels clamped to low .. high."""
    grid = Grid(bits, signed)
    if low is not None:
        codes = codes.maximum((low / step).round())
    if high is not None:
        codes = codes.minimum((high / step).round())
    return (codes.clamp(grid.low, grid.high) - grid.low).byte()
