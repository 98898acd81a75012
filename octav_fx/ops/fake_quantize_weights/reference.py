"""fake_quantize_weights, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.ops.fake_quantize.reference import fake_quantize
from octav_fx.ops.optimal_clip.reference import optimal_clip


def fake_quantize_weights(
    weights: list[Tensor],
    hints: list[Tensor],
    bits: list[int],
    dims: list[int],
    method: str,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Weights [...], hints [C] -> (each weight on the grid of its own optimal clips [...], all those clips [sum of C]).

    bits and dims, the channel axis, are given for each weight; the grids are signed. With a dtype: the levels in that.
    """
    given = list(zip(weights, hints, bits, dims, strict=True))
    clips = [optimal_clip(w, hint, b, True, dim, method) for w, hint, b, dim in given]
    quantized = [
        fake_quantize(w, clip, b, True, dim, "ste", dtype) for (w, _, b, dim), clip in zip(given, clips, strict=True)
    ]
    return quantized, torch.cat(clips) if clips else torch.zeros(0)
