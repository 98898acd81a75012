"""fake_quantize_weights, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.ops.fake_quantize.reference import fake_quantize
from octav_fx.ops.optimal_clip.reference import optimal_clip


def fake_quantize_weights(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Weights [...], hints [C] -> (each weight on the grid of its own optimal clips [...], all those clips [sum of C]).

    A spec is given for each weight: signed integers with one clip for each channel. With a dtype: the levels in that.
    """
    given = list(zip(weights, hints, specs, strict=True))
    clips = [optimal_clip(w, hint, spec, method) for w, hint, spec in given]
    quantized = [fake_quantize(w, clip, spec, "ste", dtype) for (w, _, spec), clip in zip(given, clips, strict=True)]
    return quantized, torch.cat(clips) if clips else torch.zeros(0)
