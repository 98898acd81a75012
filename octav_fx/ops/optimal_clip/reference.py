"""optimal_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.methods import solve
from octav_fx.clips.newton import power_of_two
from octav_fx.formats.spec import spec_of


def optimal_clip(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    """Find the clip with the least quantization error (arXiv 2206.06501, eq. 6), from scratch.

    Half-precision x is solved in float32, float64 in float64.
    """
    represented = spec_of(spec)
    rows = represented.granularity.rows(x)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    # Numbers of a format for scales are what they are only in the units of x.
    scale = _scale(rows) if represented.scale == "float32" else torch.ones_like(rows[:, :1])
    known = rows.new_zeros(len(rows)) if represented.granularity.is_short else hint.reshape(-1)
    clip = solve(rows / scale, known / scale.squeeze(-1), represented, method) * scale.squeeze(-1)
    # The grid of values near the end of float32 may need a clip beyond it.
    clip = clip.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
    return represented.granularity.of_rows(clip, x.shape)


def _scale(rows: Tensor) -> Tensor:
    """[R, N] -> [R, 1]."""
    if rows.shape[-1] == 0:
        return rows.new_ones(rows.shape[0], 1)
    return power_of_two(torch.where(rows.isfinite(), rows.abs(), 0).amax(-1, keepdim=True))
