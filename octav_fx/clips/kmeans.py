"""The levels with the least squared error of all: k-means in one dimension, where the optimum can be computed.

The elements of a level are neighbours in the sorted tensor. So the best levels follow from the best places to cut it,
which dynamic programming finds (Wang and Song, The R Journal 3/2, 2011): the least error of the first j elements on k
levels is the least over i of that of the first i on k - 1 plus that of the elements i .. j around their mean. Of a
tensor with many elements the cuts are tried at some hundred places only, and Lloyd's steps move them from there.
"""

from typing import Final

import torch
from torch import Tensor

# Parts between places that are tried; a tensor of so few elements is cut anywhere, and its levels are the best.
PARTS: Final = 128
LLOYD_STEPS: Final = 2


def kmeans(x: Tensor, count: int) -> Tensor:
    """Return so many levels [count], ascending, for the finite elements of x [N]; zeros where there are none.

    Computed in float64: the levels of a tensor are the same in whatever order its elements are.
    """
    ordered = _ascending(torch.where(x.isfinite(), x, torch.inf)).double()
    there = ordered.isfinite()
    finite = torch.where(there, ordered, 0)
    if not x.numel():
        return x.new_zeros(count)
    counts, sums, squares = (_before(values) for values in (there.double(), finite, finite.square()))
    last = (there.sum() - 1).clamp(min=0)

    def means(cuts: Tensor) -> tuple[Tensor, Tensor]:
        many = counts[cuts].diff()
        return sums[cuts].diff() / many.clamp(min=1), many > 0

    cuts = _best_cuts(_places(ordered, there), counts, sums, squares, count)
    mean, any_there = means(cuts)
    # A level without elements is laid upon the next element.
    levels = torch.where(any_there, mean, finite[cuts[:-1].minimum(last)])
    for _ in range(LLOYD_STEPS):
        inner = torch.searchsorted(ordered, (levels[:-1] + levels[1:]) / 2)
        mean, any_there = means(torch.cat([cuts[:1], inner, cuts[-1:]]))
        levels = torch.where(any_there, mean, levels)
    return levels.to(x.dtype)


def _ascending(x: Tensor) -> Tensor:
    """Return float32 or float64 numbers [N] in ascending order; NaN is none.

    By their bits, as integers in the order of the numbers: a CPU sorts those in a fifteenth of the time.
    """
    whole = torch.iinfo(torch.int32 if x.dtype is torch.float32 else torch.int64)

    def turned(bits: Tensor) -> Tensor:
        # Of two negative numbers the one with the greater magnitude is the lower. Done twice it is undone.
        return bits ^ (bits >> whole.bits - 1 & whole.max)

    return turned(turned(x.view(getattr(torch, whole.dtype))).sort().values).view(x.dtype)


def _before(values: Tensor) -> Tensor:
    """Return the sums of the values [N] before each place [N + 1]."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _places(ordered: Tensor, there: Tensor) -> Tensor:
    """Return places between elements at which to try a cut, ascending, from 0 to N.

    Where values are dense, the best levels are as dense as the cube root of their density (Panter and Dite, 1951): so
    many levels lie in a gap between two elements as its width to the power of two thirds, and so many places.
    """
    n = len(ordered)
    if n <= PARTS:
        return torch.arange(n + 1, device=ordered.device)
    gaps = torch.where(there[1:], ordered.diff(), 0)
    passed = _before(gaps.pow(2 / 3))
    inner = torch.searchsorted(passed, passed[-1] * torch.arange(1, PARTS, device=ordered.device) / PARTS)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), n)])


def _best_cuts(places: Tensor, counts: Tensor, sums: Tensor, squares: Tensor, count: int) -> Tensor:
    """Return the places [count + 1], from the first to the last, between which the levels have the least error."""
    many, total, square = (of[places].unsqueeze(0) - of[places].unsqueeze(1) for of in (counts, sums, squares))
    # Of the elements between two places, around their mean.
    errors = torch.where(many >= 0, square - total.square() / many.clamp(min=1), torch.inf)
    least, choices = errors[0], []
    for _ in range(count - 1):
        least, choice = (least.unsqueeze(1) + errors).min(0)
        choices.append(choice)
    at = [torch.full_like(places[0], len(places) - 1)]
    for choice in reversed(choices):
        at.append(choice[at[-1]])
    return places[torch.stack([torch.zeros_like(at[0]), *reversed(at)])]
