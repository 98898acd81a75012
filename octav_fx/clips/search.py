"""The clip with the least squared error on any levels, by trying: for short rows, and for levels that are not even.

The paper's recursion takes densities for smooth and levels for evenly spaced. A row of 16 to 256 elements has no
density: there its clip is no better than the largest magnitude, 1.15 of the least error for rows of 64. The error as a
function of the step has as many dips as elements times levels; a few candidates find one of the deep ones, and from it
the step of least squares for its codes, <x, q> / <q, q> with q = round(x / step), goes down towards its bottom.

This is the definition to the bit, so each sum has an order that kernels can follow: see folded().
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.clips.newton import power_of_two
from octav_fx.formats.format import Format
from octav_fx.formats.grid import Grid

# Candidates of even levels, and by bits the least of them, as a share of the step that clips nothing, and how they
# crowd at the greatest. Few levels clip far more than many do; of many, the best step is among the last hundredths.
EVEN_POINTS: Final = 17
EVEN_LEAST: Final = {1: (0.05, 1.0), 2: (0.08, 1.0), 3: (0.2, 1.3), 4: (0.35, 1.5), 5: (0.5, 2.0), 6: (0.6, 2.0)}
EVEN_LEAST_OF_MORE: Final = (0.6, 2.5)
# Of other levels: with the largest magnitude on a lower level, the 3 or 4 of E2M1 in place of its 6, the others may
# fit better. Of even levels those that are left over are of no use.
POINTS: Final = 26
LEAST: Final = {2: 0.08, 3: 0.2, 4: 0.4}
LEAST_OF_MORE: Final = 0.5
GREATEST: Final = 2.05
# How much more the greatest of even levels is where scales have so few places that half of them are rounded down: what
# clips nothing is among them then. Where many levels are even clipping by a sixteenth would be nearly all of the error.
ROUNDING: Final = {"bfloat16": 2**-8, "float16": 2**-11, "e4m3": 2**-4}
# The columns of folded().
COLUMNS: Final = 16

# A step -> the nearest one that can be stored. None: every step can.
Store = Callable[[Tensor], Tensor] | None


def search(rows: Tensor, form: Format, scales: str, store: Store) -> Tensor:
    """Return the clips of rows [R, N] -> [R]; 0 where a row has nothing to quantize. Never worse than "max".

    scales names the format of scales, store rounds a step to it.
    """
    if rows.shape[-1] == 0:
        return rows.new_zeros(rows.shape[:-1])
    # Below zero an unsigned grid costs the same whatever the step.
    x = torch.where(rows.isfinite(), rows if form.signed else rows.clamp(min=0), 0)
    largest = x.abs().amax(-1, keepdim=True)
    # No square over- or underflows.
    scale = power_of_two(largest)
    x, largest = x / scale, largest / scale

    def stored(step: Tensor) -> Tensor:
        return step if store is None else store(step * scale) / scale

    whole = _without_clipping(x, form)
    best = stored(largest / form.steps)
    least = squared_error(x, best, form)
    for share in candidates(form, scales):
        best, least = _better(x, stored(whole * share), best, least, form)
    best, _ = _better(x, stored(_least_squares(x, best, form)), best, least, form)
    return (best * form.steps * scale).squeeze(-1)


def candidates(form: Format, scales: str) -> list[float]:
    """Return the steps that are tried, as shares of the one that clips nothing, the greatest first.

    Of powers of two, "e8m0", those are all that are near, rounded up or down.
    """
    if isinstance(form, Grid):
        least, crowded = EVEN_LEAST.get(form.bits, EVEN_LEAST_OF_MORE)
        points, greatest = EVEN_POINTS, 1 + ROUNDING.get(scales, 0)
    else:
        least, crowded = LEAST.get(form.bits, LEAST_OF_MORE), 1.0
        points, greatest = POINTS, GREATEST
    if scales == "e8m0":
        return [2.0**-i for i in range(-2, math.ceil(-math.log2(least)) + 1)]
    return [greatest * (least / greatest) ** ((i / (points - 1)) ** crowded) for i in range(points)]


def squared_error(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """Return the sum of squared errors of finite rows [R, N] with steps [R, 1] -> [R, 1]; infinite for a step of 0."""
    ratio = x * step.reciprocal()
    error = ratio - form.round(ratio)
    return torch.where(step > 0, folded(error * error) * (step * step), torch.inf)


def folded(x: Tensor) -> Tensor:
    """Return the sums of rows [R, N] -> [R, 1], added up in the order of all kernels.

    As N / 16 lines of 16 columns, the last one filled with zeros: the second half of the lines is added to the first,
    an odd one in the middle left alone, until one line is left; then the second half of that to its first. So a vector
    of a processor can hold neighbours of one row as well as elements of sixteen rows, and a GPU can add pairs.
    """
    lines = F.pad(x, (0, -x.shape[-1] % COLUMNS)).unflatten(-1, (-1, COLUMNS))
    while (count := lines.shape[-2]) > 1:
        half = (count + 1) // 2
        added = lines[..., : count - half, :] + lines[..., half:, :]
        lines = torch.cat([added, lines[..., count - half : half, :]], -2) if count % 2 else added
    line = lines.squeeze(-2)
    for _ in range(int(math.log2(COLUMNS))):
        half = line.shape[-1] // 2
        line = line[..., :half] + line[..., half:]
    return line


def _without_clipping(x: Tensor, form: Format) -> Tensor:
    """Return the least step [R, 1] for which no value lies beyond the levels."""
    above = x.amax(-1, keepdim=True).clamp(min=0) / form.greatest
    return torch.maximum(above, x.amin(-1, keepdim=True).clamp(max=0) / form.least) if form.signed else above


def _better(x: Tensor, step: Tensor, best: Tensor, least: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    error = squared_error(x, step, form)
    is_better = error < least
    return torch.where(is_better, step, best), torch.where(is_better, error, least)


def _least_squares(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """Return the step that is best for the codes which this one gives."""
    levels = torch.where(step > 0, form.round(x * step.reciprocal()), 0)
    product, square = folded(x * levels), folded(levels * levels)
    return torch.where((product > 0) & (square > 0), product / square, step)
