"""One step of the paper's recursion from the clip of the last call: sums that Inductor fuses with what computes x."""

from typing import Final

import torch
from torch import Tensor

from octav_fx.clips.newton import as_octav
from octav_fx.formats.format import magnitudes
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of

# The methods that are this recursion.
METHODS: Final = ("octav", "octav-tight")
# A clip that is too large by little costs little; one that is far too small costs everything.
FALL: Final = 0.9


def one_step(x: Tensor, hint: Tensor, spec: str, method: str, dims: list[int] | None = None) -> Tensor:
    """Map x [...] and hint [], the clip of the last call, -> the clip [], float32.

    s' = sum(|x| over |x| >= s) / (noise * #{0 < |x| < s} + #{|x| >= s}), eq. 6 of arXiv 2206.06501, from s = hint; from
    none that is the mean magnitude, where the recursion begins. Near its fixed point the recursion squares the distance
    to it (clips/newton.py). Far above it falls too low, so it falls by a tenth at most, but to the largest magnitude.
    dims: axes that are reduced first.
    """
    grid = spec_of(spec).format
    assert isinstance(grid, Grid)
    solved = Grid(as_octav(grid.bits, method)[0], grid.signed)

    def total(values: Tensor) -> Tensor:
        return values.sum() if dims is None else values.sum(dims).sum()

    magnitude = magnitudes(x.to(torch.float32), solved)
    clipped = (magnitude >= hint) & (magnitude > 0)
    beyond, count = total(torch.where(clipped, magnitude, 0)), total(clipped.to(torch.float32))
    seen = total((magnitude > 0).to(torch.float32))
    largest = magnitude.amax() if dims is None else magnitude.amax(dims).amax()
    step = beyond / (solved.noise * (seen - count) + count).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(step, FALL * hint).minimum(largest)
