"""integer_codes, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid


def integer_codes(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the codes of ops/fake_quantize for finite x [...] and a clip [] or [C]: int8 [...]; signed grids.

    The nearest code of StaticQuantizer, ties to even, counted from the lowest: zero is 2**(bits - 1) on a signed grid.
    inf saturates; NaN gets the lowest code.
    """
    grid = Grid(bits, signed)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    code = (value / scale.to(value.dtype)).round().clamp(grid.low, grid.high) - grid.low
    # What a NaN becomes as an integer is not the same everywhere.
    return torch.where(code > 0, code, 0).to(torch.uint8)
