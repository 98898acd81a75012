"""recode, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops.integer_codes.reference import integer_codes


def recode(x: Tensor, x_scale: Tensor, step: Tensor, x_bits: int, x_signed: bool, bits: int, signed: bool) -> Tensor:
    """Return the codes of the levels of codes x, uint8 [...] -> uint8 [...]: integer_codes of their levels.

    Codes count from the lowest level of their grids; the scale and the step are [] float32.
    """
    return integer_codes((x.to(torch.float32) + Grid(x_bits, x_signed).low) * x_scale, step, bits, signed)
