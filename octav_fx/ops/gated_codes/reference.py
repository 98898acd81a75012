"""gated_codes, in pure torch: the definition."""

from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops.integer_codes.reference import integer_codes


def gated_codes(
    x: Tensor, x_scale: Tensor, gate: Tensor, step: Tensor, x_bits: int, x_signed: bool, bits: int, signed: bool
) -> Tensor:
    """Return the codes of levels times a factor, codes uint8 [N, C, H, W] and float32 [N, C, 1, 1] -> uint8.

    Codes count from the lowest level of their grids (integer_codes); the scale and the step are [] float32.
    """
    return integer_codes((x.float() + Grid(x_bits, x_signed).low) * x_scale * gate, step, bits, signed)
