"""optimal_clip, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.methods import solve
from octav_fx.formats.format import representable
from octav_fx.formats.spec import spec_of


def optimal_clip(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    """Find the clip with the least quantization error (arXiv 2206.06501, eq. 6), from scratch.

    Half-precision x is solved in float32, float64 in float64.
    """
    represented = spec_of(spec)
    rows = represented.granularity.rows(x)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    known = rows.new_zeros(len(rows)) if represented.granularity.is_short else hint.reshape(-1).to(rows.dtype)
    clip = solve(rows, known, represented, method)
    # The grid of values near the end of float32 may need a clip beyond it, and float64 has levels beyond it.
    return represented.of_rows(representable(clip, torch.float32).to(torch.float32), x.shape)
