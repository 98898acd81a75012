"""A percentile of the magnitudes as clip: 99.9, 99.99 or 99.999 % (Wu et al., arXiv 2004.09602)."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from octav_fx.formats.format import magnitudes
from octav_fx.formats.grid import Grid

# One in so many values lies beyond the clip.
ONE_IN: Final = {
    "percentile": 1000,
    "percentile-99.9": 1000,
    "percentile-99.99": 10_000,
    "percentile-99.999": 100_000,
}


def percentile(one_in: int) -> Callable[[Tensor, Tensor, Grid], Tensor]:
    """Return the method that lets one in so many values lie beyond the clip."""

    def clip_of(x: Tensor, hint: Tensor, grid: Grid) -> Tensor:
        """Return the least magnitude that n // one_in of the row's n finite values exceed at most: rows [R, N] -> [R].

        Zeros count, as in its source; nothing is interpolated. A row of so many zeros that this is zero gets its
        largest magnitude: a clip of zero would send everything to zero.
        """
        if x.shape[-1] == 0:
            return x.new_zeros(x.shape[:-1])
        largest = magnitudes(x, grid).topk(x.shape[-1] // one_in + 1, -1).values
        beyond = x.isfinite().sum(-1, keepdim=True) // one_in
        clip = largest.gather(-1, beyond).squeeze(-1)
        return torch.where(clip > 0, clip, largest[..., 0])

    return clip_of
