"""The clip with the least squared error on any levels, by trying: for short rows, and for levels that are not even.

The paper's recursion takes densities for smooth and levels for evenly spaced. A row of 16 to 256 elements has no
density: there its clip is no better than the largest magnitude, 1.15 of the least error for rows of 64. The error as a
function of the step has as many dips as elements times levels; a few candidates find one of the deep ones, and from it
the step of least squares for the codes at hand, <x, q> / <q, q> with q = round(x / step), goes down to its bottom.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from octav_fx.formats.format import Format, magnitudes
from octav_fx.formats.grid import Grid

POINTS: Final = 40
# Bits up to which candidates go down to a share of the step that clips nothing: few levels clip far more than many.
LEAST: Final = ((3, 0.1), (5, 0.3), (8, 0.5))
# The largest candidate where levels are not even, in the same units: with the largest magnitude on a lower level, the
# 3 or 4 of E2M1 in place of its 6, the others may fit better. Of even levels those that are left over are of no use.
GREATEST: Final = 2.05
# How often the codes are chosen anew for the step of least squares.
REFINED: Final = 2

# A step -> the nearest one that can be stored.
Store = Callable[[Tensor], Tensor]


def search(rows: Tensor, form: Format, store: Store) -> Tensor:
    """Return the clips of rows [R, N] -> [R]; 0 where a row has nothing to quantize. Never worse than "max"."""
    if rows.shape[-1] == 0:
        return rows.new_zeros(rows.shape[:-1])
    x = torch.where(rows.isfinite(), rows, 0)
    whole = _without_clipping(x, form)
    best = store(magnitudes(x, form).amax(-1, keepdim=True) / form.steps)
    least = squared_error(x, best, form)
    for share in candidates(form):
        best, least = _better(x, store(whole * share), best, least, form)
    for _ in range(REFINED):
        best, least = _better(x, store(_least_squares(x, best, form)), best, least, form)
    return best.squeeze(-1) * form.steps


def candidates(form: Format) -> list[float]:
    """Return the steps that are tried, as shares of the one that clips nothing, in equal ratios, the greatest first."""
    least = next(share for bits, share in LEAST if form.bits <= bits)
    greatest = 1.0 if isinstance(form, Grid) else GREATEST
    return [greatest * (least / greatest) ** (i / (POINTS - 1)) for i in range(POINTS)]


def squared_error(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """Return the sum of squared errors of finite rows [R, N] with steps [R, 1] -> [R, 1]."""
    return (_round(x, step, form) * step - x).square().sum(-1, keepdim=True)


def _without_clipping(x: Tensor, form: Format) -> Tensor:
    """Return the least step [R, 1] for which no value lies beyond the levels."""
    above = x.amax(-1, keepdim=True).clamp(min=0) / form.greatest
    return torch.maximum(above, x.amin(-1, keepdim=True).clamp(max=0) / form.least) if form.signed else above


def _round(x: Tensor, step: Tensor, form: Format) -> Tensor:
    return torch.where(step > 0, form.round(x / step), 0)


def _better(x: Tensor, step: Tensor, best: Tensor, least: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    error = squared_error(x, step, form)
    is_better = error < least
    return torch.where(is_better, step, best), torch.where(is_better, error, least)


def _least_squares(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """Return the step that is best for the codes which this one gives."""
    levels = _round(x, step, form)
    product, square = (x * levels).sum(-1, keepdim=True), levels.square().sum(-1, keepdim=True)
    return torch.where((product > 0) & (square > 0), product / square, step)
