"""synced_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.distributed import all_reduced_clip, has_others
from octav_fx.formats.granularity import clip_shape, to_rows
from octav_fx.formats.grid import Grid
from octav_fx.ops.optimal_clip.reference import optimal_clip


def synced_clip(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    """Map x [...] of this rank, hint [] or [C] -> the clip [] or [C] of what all ranks hold, float32.

    Every rank has to call, in the same order. Where there are no other ranks, that of x.
    """
    if not has_others():
        return optimal_clip(x, hint, bits, signed, dim, method)
    rows = to_rows(x, dim)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    clip = all_reduced_clip(rows, hint.reshape(-1), Grid(bits, signed), method)
    return clip.clamp(max=torch.finfo(torch.float32).max).to(torch.float32).reshape(clip_shape(x, dim))
