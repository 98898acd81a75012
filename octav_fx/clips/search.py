"""The clip with the least squared error on any levels, by trying: for short rows, and for levels that are not even.

The paper's recursion takes densities for smooth and levels for evenly spaced. A row of 16 to 256 elements has no
density: there its clip is no better than the largest magnitude, 1.15 of the least error for rows of 64. The error as a
function of the step has as many dips as elements times levels. A candidate is worth the bottom of the dip in which it
lies: for its codes q and what they are off, o = x / step - q, the step of least squares is <x, q> / <q, q> =
step * (1 + <o, q> / <q, q>), and the error there step**2 * (<o, o> - <o, q>**2 / <q, q>). So there are as many
candidates as dips in which the best step may be, see candidates(), not as many as would come near the bottom of each.

This is the definition to the bit, so each sum has an order that kernels can follow: see folded().
"""

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.clips.newton import power_of_two
from octav_fx.formats.codebook import Codebook
from octav_fx.formats.floats import FloatFormat
from octav_fx.formats.format import Format, divided
from octav_fx.formats.grid import Grid

# Formats of scales with so few numbers that each one near is tried as it is: a step of least squares cannot be stored.
COARSE: Final = ("e8m0", "e4m3")
# Of these 1.06 times the one before: no E4M3 is passed over, whose neighbours are 1.07 to 1.14 times as large.
COARSE_RATIO: Final = 1.06
# The probability that the best of the steps which clip nothing lies above the greatest that is tried.
MISSED: Final = 0.06
# Of how many values at most: of longer rows many may be near zero, or equal, as those of a GELU at its minimum.
DIFFERENT: Final = 20
# Candidates put the largest value on each level, and half-way between neighbours: places that are so many steps apart.
# Where that would be more candidates than POINTS, only every second place is tried, or every fourth, and so on.
MOVED: Final = 0.5
POINTS: Final = 38
# From so many levels on the least error hangs on the largest value no more than on others: none is put half-way.
FINE: Final = 63
# By the levels above zero the least step, as a share of the one that clips nothing: long rows of few levels clip far
# more than others.
LEAST: Final = {1: 0.08, 3: 0.2, 7: 0.35, 15: 0.45}
LEAST_OF_MORE: Final = 0.6
# From where the greatest is so many times as large on, each candidate is 1 + WIDE_RATIO / sqrt(levels) times the next.
WIDE: Final = 2.5
WIDE_RATIO: Final = 0.25
# Of floating-point levels, whose errors are as large as the values, the largest value costs most: it lies so near to a
# level, by the bits of the mantissa and as a share of the distance to the next.
BESIDE: Final = {1: (-0.2, 0.0, 0.2), 2: (-0.2, 0.0, 0.2), 3: (-0.125, 0.125)}
# Of three bits and rows of so many elements at most: in the lower half of an octave, where levels are farther apart for
# their size, and in the upper half.
SHORT: Final = 32
BESIDE_OF_SHORT: Final = (-0.1, 0.1), (0.0,)
# Of levels that are not even: an octave above the step that clips nothing floating-point levels are the same again, and
# with the largest magnitude on a lower level, the 3 or 4 of E2M1 in place of its 6, the others may fit better.
OCTAVE: Final = 2.05
# Those that are not floating-point by bits: four have several such levels above the half, two have none.
ABOVE: Final = {2: 1.2, 4: 1.75}
# The ratio of their neighbours less 1 by bits: of four bits about a quarter of that of E2M1's levels.
UNEVEN: Final = {2: 1 / 3, 4: 0.13}
# Those of four bits are finer below this share of the greatest, where most values of a row are, than above.
MOST: Final = 1 / 3
# Candidates in an octave of levels of which each is twice the one before.
IN_OCTAVE: Final = 5
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

    whole, shares = _without_clipping(x, form), candidates(form, scales, x.shape[-1])
    best = stored(divided(largest, form.steps))
    least = squared_error(x, best, form)
    tried = (whole * share for share in shares) if scales in COARSE else [_best_fit(x, whole, shares, form)]
    for step in map(stored, tried):
        error = squared_error(x, step, form)
        is_better = error < least
        best, least = torch.where(is_better, step, best), torch.where(is_better, error, least)
    return (best * form.steps * scale).squeeze(-1)


@functools.cache
def candidates(form: Format, scales: str, n: int) -> tuple[float, ...]:
    """Return the steps to try for rows of n elements, as shares of the one that clips nothing, the greatest first.

    Above that one: n errors of rounding, in steps, are a point of a cube, and by chance it lies in a ball around zero
    as often as the ball is large. For an error below a given one that is step**-n, for the ball shrinks where steps
    grow. Levels move by the reciprocal of the step. So the best of all steps above the one that clips nothing lies
    above its g-fold with the probability g**-(n + 1). Half of the values may be zeros, which fit every step.

    Below it: the largest value is off by 1 - share of itself. That pays while the square is less than what n values
    lose less by rounding. At the step that clips nothing they lose step**2 / 12 each, and three times as much where all
    lie half-way: c = n / (6 * levels**2), in squares of the largest value, is between. At a good step it is half as
    much as at a usual one, so that (1 - share)**2 = c * (1 - share**2 / 2) is where nothing is gained any more.
    """
    greatest, least = _range(form, n)
    if scales == "e8m0":
        # All powers of two that are near, rounded up or down.
        return tuple(2.0**-i for i in range(-2, math.ceil(-math.log2(least)) + 1))
    if scales in COARSE:
        # One that clips nothing is among them when it is rounded down.
        return _geometric(OCTAVE if not isinstance(form, Grid) else greatest * 1.0625, least, COARSE_RATIO)
    if isinstance(form, FloatFormat):
        return tuple(form.greatest / place for place in _beside(form, n, form.greatest / 2, form.greatest / least))
    if _is_doubling(form):
        return _octaves(form, n)
    if not isinstance(form, Grid):
        return _geometric(greatest, least, 1 + UNEVEN[form.bits])
    if greatest / least > WIDE:
        return _geometric(greatest, least, 1 + WIDE_RATIO / math.sqrt(form.high))
    moved = MOVED if form.high < FINE else 2 * MOVED
    while len(places := _places(form.high / greatest, form.high / least, moved)) > POINTS:
        moved *= 2
    return tuple(form.high / place for place in places)


def _range(form: Format, n: int) -> tuple[float, float]:
    """Return the greatest and the least share of candidates()."""
    # Levels that are not even are as far apart at the greatest as so many even ones.
    levels = form.high if isinstance(form, Grid) else 2 ** (form.bits - 1) - 1
    rounding = n / (6 * _where_most_are(form, levels) ** 2)
    lost = rounding / 2 + math.sqrt(rounding**2 / 4 + rounding / 2)
    least = max(1 - lost, LEAST.get(levels, LEAST_OF_MORE))
    if isinstance(form, Grid):
        return min(MISSED ** (-1 / (min(n / 2, DIFFERENT) + 1)), OCTAVE), least
    return ABOVE.get(form.bits, OCTAVE), least


def _where_most_are(form: Format, levels: int) -> float:
    """Return how many levels above zero there would be if they were as dense everywhere as where most values are."""
    if not isinstance(form, Codebook) or isinstance(form, FloatFormat) or form.bits != 4:
        return levels
    return sum(0 < level <= MOST * form.greatest for level in form.table) / MOST


def _is_doubling(form: Format) -> bool:
    """Tell whether each level above zero is twice the one before, several of them."""
    above = [level for level in form.table if level > 0] if isinstance(form, Codebook) else []
    return len(above) > 2 and all(2 * a == b for a, b in pairwise(above))


def _octaves(form: Format, n: int) -> tuple[float, ...]:
    """Return candidates for levels that double, which are the same again an octave below, but for the ends.

    One octave is enough, from where the largest value lies half-way between the two greatest levels on. An octave lower
    it would be off by up to half of itself, for n values below half of the least level at best: where their squares may
    be more than its square, there are two octaves.
    """
    assert isinstance(form, Codebook)
    lost = min(level for level in form.table if level > 0) / 2 / form.greatest
    octaves = 1 if n * lost**2 <= 1 / 4 else 2
    first = [4 / 3 * 2 ** (-(i + 0.5) / IN_OCTAVE) for i in range(IN_OCTAVE)]
    return tuple(share / 2**octave for octave in range(octaves) for share in first)


def _places(first: float, last: float, apart: float) -> list[float]:
    """Return the positive multiples of apart, ascending, from about first on to about last."""
    places = range(max(math.floor(first / apart), 1), math.ceil(last / apart) + 1)
    return [apart * place for place in places]


def _beside(form: FloatFormat, n: int, first: float, last: float) -> list[float]:
    """Return the places from first to last that are beside a level, or beside where it would be, ascending."""
    places, bits = [], form.mantissa_bits
    halves = BESIDE_OF_SHORT if bits == 3 and n <= SHORT else (BESIDE[bits], BESIDE[bits])
    for exponent in range(math.frexp(first)[1] - 1, math.frexp(last)[1]):
        apart = 2.0 ** (exponent - bits)
        for i in range(2**bits):
            places += [2.0**exponent + (i + share) * apart for share in halves[i >> (bits - 1)]]
    return sorted(place for place in places if first <= place <= last)


def _geometric(greatest: float, least: float, ratio: float) -> tuple[float, ...]:
    """Return shares of which each is a ratio of the next, or less, from the greatest to the least."""
    count = math.ceil(math.log(greatest / least) / math.log(ratio)) + 1
    return tuple(greatest * (least / greatest) ** (i / (count - 1)) for i in range(count))


def squared_error(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """Return the sum of squared errors of finite rows [R, N] with steps [R, 1] -> [R, 1].

    Infinite for a step of 0, and for one that its format stores as infinity.
    """
    ratio = x * step.reciprocal()
    error = ratio - form.round(ratio)
    return torch.where((step > 0) & (step < torch.inf), folded(error * error) * (step * step), torch.inf)


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
    above = divided(x.amax(-1, keepdim=True).clamp(min=0), form.greatest)
    if not form.signed:
        return above
    return torch.maximum(above, divided(x.amin(-1, keepdim=True).clamp(max=0), form.least))


def _best_fit(x: Tensor, whole: Tensor, shares: tuple[float, ...], form: Format) -> Tensor:
    """Return the step of least squares [R, 1] for the codes of the candidate which has the least error with it.

    <q, q> is what is left of the squares of x / step = q + o. Its last places do not matter, as they would if the error
    were what is left of the squares of x.
    """
    square, unit = folded(x * x), whole.reciprocal()
    best, least = torch.ones_like(whole), torch.full_like(whole, torch.inf)
    for share in x.new_tensor(shares):
        inverse = unit * share.reciprocal()
        ratio = x * inverse
        level = form.round(ratio)
        off = ratio - level
        error, slope = folded(off * off), folded(off * level)
        levels = square * (inverse * inverse) - slope - slope - error
        gain = torch.where(levels > 0, slope / levels, 0)
        error = (error - slope * gain) * (share * share)
        is_better = error < least
        best, least = torch.where(is_better, share + share * gain, best), torch.where(is_better, error, least)
    return best * whole
