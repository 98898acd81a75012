"""The clip with the least quantization error, by Newton-Raphson (Sakr et al., ICML 2022, arXiv 2206.06501).

Every function here works on rows [R, N] of floating-point values and returns one clip per row, [R], in the units of
x. Zeros do not take part (they cost nothing on any grid), nor do inf and NaN (no clip could represent them).
methods.py holds it beside the clips that others use: percentile.py, mse.py.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from octav_fx.formats.format import magnitudes
from octav_fx.formats.grid import Grid

# Cold Newton needs 13 steps at 8 bits; the rest is for rows of a few elements, where the safeguard has to bisect.
STEPS: Final = 24
# What polish tries, and when it moves: for a thousandth less, so that ties do not depend on the order of sums.
NEIGHBOURS: Final = tuple(1.25 ** (i / 4) for i in (-4, -3, -2, -1, 1, 2, 3, 4))
BETTER: Final = 0.999
FLOOR: Final = 1e-12

NewtonStep = Callable[[Tensor, Tensor, Grid], tuple[Tensor, Tensor]]
Total = Callable[..., tuple[Tensor, ...]]


def octav_step(x: Tensor, clip: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Take one step of the paper's recursion (eq. 6): return its numerator and denominator, [R] each.

    s' = sum(|x| over |x| >= s) / (noise * #{0 < |x| < s} + #{|x| >= s}). Comparing with >= where the paper has >
    keeps a row of one magnitude at that magnitude; with > it would alternate between it and zero.
    """
    magnitude = magnitudes(x, grid)
    clipped = (magnitude >= clip.unsqueeze(-1)) & (magnitude > 0)
    count = clipped.sum(-1)
    inside = (magnitude > 0).sum(-1) - count
    return torch.where(clipped, magnitude, 0).sum(-1), grid.noise * inside + count


def octav_grid_step(x: Tensor, clip: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Take one step on the grid that is really used: return numerator and denominator, [R] each.

    Two terms differ from the paper's. The highest level is k * s with k = 1 - 1 / steps, so values clip there. The
    cell around zero adds no noise to d(error) / d(step); instead half a step of the density at its edge does
    (Euler-Maclaurin), counted as the elements with step / 4 < |x| <= 3 * step / 4:

    s' = (sum(|x| over x <= -s) + k * sum(x over x >= k * s))
         / (noise * (#{|x| > step / 2, not clipped} + #{step / 4 < |x| <= 3 * step / 4})
            + #{x <= -s} + k**2 * #{x >= k * s})
    """
    x = torch.where(x.isfinite(), x, 0)
    magnitude = magnitudes(x, grid)
    clip = clip.unsqueeze(-1)
    step, k = grid.step(clip), 1 - 1 / grid.steps
    above = (x >= k * clip) & (x > 0)
    below = (x <= -clip) & (x < 0) if grid.signed else torch.zeros_like(above)
    rounded = (magnitude > step / 2) & ~above & ~below
    edge = (magnitude > step / 4) & (magnitude <= step * 3 / 4)
    numerator = torch.where(below, magnitude, 0).sum(-1) + k * torch.where(above, magnitude, 0).sum(-1)
    noise = grid.noise * (rounded.sum(-1) + edge.sum(-1))
    return numerator, noise + below.sum(-1) + k**2 * above.sum(-1)


def local_sums(*sums: Tensor) -> tuple[Tensor, ...]:
    """Return the sums as they are: this process holds all of the tensor. clips/distributed.py adds over ranks."""
    return sums


def mean_magnitude(x: Tensor, grid: Grid, total: Total = local_sums) -> Tensor:
    """Return the mean magnitude of the non-zeros, [R]; 0 where there are none."""
    magnitude = magnitudes(x, grid)
    sums, count = total(magnitude.sum(-1), (magnitude > 0).sum(-1))
    return sums / count.clamp(min=1)


def newton(x: Tensor, mean: Tensor, hint: Tensor, grid: Grid, step: NewtonStep, total: Total = local_sums) -> Tensor:
    """Return the fixed point of a recursion, [R], in a fixed number of steps; without ranks the host waits for nothing.

    Starts at hint [R] where it is positive and finite, else at mean [R], the mean magnitude of the non-zeros (the
    paper's start, section 4), and returns there from a hint beyond every value. The fixed point of eq. 6 does not
    depend on the hint. octav_grid_step has a few close to each other where counts jump, so that at 2 to 4 bits a few
    rows in a hundred end, from another hint, at another one, whose error is the same to a thousandth in long rows.
    A bracket [low, high] with step(low) >= low and step(high) < high safeguards the iteration: where counts jump, plain
    Newton can alternate between two values around the crossing; then the bracket is halved.
    """
    clip = torch.where((hint > 0) & hint.isfinite(), hint.to(mean.dtype), mean)
    low, high = torch.zeros_like(clip), torch.full_like(clip, torch.inf)
    for _ in range(STEPS):
        numerator, denominator = total(*step(x, clip, grid))
        target = torch.where(numerator > 0, numerator / denominator.clamp(min=torch.finfo(clip.dtype).tiny), 0)
        # A collective costs more than to look: from a fixed point nothing moves any more.
        if total is not local_sums and torch.equal(target, clip):
            break
        rises = target >= clip
        low, high = torch.where(rises, clip, low), torch.where(rises, high, clip)
        inward = ((target > low) & (target < high)) | (target == clip)
        restart = torch.where((numerator == 0) & (mean > low) & (mean < high), mean, (low + high) / 2)
        clip = torch.where(inward, target, restart)
    return torch.where(mean > 0, clip, 0)


def octav(x: Tensor, hint: Tensor, grid: Grid, total: Total = local_sums) -> Tensor:
    """Return the paper's clip (eq. 6)."""
    return newton(x, mean_magnitude(x, grid, total), hint, grid, octav_step, total)


def octav_tight(x: Tensor, hint: Tensor, grid: Grid, total: Total = local_sums) -> Tensor:
    """Return the paper's clip where a rounding error costs four times what a clipping error does: that of one bit less.

    Both count alike in eq. 4. In training they may not: what is clipped is clipped again in the next step, and the
    layers around it learn with it, while what is rounded is noise to them. The noise term of eq. 6 is then
    4 * 4**-B / 3.
    """
    return octav(x, hint, Grid(grid.bits - 1, grid.signed), total)


def as_octav(bits: int, method: str) -> tuple[int, str]:
    """Return bits and method as kernels know them: "octav-tight" is "octav" for one bit less."""
    return (bits - 1, "octav") if method == "octav-tight" else (bits, method)


def octav_grid(x: Tensor, hint: Tensor, grid: Grid, total: Total = local_sums) -> Tensor:
    """Return the clip for the two's-complement or unsigned grid itself: the fixed point or the best of its neighbours.

    A hint whose first cell swallows the mean magnitude belongs to another fixed point, the one that gives up the bulk
    for a few outliers; from there the start is cold.
    """
    mean = mean_magnitude(x, grid, total)
    hint = torch.where(grid.step(hint) / 2 <= mean, hint, 0)
    return refine(x, newton(x, mean, hint, grid, octav_grid_step, total), grid, total)


def refine(x: Tensor, clip: Tensor, grid: Grid, total: Total = local_sums) -> Tensor:
    """Return the one of NEIGHBOURS * clip, [R], with the least squared error on the grid; the clip if none is better.

    Where a density has a peak (the minimum of GELU) or a row is short, the error ripples as levels pass over it, and
    the fixed point, which takes densities for smooth, can lie beside a dip: 4 % above the least error for GELU at 6
    bits, 15 % at 8.
    """
    x = torch.where(x.isfinite(), x, 0)
    neighbours = [clip * ratio for ratio in NEIGHBOURS]
    errors = [squared_error(x, tried, grid) for tried in (clip, *neighbours)]
    square, least, *errors = total(x.square().sum(-1), *errors)
    # Rounding is no reason to move: errors below this are zero for float32.
    floor = FLOOR * square
    best = clip
    for tried, error in zip(neighbours, errors, strict=True):
        better = error < BETTER * least - floor
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def squared_error(x: Tensor, clip: Tensor, grid: Grid) -> Tensor:
    """Sum of squared rounding and clipping errors of each row, [R]; NaN for a clip of zero."""
    step = grid.step(clip).unsqueeze(-1)
    return ((x / step).round().clamp(grid.low, grid.high) * step - x).square().sum(-1)


def power_of_two(extent: Tensor) -> Tensor:
    """Return a power of two near a largest magnitude [...]: dividing by it is exact, and then no sum overflows."""
    return torch.exp2(torch.frexp(extent).exponent.clamp(-100, 100).to(extent.dtype))


def max_abs(x: Tensor, hint: Tensor, grid: Grid) -> Tensor:
    """Return the largest magnitude: no clipping, the usual default elsewhere."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return magnitudes(x, grid).amax(-1)
