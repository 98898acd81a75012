"""synced_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.distributed import all_reduced_clip, has_others
from octav_fx.formats.spec import spec_of
from octav_fx.ops.optimal_clip.reference import optimal_clip


def synced_clip(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    """Map x [...] of this rank, hint [] or [C] -> the clip [] or [C] of what all ranks hold, float32.

    Every rank has to call, in the same order. Where there are no other ranks, that of x.
    """
    if not has_others():
        return optimal_clip(x, hint, spec, method)
    represented = spec_of(spec)
    rows = represented.granularity.rows(x)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    clip = all_reduced_clip(rows, hint.reshape(-1), represented, method)
    clip = clip.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
    return represented.granularity.of_rows(clip, x.shape)
