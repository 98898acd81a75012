"""optimal_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.quant.axis import clip_shape, to_rows
from octav_fx.quant.grid import Grid
from octav_fx.quant.solver import METHODS


def optimal_clip(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    """X [...] floating point, hint [] or [C] -> clip [] or [C], float32, in the units of x.

    Half-precision x is solved in float32, float64 in float64.
    """
    rows = to_rows(x, dim)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    clip = METHODS[method](rows, hint.reshape(-1), Grid(bits, signed))
    return clip.to(torch.float32).reshape(clip_shape(x, dim))
