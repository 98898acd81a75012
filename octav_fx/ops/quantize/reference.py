"""quantize, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid, nearest


def quantize(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, ceiling: float | None = None) -> Tensor:
    """Map x [...], clip [] or [C] in the units of x -> codes [...]: the nearest, ties to even, and more for backward.

    A value beyond the clip gets a code beyond those of the grid, high + 1 or grid.below: there the gradient is cut.
    On an unsigned grid zero itself gets low - 1, so that codes >= 0 are the values above zero, which is what the
    gradient of a relu asks for; and with a ceiling, that of a clamp that x comes from, the code of a value that has
    reached it is raised by grid.saturated, which is what the gradient of a relu6 asks for.
    inf and NaN get the least number of the dtype.
    """
    grid = Grid(bits, signed)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    bound = along(clip, x, dim).to(value.dtype)
    step = grid.step(bound)
    code = torch.where(step > 0, nearest(value / step, grid), 0)
    code = torch.where(value > bound, grid.high + 1, code)
    code = torch.where(value < (-bound if signed else 0), grid.underflow_code, code)
    if not signed:
        code = torch.where(value == 0, grid.low - 1, code)
        code = torch.where(value >= (torch.inf if ceiling is None else ceiling), code + grid.ceiling_flag, code)
    return torch.where(x.isfinite(), code, torch.iinfo(grid.codes_dtype).min).to(grid.codes_dtype)
