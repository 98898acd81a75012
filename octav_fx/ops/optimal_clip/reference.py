"""optimal_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.newton import METHODS, power_of_two
from octav_fx.formats.granularity import clip_shape, to_rows
from octav_fx.formats.grid import Grid


def optimal_clip(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    """Find the clip with the least quantization error (arXiv 2206.06501, eq. 6), from scratch.

    Half-precision x is solved in float32, float64 in float64.
    """
    rows = to_rows(x, dim)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    scale = _scale(rows)
    clip = METHODS[method](rows / scale, hint.reshape(-1) / scale.squeeze(-1), Grid(bits, signed)) * scale.squeeze(-1)
    # The grid of values near the end of float32 may need a clip beyond it.
    return clip.clamp(max=torch.finfo(torch.float32).max).to(torch.float32).reshape(clip_shape(x, dim))


def _scale(rows: Tensor) -> Tensor:
    """[R, N] -> [R, 1]."""
    if rows.shape[-1] == 0:
        return rows.new_ones(rows.shape[0], 1)
    return power_of_two(torch.where(rows.isfinite(), rows.abs(), 0).amax(-1, keepdim=True))
