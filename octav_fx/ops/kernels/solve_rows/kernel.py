"""clips/newton.py in Triton, one row for each program, which keeps the row in registers for all steps if it fits.

A longer row is read again in each step, from the cache next to the program as far as that holds it.
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from octav_fx.clips import newton
from octav_fx.formats.granularity import clip_shape, to_rows
from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import FLOATS, nearest

METHODS: Final = ("octav", "octav-grid", "max")
# The longest row that is kept: 32 registers for each of 512 threads.
LONGEST: Final = 2**14

MAX = tl.constexpr(METHODS.index("max"))
ON_GRID = tl.constexpr(METHODS.index("octav-grid"))
_STEPS = tl.constexpr(newton.STEPS)
_NEIGHBOURS = tl.constexpr(newton.NEIGHBOURS)
_BETTER = tl.constexpr(newton.BETTER)
_FLOOR = tl.constexpr(newton.FLOOR)


@triton.jit
def tile_of(x_ptr, row, start, n, rows, inner, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Elements start .. start + BLOCK of a row of x, which lies as (outer, rows, inner); 0 behind its end."""
    i = start + tl.arange(0, BLOCK)
    # In 64 bits: rows may lie far apart.
    offsets = row * n + i if CONTIGUOUS else (i // inner).to(tl.int64) * rows * inner + row * inner + i % inner
    return tl.load(x_ptr + offsets, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def finite(x, factor):
    """Return the product of x and factor, 0 where x is not finite."""
    return tl.where(tl.abs(x) < float("inf"), x * factor, 0.0)


@triton.jit
def magnitude_of(x, SIGNED: tl.constexpr):
    """Return what can be clipped: newton.magnitudes of finite x."""
    return tl.abs(x) if SIGNED else tl.maximum(x, 0.0)


@triton.jit
def power_of_two(largest):
    """Return a power of two near a largest magnitude [...]: dividing by it is exact, and then no sum overflows."""
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100), 100)
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return down, ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mean_of(total, count):
    """Return the mean magnitude of the non-zeros, float32, from their sum and number."""
    return total.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)


@triton.jit
def step_sums(x, clip, STEPS: tl.constexpr, SIGNED: tl.constexpr, METHOD: tl.constexpr):
    """Return the sums of one step over finite x: clipped below, clipped above (sum, count each), and rounded (count).

    "octav" (arXiv 2206.06501, eq. 6) has only the first; "octav-grid" is newton.octav_grid_step.
    """
    magnitude = magnitude_of(x, SIGNED)
    if METHOD == ON_GRID:
        step = clip * (1.0 / STEPS)
        above = (x >= (1.0 - 1.0 / STEPS) * clip) & (x > 0)
        below = (x <= -clip) & (x < 0) & SIGNED
        rounded = (magnitude > step * 0.5) & (above == 0) & (below == 0)
        edge = (magnitude > step * 0.25) & (magnitude <= step * 0.75)
        noisy = tl.sum(rounded.to(tl.int32) + edge.to(tl.int32))
        sum_above = tl.sum(tl.where(above, magnitude, 0.0))
        count_above = tl.sum(above.to(tl.int32))
    else:
        below = (magnitude >= clip) & (magnitude > 0)
        noisy, sum_above, count_above = 0, 0.0, 0
    return tl.sum(tl.where(below, magnitude, 0.0)), tl.sum(below.to(tl.int32)), sum_above, count_above, noisy


@triton.jit
def fraction(below, n_below, above, n_above, noisy, nonzero, STEPS: tl.constexpr, METHOD: tl.constexpr):
    """Return numerator and denominator of a step, float64, from the sums of all elements."""
    noise: tl.constexpr = 1.0 / (12 * STEPS * STEPS)
    k: tl.constexpr = 1.0 - 1.0 / STEPS
    clipped = n_below.to(tl.float64)
    if METHOD == ON_GRID:
        inside = noisy.to(tl.float64)
        return below + k * above, noise * inside + clipped + k * k * n_above.to(tl.float64)
    return below, noise * (nonzero.to(tl.float64) - clipped) + clipped


@triton.jit
def newton_step(clip, low, high, mean, numerator, denominator):
    """Return the next clip and bracket, float32: the safeguarded iteration of newton.newton."""
    # Divided in float32 and to 2 units of its last place: the slow path of an exact division would need a stack.
    some = numerator > 0
    divisor = tl.where(some, denominator, 1.0).to(tl.float32)
    target = tl.where(some, numerator.to(tl.float32) / divisor, 0.0)
    rises = target >= clip
    low, high = tl.where(rises, clip, low), tl.where(rises, high, clip)
    inward = ((target > low) & (target < high)) | (target == clip)
    middle = tl.where((some == 0) & (mean > low) & (mean < high), mean, (low + high) * 0.5)
    return tl.where(inward, target, middle), low, high


@triton.jit
def start_of(hint, mean, STEPS: tl.constexpr, METHOD: tl.constexpr):
    """Return where Newton starts: at the hint if it is one, else at the mean magnitude."""
    usable = (hint > 0) & (hint < float("inf"))
    if METHOD == ON_GRID:
        usable = usable & (hint * (0.5 / STEPS) <= mean)
    return tl.where(usable, hint, mean)


@triton.jit
def error_of(x, clip, STEPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the sum of squared errors of finite x on the grid of a clip."""
    step = clip * (1.0 / STEPS)
    error = nearest(x, step, LOW, HIGH) * step - x
    return tl.sum(error * error)


@triton.jit
def neighbour(clip, i):
    """Return the clip times the i-th of newton.NEIGHBOURS; the clip itself for -1."""
    ratio = 1.0
    for j in tl.static_range(8):
        ratio = tl.where(i == j, _NEIGHBOURS[j], ratio)
    return clip * ratio


@triton.jit
def chosen(best, least, candidate, error, squares, is_first):
    """Return the better of two clips, and its error: newton.polish."""
    better = is_first | (error < least * _BETTER - squares * _FLOOR)
    return tl.where(better, candidate, best), tl.where(better, error, least)


@triton.jit
def restored(clip, up, mean):
    """Return the clip in the units of the tensor, at most the end of float32; 0 where nothing can be clipped."""
    return tl.where(mean > 0, tl.minimum(clip * up, 3.4028234663852886e38), 0.0)


@triton.jit
def solve_row(
    x_ptr,
    row,
    hint,
    n,
    rows,
    inner,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    FITS: tl.constexpr,
):
    """Return the clip of a row, float32, and the row's first tile as it was read. FITS: that is all of it."""
    held = tile_of(x_ptr, row, 0, n, rows, inner, BLOCK, CONTIGUOUS)
    largest, positive = 0.0, 0.0
    for start in range(0, n, BLOCK):
        x = finite(held if FITS else tile_of(x_ptr, row, start, n, rows, inner, BLOCK, CONTIGUOUS), 1.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
        positive = tl.maximum(positive, tl.max(magnitude_of(x, SIGNED)))
    if METHOD == MAX:
        clip = positive
    else:
        down, up = power_of_two(largest)
        total = tl.zeros((), tl.float64)
        count = tl.zeros((), tl.int64)
        squares = tl.zeros((), tl.float64)
        for start in range(0, n, BLOCK):
            x = finite(held if FITS else tile_of(x_ptr, row, start, n, rows, inner, BLOCK, CONTIGUOUS), down)
            magnitude = magnitude_of(x, SIGNED)
            total += tl.sum(magnitude).to(tl.float64)
            count += tl.sum((magnitude > 0).to(tl.int32))
            squares += tl.sum(x * x).to(tl.float64)
        mean = mean_of(total, count)
        clip = start_of(hint * down, mean, STEPS, METHOD)
        low, high = clip * 0.0, clip * 0.0 + float("inf")
        left = _STEPS + 0
        while left > 0:
            below, above = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
            n_below, n_above, noisy = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
            for start in range(0, n, BLOCK):
                x = finite(held if FITS else tile_of(x_ptr, row, start, n, rows, inner, BLOCK, CONTIGUOUS), down)
                s_below, c_below, s_above, c_above, c_noisy = step_sums(x, clip, STEPS, SIGNED, METHOD)
                below += s_below
                above += s_above
                n_below += c_below
                n_above += c_above
                noisy += c_noisy
            numerator, denominator = fraction(below, n_below, above, n_above, noisy, count, STEPS, METHOD)
            moved, low, high = newton_step(clip, low, high, mean, numerator, denominator)
            # What stands still would do so in all further steps.
            left = tl.where(moved == clip, 0, left - 1)
            clip = moved
        if METHOD == ON_GRID:
            fixed, least = clip, tl.zeros((), tl.float64)
            for i in range(9):
                candidate = neighbour(fixed, i - 1)
                error = tl.zeros((), tl.float64)
                for start in range(0, n, BLOCK):
                    x = finite(held if FITS else tile_of(x_ptr, row, start, n, rows, inner, BLOCK, CONTIGUOUS), down)
                    error += error_of(x, candidate, STEPS, LOW, HIGH)
                clip, least = chosen(clip, least, candidate, error, squares, i == 0)
        clip = restored(clip, up, mean)
    return clip, held


@triton.jit
def solve_rows_kernel(
    x_ptr,
    hint_ptr,
    clip_ptr,
    n,
    rows,
    inner,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    FITS: tl.constexpr,
):
    """x: (outer, rows, inner) as it lies in memory, n = outer * inner. hint, clip: [rows] float32."""
    row = tl.program_id(0).to(tl.int64)
    hint = tl.load(hint_ptr + row)
    clip, _ = solve_row(x_ptr, row, hint, n, rows, inner, STEPS, LOW, HIGH, SIGNED, METHOD, BLOCK, CONTIGUOUS, FITS)
    tl.store(clip_ptr + row, clip)


def solve_rows(
    x: Tensor,
    hint: Tensor,
    bits: int,
    signed: bool,
    dim: int | None,
    method: str,
    *,
    out: Tensor,
    longest: int = LONGEST,
) -> bool:
    """Write the clips into out [C] or []; False where only the reference will do. A tensor with gaps is copied."""
    fits = out.shape == clip_shape(x, dim) and out.is_contiguous() and out.dtype is hint.dtype
    if x.dtype not in FLOATS or method not in METHODS or not fits:
        return False
    hint = cpu.checked(hint, clip_shape(x, dim))
    layout = cpu.channel_layout(x, dim)
    if layout is None:
        x = to_rows(x, dim).contiguous()
        layout = (1, *x.shape)
    outer, rows, inner = layout
    n = outer * inner
    if not x.numel():
        out.zero_()
        return True
    grid, block = Grid(bits, signed), min(triton.next_power_of_2(n), longest)
    if n + block > 2**31:
        return False
    solve_rows_kernel[(rows,)](
        x,
        hint,
        out,
        n,
        rows,
        inner,
        STEPS=grid.steps,
        LOW=grid.low,
        HIGH=grid.high,
        SIGNED=signed,
        METHOD=METHODS.index(method),
        BLOCK=block,
        CONTIGUOUS=outer == 1 or rows == 1,
        FITS=n <= block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return True
