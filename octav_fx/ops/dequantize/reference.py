"""dequantize, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid


def dequantize(codes: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return codes [...] from quantize, clip [] or [C] -> the levels [...] in dtype; what was not finite is NaN.

    dequantize(quantize(x, clip), clip) equals fake_quantize(x, clip) exactly where x is finite, but for the sign of
    a zero.
    """
    grid = Grid(bits, signed)
    value = torch.promote_types(dtype, torch.float32)
    code = codes if signed else torch.where(codes >= grid.ceiling_flag, codes - grid.ceiling_flag, codes)
    level = code.clamp(grid.low, grid.high).to(value) * grid.step(along(clip, codes, dim).to(value))
    return torch.where(codes == torch.iinfo(codes.dtype).min, torch.nan, level).to(dtype)
