"""The best of 100 clips by the true squared error on the grid (the MSE baseline of arXiv 2206.06501, appendix E)."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from octav_fx.formats.format import magnitudes
from octav_fx.formats.grid import Grid

POINTS: Final = 100
# Intermediate tensors hold about so many elements.
_CHUNK: Final = 2**21
# From so many elements for each level on, sorting a row costs less than going through it for each candidate.
_LONG: Final = 4


def mse_search(x: Tensor, hint: Tensor, grid: Grid) -> Tensor:
    """Return the k / 100 * max|x|, k = 1 .. 100, with the least error, the first of equal ones: rows [R, N] -> [R]."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    clips = magnitudes(x, grid).amax(-1, keepdim=True) * candidates(x)
    x = torch.where(x.isfinite(), x, 0)
    is_long = x.shape[-1] > _LONG * 2**grid.bits
    errors = errors_from_sums(x, clips, grid) if is_long else errors_one_by_one(x, clips, grid)
    return clips.gather(-1, errors.argmin(-1, keepdim=True)).squeeze(-1)


def candidates(x: Tensor) -> Tensor:
    """Return the shares of the largest magnitude that are tried, [100], in the dtype and on the device of x."""
    return torch.arange(1, POINTS + 1, dtype=x.dtype, device=x.device) / POINTS


def errors_one_by_one(x: Tensor, clips: Tensor, grid: Grid) -> Tensor:
    """Return sums of squared errors of finite rows [R, N] for clips [R, K] -> [R, K], float64: the definition."""

    def errors(x: Tensor, step: Tensor) -> Tensor:
        x = x.unsqueeze(-2)
        code = torch.where(step > 0, (x / step).round().clamp(grid.low, grid.high), 0)
        return (code * step - x).square().sum(-1, dtype=torch.float64)

    steps = grid.step(clips).unsqueeze(-1)
    return _by_rows(errors, x, steps, clips.shape[-1] * x.shape[-1])


def errors_from_sums(x: Tensor, clips: Tensor, grid: Grid) -> Tensor:
    """Return the same from sums over each level: the row is sorted once, not gone through for each clip.

    sum((level - x)**2) = sum(x**2) + sum over levels of level**2 * count - 2 * level * sum(x). A value half-way
    between two levels is as far from both, so it does not matter to which one it counts.
    """

    def errors(x: Tensor, step: Tensor) -> Tensor:
        ordered = x.contiguous().sort(-1).values
        sums = torch.nn.functional.pad(ordered.cumsum(-1, dtype=torch.float64), (1, 0))
        codes = torch.arange(grid.low, grid.high + 1, dtype=x.dtype, device=x.device)
        edges = (step * (codes[:-1] + 0.5)).flatten(1)
        inner = torch.searchsorted(ordered, edges).unflatten(-1, (step.shape[-2], -1))
        # Below the lowest level and above the highest there is no edge.
        ends = torch.nn.functional.pad(inner, (0, 1), value=x.shape[-1])
        counts = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))
        until = sums.gather(-1, ends.flatten(1)).view_as(ends)
        totals = until.diff(dim=-1, prepend=torch.zeros_like(until[..., :1]))
        levels = (step * codes).double()
        squares = x.double().square().sum(-1, keepdim=True)
        return squares + (levels * (levels * counts - 2 * totals)).sum(-1)

    steps = grid.step(clips).unsqueeze(-1)
    return _by_rows(errors, x, steps, max(clips.shape[-1] * 2**grid.bits, x.shape[-1]))


def _by_rows(errors: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: Tensor, width: int) -> Tensor:
    """Return the errors of a few rows at a time, so that what they need for each row, width elements, stays small."""

    def parts() -> Iterator[Tensor]:
        rows = max(_CHUNK // width, 1)
        for first in range(0, len(x), rows):
            yield errors(x[first : first + rows], steps[first : first + rows])

    return torch.cat(list(parts())) if len(x) else steps.new_zeros(steps.shape[:-1], dtype=torch.float64)
