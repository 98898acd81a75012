"""fake_quantize_weights in Triton: a program for each row of each weight, which stays on chip from solve to store.

Where the weights lie is told in arguments of the launch and in no memory: a CUDA graph keeps them, nothing is copied to
the GPU and waited for.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.clips.newton import as_octav
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import FLOATS, nearest, representable
from octav_fx.ops.kernels.solve_rows.kernel import METHODS, solve_row, tile_of

# Rows of up to so many elements are held by so many warps, 4 or 16 elements in the registers of each thread. Longer
# rows are read again in each step, in tiles of the last length, from the cache. A class of its own keeps short rows
# from taking the registers of long ones: many of them run at a time.
CLASSES: Final = ((128, 1), (1024, 2), (8192, 16))
# Weights of one launch, each with three addresses and three numbers: arguments take four kilobytes at most.
AT_ONCE: Final = 32


@triton.jit
def at_weight(values, program, firsts, WEIGHTS: tl.constexpr):
    """Return what a tuple holds for the weight of this program."""
    found = values[0]
    for i in tl.static_range(1, WEIGHTS):
        found = tl.where(program >= firsts[i], values[i], found)
    return found


# Numbers that divide by 16, or are 1, would make a kernel of each network.
@triton.jit(do_not_specialize=["firsts", "offsets", "lengths"])
def fake_quantize_weights_kernel(
    weights,
    outs,
    hints,
    clips_ptr,
    firsts,
    offsets,
    lengths,
    SOLVED_STEPS: tl.constexpr,
    STEPS: tl.constexpr,
    METHOD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FITS: tl.constexpr,
):
    """weights, outs, hints: addresses, of one dtype each. clips: [rows] float32, of all launches.

    firsts: the first program of each weight; offsets: where its clips begin; lengths: the elements of its rows. Behind
    the last weight no program begins. SOLVED_STEPS: of the grid whose noise is solved for; STEPS: of the grid that is
    rounded to. FITS: all rows fit BLOCK.
    """
    program = tl.program_id(0)
    w_ptr = at_weight(weights, program, firsts, WEIGHTS)
    out_ptr = at_weight(outs, program, firsts, WEIGHTS)
    row = program - at_weight(firsts, program, firsts, WEIGHTS)
    n = at_weight(lengths, program, firsts, WEIGHTS)
    hint = tl.load(at_weight(hints, program, firsts, WEIGHTS) + row)
    LOW: tl.constexpr = -SOLVED_STEPS
    HIGH: tl.constexpr = SOLVED_STEPS - 1
    clip, held = solve_row(w_ptr, row, hint, n, 1, 1, SOLVED_STEPS, LOW, HIGH, True, METHOD, BLOCK, True, FITS)
    tl.store(clips_ptr + at_weight(offsets, program, firsts, WEIGHTS) + row, clip)
    step = clip * (1.0 / STEPS)
    for start in range(0, n, BLOCK):
        x = held if FITS else tile_of(w_ptr, row, start, n, 1, 1, BLOCK, True)
        level = representable(nearest(x, step, -STEPS, STEPS - 1) * step, w_ptr.dtype.element_ty)
        level = tl.where(tl.abs(x) < float("inf"), level, x)
        i = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * n + i, level.to(out_ptr.dtype.element_ty), mask=i < n)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One weight of a launch: rows of n elements, whose clips begin at offset."""

    w: Tensor
    out: Tensor
    hint: Tensor
    offset: int
    rows: int
    n: int


def fake_quantize_weights(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    *,
    out: list[Tensor],
    clips: Tensor,
    classes: tuple[tuple[int, int], ...] = CLASSES,
    at_once: int = AT_ONCE,
) -> list[int]:
    """Write levels into out and clips into clips, a launch for each class of rows, bit width and dtype.

    Return the indices of those weights, of which nothing was written, that the ops have to do one by one: their rows do
    not lie in one piece, or there is no kernel for the dtype or the method.
    """
    launches: dict[tuple[Grid, torch.dtype, torch.dtype, int], list[_Entry]] = {}
    left, offset = [], 0
    for index, (w, hint, spec, to) in enumerate(zip(weights, hints, specs, out, strict=True)):
        grid, dim = _by_channel(spec)
        layout, rows = cpu.channel_layout(w, dim), w.shape[dim]
        in_pieces = layout is None or (layout[0] > 1 and layout[1] > 1)
        known = w.dtype in FLOATS and to.dtype in FLOATS and as_octav(grid.bits, method)[1] in METHODS
        if known and not in_pieces and not grid.narrow and cpu.same_layout(to, w):
            n = w.numel() // rows
            entry = _Entry(w, to, cpu.checked(hint, (rows,)), offset, rows, n)
            key = (grid, w.dtype, to.dtype, sum(n > longest for longest, _ in classes))
            launches.setdefault(key, []).append(entry)
        else:
            left.append(index)
        offset += rows
    for (grid, _, _, which), entries in launches.items():
        for start in range(0, len(entries), at_once):
            _launch(entries[start : start + at_once], clips, grid, method, which, classes)
    return left


def _by_channel(spec: str) -> tuple[Grid, int]:
    """Return the grid and the channel axis of a weight: others are not gathered."""
    plain = spec_of(spec).plain
    assert plain is not None and plain[1] is not None
    return plain[0], plain[1]


def _launch(
    entries: list[_Entry], clips: Tensor, grid: Grid, method: str, which: int, classes: tuple[tuple[int, int], ...]
) -> None:
    solved_bits, solved_method = as_octav(grid.bits, method)
    block, warps = classes[min(which, len(classes) - 1)]
    programs = sum(entry.rows for entry in entries)
    firsts = [sum(entry.rows for entry in entries[:i]) for i in range(len(entries))]
    # Few lengths of tuples make few kernels.
    behind = triton.next_power_of_2(len(entries)) - len(entries)
    filled = [*entries, *[entries[-1]] * behind]
    arguments: tuple[Any, ...] = (
        tuple(entry.w for entry in filled),
        tuple(entry.out for entry in filled),
        tuple(entry.hint for entry in filled),
        clips,
        (*firsts, *[programs] * behind),
        tuple(entry.offset for entry in filled),
        tuple(entry.n for entry in filled),
    )
    fake_quantize_weights_kernel[(programs,)](
        *arguments,
        SOLVED_STEPS=Grid(solved_bits, signed=True).steps,
        STEPS=grid.steps,
        METHOD=METHODS.index(solved_method),
        WEIGHTS=len(filled),
        BLOCK=block,
        FITS=which < len(classes),
        num_warps=warps,
    )
