"""fake_quantize_weights in Triton: a program for each row of each weight, which stays on chip from solve to store."""

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import FLOATS, nearest
from octav_fx.ops.kernels.solve_rows.kernel import METHODS, solve_row, tile_of

# Rows of up to so many elements are held by so many warps, 4 or 16 elements in the registers of each thread. Longer
# rows are read again in each step, in tiles of the last length, from the cache. A class of its own keeps short rows
# from taking the registers of long ones: many of them run at a time.
CLASSES: Final = ((128, 1), (1024, 2), (8192, 16))
# What stands in the table of each weight: three addresses, its first program, its first clip, the elements of a row.
FIELDS: Final = 6
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def fake_quantize_weights_kernel(
    table_ptr,
    clips_ptr,
    first_ptr,
    weights,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    METHOD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FITS: tl.constexpr,
):
    """table: [weights, FIELDS] int64. clips: [rows] float32. WEIGHTS: a power of two. FITS: all rows fit BLOCK.

    first: the first weight, of whose dtype all are.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, WEIGHTS)
    # Behind the last weight no row begins.
    firsts = tl.load(table_ptr + lanes * _FIELDS + 3, mask=lanes < weights, other=1 << 40)
    entry = table_ptr + (tl.sum((firsts <= program).to(tl.int32)) - 1) * _FIELDS
    w_ptr = tl.load(entry).to(first_ptr.dtype)
    out_ptr = tl.load(entry + 1).to(first_ptr.dtype)
    row = program - tl.load(entry + 3)
    hint = tl.load(tl.load(entry + 2).to(clips_ptr.dtype) + row)
    n = tl.load(entry + 5).to(tl.int32)
    clip, held = solve_row(w_ptr, row, hint, n, 1, 1, STEPS, LOW, HIGH, True, METHOD, BLOCK, True, FITS)
    tl.store(clips_ptr + tl.load(entry + 4) + row, clip)
    step = clip * (1.0 / STEPS)
    for start in range(0, n, BLOCK):
        x = held if FITS else tile_of(w_ptr, row, start, n, 1, 1, BLOCK, True)
        level = tl.where(tl.abs(x) < float("inf"), nearest(x, step, LOW, HIGH) * step, x)
        i = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * n + i, level.to(out_ptr.dtype.element_ty), mask=i < n)


@functools.lru_cache(maxsize=64)
def _table(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the entries on the device. Parameters stay where they are, and mostly what is made for them, too."""
    return torch.tensor(entries, dtype=torch.int64, device=device)


def fake_quantize_weights(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    *,
    out: list[Tensor],
    clips: Tensor,
    classes: tuple[tuple[int, int], ...] = CLASSES,
) -> bool:
    """Write levels into out and clips into clips, in one launch for each class of rows, bit width and dtype.

    False, and nothing written, where the ops have to do it one by one: for rows that do not lie in one piece, for
    other dtypes and methods, and while a CUDA graph is captured, which would keep addresses that nobody holds.
    """
    capturing = clips.is_cuda and torch.cuda.is_current_stream_capturing()
    if method not in METHODS or capturing:
        return False
    # Of each launch: the entries of its table, the first weight, and how many programs there are.
    launches: dict[tuple[Grid, torch.dtype, int], tuple[list[tuple[int, ...]], Tensor, int]] = {}
    # A hint that had to be converted has to live until the launch.
    kept, initial_clip = [], 0
    for w, hint, spec, to in zip(weights, hints, specs, out, strict=True):
        grid, dim = spec_of(spec).plain or (None, None)
        if grid is None or dim is None or grid.narrow:
            return False
        layout = cpu.channel_layout(w, dim)
        in_pieces = layout is None or (layout[0] > 1 and layout[1] > 1)
        if w.dtype not in FLOATS or in_pieces or not cpu.same_layout(to, w):
            return False
        rows = w.shape[dim]
        n = w.numel() // rows
        kept.append(cpu.checked(hint, (rows,)))
        key = (grid, w.dtype, sum(n > longest for longest, _ in classes))
        entries, of, programs = launches.get(key, ([], w, 0))
        entry = (w.data_ptr(), to.data_ptr(), kept[-1].data_ptr(), programs, initial_clip, n)
        launches[key] = ([*entries, entry], of, programs + rows)
        initial_clip += rows
    for (grid, _, which), (entries, of, programs) in launches.items():
        block, warps = classes[min(which, len(classes) - 1)]
        fake_quantize_weights_kernel[(programs,)](
            _table(tuple(entries), clips.device),
            clips,
            of,
            len(entries),
            STEPS=grid.steps,
            LOW=grid.low,
            HIGH=grid.high,
            METHOD=METHODS.index(method),
            WEIGHTS=triton.next_power_of_2(len(entries)),
            BLOCK=block,
            FITS=which < len(classes),
            num_warps=warps,
        )
    return True
