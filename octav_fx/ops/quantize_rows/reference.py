"""quantize_rows, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.ops.fake_quantize.reference import fake_quantize
from octav_fx.ops.optimal_clip.reference import optimal_clip
from octav_fx.ops.quantize.reference import quantize


def quantize_rows(
    x: Tensor, spec: str, method: str, dtype: torch.dtype, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Map x [...] -> (x on the grid of the clips of its tokens or groups [...], these clips).

    dtype says what that is: levels, of a floating-point dtype, as fake_quantize returns them; or codes, of the integers
    of the format, as quantize does, ceiling included.
    """
    clip = optimal_clip(x, x.new_zeros(()), spec, method)
    if dtype.is_floating_point:
        return fake_quantize(x, clip, spec, "ste", dtype), clip
    return quantize(x, clip, spec, ceiling), clip
