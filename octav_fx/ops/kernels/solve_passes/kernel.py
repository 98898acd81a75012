"""clips/newton.py in Triton for one large row: each step is a launch, which exits at once when the clip stands still.

Every program leaves its sums in a place of its own; the last one to finish, by a ticket, adds them in their order and
makes the step. So nothing waits, the host reads nothing, and the same tensor gives the same bits.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.clips import newton
from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import FLOATS
from octav_fx.ops.kernels.solve_rows.kernel import (
    MAX,
    METHODS,
    chosen,
    error_of,
    finite,
    fraction,
    magnitude_of,
    mean_of,
    neighbour,
    newton_step,
    power_of_two,
    restored,
    start_of,
    step_sums,
    tile_of,
)

BLOCK: Final = 4096
# For each multiprocessor of a GPU: enough to hide the loads of one behind the sums of another.
PROGRAMS: Final = 2
# Where there is no GPU the interpreter runs one program after the other.
INTERPRETED: Final = 3

LARGEST = tl.constexpr(0)
START = tl.constexpr(1)
STEP = tl.constexpr(2)
POLISH = tl.constexpr(3)
# What numbers hold, float64, and counters, int64.
CLIP, LOW_END, HIGH_END, MEAN, DOWN, UP, SQUARES = (tl.constexpr(i) for i in range(7))
TICKET, LEFT, NONZERO = (tl.constexpr(i) for i in range(3))
_STEPS = tl.constexpr(newton.STEPS)
# The launches of each method.
PASSES: Final = {
    "octav": (LARGEST, START, *[STEP] * newton.STEPS),
    "octav-grid": (LARGEST, START, *[STEP] * newton.STEPS, POLISH),
    "max": (LARGEST,),
}


@triton.jit
def is_last_of(ticket_ptr, programs):
    """Tell whether all others of so many programs have stored what they had to; resets the ticket then."""
    # All threads' stores come before the ticket of one.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def is_last(counters_ptr):
    """Tell whether all other programs of the launch have stored what they had to; resets the ticket then."""
    return is_last_of(counters_ptr + TICKET, tl.num_programs(0))


@triton.jit
def leave(partials_ptr, i, value):
    """Store the i-th result of this program."""
    tl.store(partials_ptr + i * tl.num_programs(0) + tl.program_id(0), value.to(tl.float64))


@triton.jit
def left_by_all(partials_ptr, i, PROGRAMS: tl.constexpr):
    """Return the i-th result of all programs, [PROGRAMS], 0 behind the last."""
    lanes = tl.arange(0, PROGRAMS)
    mask = lanes < tl.num_programs(0)
    # Past the cache of this multiprocessor, which does not see what others store.
    return tl.load(partials_ptr + i * tl.num_programs(0) + lanes, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def solve_pass_kernel(
    x_ptr,
    hint_ptr,
    clip_ptr,
    numbers_ptr,
    counters_ptr,
    partials_ptr,
    n,
    PASS: tl.constexpr,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """x: [n] as it lies in memory. hint, clip: [1] float32. partials: [9, programs] float64."""
    # Counted in tiles: 31 bits hold their number whatever n is.
    width = tl.full((), BLOCK, tl.int64)
    first, tiles, stride = tl.program_id(0), ((width + n - 1) // BLOCK).to(tl.int32), tl.num_programs(0)
    down = tl.load(numbers_ptr + DOWN).to(tl.float32)
    clip = tl.load(numbers_ptr + CLIP).to(tl.float32)

    if PASS == LARGEST:
        largest = 0.0
        for tile in range(first, tiles, stride):
            x = finite(tile_of(x_ptr, 0, tile * width, n, 1, 1, BLOCK, True), 1.0)
            largest = tl.maximum(largest, tl.max(magnitude_of(x, SIGNED) if METHOD == MAX else tl.abs(x)))
        leave(partials_ptr, 0, largest)
        if is_last(counters_ptr):
            largest = tl.max(left_by_all(partials_ptr, 0, PROGRAMS)).to(tl.float32)
            if METHOD == MAX:
                tl.store(clip_ptr, largest)
            else:
                down, up = power_of_two(largest)
                tl.store(numbers_ptr + DOWN, down.to(tl.float64))
                tl.store(numbers_ptr + UP, up.to(tl.float64))

    elif PASS == START:
        total, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
        count = tl.zeros((), tl.int64)
        for tile in range(first, tiles, stride):
            x = finite(tile_of(x_ptr, 0, tile * width, n, 1, 1, BLOCK, True), down)
            magnitude = magnitude_of(x, SIGNED)
            total += tl.sum(magnitude).to(tl.float64)
            count += tl.sum((magnitude > 0).to(tl.int32))
            squares += tl.sum(x * x).to(tl.float64)
        leave(partials_ptr, 0, total)
        leave(partials_ptr, 1, count)
        leave(partials_ptr, 2, squares)
        if is_last(counters_ptr):
            count = tl.sum(left_by_all(partials_ptr, 1, PROGRAMS)).to(tl.int64)
            total = tl.sum(left_by_all(partials_ptr, 0, PROGRAMS))
            mean = mean_of(total, count)
            clip = start_of(tl.load(hint_ptr) * down, mean, STEPS, METHOD)
            tl.store(numbers_ptr + CLIP, clip.to(tl.float64))
            tl.store(numbers_ptr + HIGH_END, float("inf"))
            tl.store(numbers_ptr + MEAN, mean.to(tl.float64))
            tl.store(numbers_ptr + SQUARES, tl.sum(left_by_all(partials_ptr, 2, PROGRAMS)))
            tl.store(counters_ptr + LEFT, _STEPS)
            tl.store(counters_ptr + NONZERO, count)

    elif PASS == STEP:
        left = tl.load(counters_ptr + LEFT)
        if left > 0:
            below, above = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
            n_below, n_above, noisy = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
            for tile in range(first, tiles, stride):
                x = finite(tile_of(x_ptr, 0, tile * width, n, 1, 1, BLOCK, True), down)
                s_below, c_below, s_above, c_above, c_noisy = step_sums(x, clip, STEPS, SIGNED, METHOD)
                below += s_below
                above += s_above
                n_below += c_below
                n_above += c_above
                noisy += c_noisy
            leave(partials_ptr, 0, below)
            leave(partials_ptr, 1, n_below)
            leave(partials_ptr, 2, above)
            leave(partials_ptr, 3, n_above)
            leave(partials_ptr, 4, noisy)
            if is_last(counters_ptr):
                below = tl.sum(left_by_all(partials_ptr, 0, PROGRAMS))
                n_below = tl.sum(left_by_all(partials_ptr, 1, PROGRAMS)).to(tl.int64)
                above = tl.sum(left_by_all(partials_ptr, 2, PROGRAMS))
                n_above = tl.sum(left_by_all(partials_ptr, 3, PROGRAMS)).to(tl.int64)
                noisy = tl.sum(left_by_all(partials_ptr, 4, PROGRAMS)).to(tl.int64)
                nonzero = tl.load(counters_ptr + NONZERO)
                numerator, denominator = fraction(below, n_below, above, n_above, noisy, nonzero, STEPS, METHOD)
                low = tl.load(numbers_ptr + LOW_END).to(tl.float32)
                high = tl.load(numbers_ptr + HIGH_END).to(tl.float32)
                mean = tl.load(numbers_ptr + MEAN).to(tl.float32)
                moved, low, high = newton_step(clip, low, high, mean, numerator, denominator)
                tl.store(numbers_ptr + CLIP, moved.to(tl.float64))
                tl.store(numbers_ptr + LOW_END, low.to(tl.float64))
                tl.store(numbers_ptr + HIGH_END, high.to(tl.float64))
                # What stands still would do so in all further steps.
                tl.store(counters_ptr + LEFT, tl.where(moved == clip, 0, left - 1))
                tl.store(clip_ptr, restored(moved, tl.load(numbers_ptr + UP).to(tl.float32), mean))

    else:
        lanes = tl.arange(0, 16)
        errors = tl.zeros((16,), tl.float64)
        for tile in range(first, tiles, stride):
            x = finite(tile_of(x_ptr, 0, tile * width, n, 1, 1, BLOCK, True), down)
            for i in range(9):
                error = error_of(x, neighbour(clip, i - 1), STEPS, LOW, HIGH)
                errors += tl.where(lanes == i, error.to(tl.float64), 0.0)
        tl.store(partials_ptr + lanes * tl.num_programs(0) + tl.program_id(0), errors, mask=lanes < 9)
        if is_last(counters_ptr):
            squares, mean = tl.load(numbers_ptr + SQUARES), tl.load(numbers_ptr + MEAN).to(tl.float32)
            best, least = clip, tl.zeros((), tl.float64)
            for i in range(9):
                error = tl.sum(left_by_all(partials_ptr, i, PROGRAMS))
                best, least = chosen(best, least, neighbour(clip, i - 1), error, squares, i == 0)
            tl.store(clip_ptr, restored(best, tl.load(numbers_ptr + UP).to(tl.float32), mean))


def program_count(x: Tensor, block: int) -> int:
    """Return how many programs share a tensor: enough to fill the GPU, and none without a block."""
    blocks = max(1, triton.cdiv(x.numel(), block))
    if not x.is_cuda:
        return min(INTERPRETED, blocks)
    return min(PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count, blocks)


def solve_passes(
    x: Tensor, hint: Tensor, bits: int, signed: bool, method: str, *, out: Tensor, block: int = BLOCK
) -> bool:
    """Write the clip of the whole tensor into out []; False where only the reference will do. Gaps are copied away."""
    if x.dtype not in FLOATS or method not in PASSES or out.shape or out.dtype is not torch.float32:
        return False
    hint = cpu.checked(hint, ())
    x = x if cpu.is_dense(x) else x.contiguous()
    programs = program_count(x, block)
    state = torch.zeros(16, dtype=torch.int64, device=x.device)
    partials = torch.empty((9, programs), dtype=torch.float64, device=x.device)
    grid = Grid(bits, signed)
    for which in PASSES[method]:
        solve_pass_kernel[(programs,)](
            x,
            hint,
            out,
            state[8:].view(torch.float64),
            state,
            partials,
            x.numel(),
            PASS=which,
            STEPS=grid.steps,
            LOW=grid.low,
            HIGH=grid.high,
            SIGNED=signed,
            METHOD=METHODS.index(method),
            BLOCK=block,
            PROGRAMS=triton.next_power_of_2(programs),
            num_warps=8,
        )
    return True
