"""fake_quantize_weights in Triton: a program for each row of each weight, which stays on chip from solve to store."""

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.ops import native
from octav_fx.ops.fake_quantize.kernel import FLOATS, nearest
from octav_fx.ops.solve_rows.kernel import METHODS, solve_row, tile_of
from octav_fx.quant.grid import Grid

# Rows up to SMALL and up to LARGE are held in registers, 4 and 32 for each of 256 threads; longer ones are read again,
# in tiles of LARGE, from the cache.
SMALL: Final = 1024
LARGE: Final = 8192
WARPS: Final = 8
# What stands in the table of each weight: three addresses, the row of the grid that its first row is, and the elements
# of a row.
FIELDS: Final = 5
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def row_of_weight(
    w_ptr,
    out_ptr,
    row,
    hint,
    n,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
    FITS: tl.constexpr,
):
    """Solve a row and store its levels; returns its clip."""
    clip, held = solve_row(w_ptr, row, hint, n, 1, 1, STEPS, LOW, HIGH, True, METHOD, BLOCK, True, FITS)
    step = clip / STEPS
    for start in range(0, n, BLOCK):
        x = held if FITS else tile_of(w_ptr, row, start, n, 1, 1, BLOCK, True)
        level = tl.where(tl.abs(x) < float("inf"), nearest(x, step, LOW, HIGH) * step, x)
        i = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * n + i, level.to(out_ptr.dtype.element_ty), mask=i < n)
    return clip


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
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
):
    """table: [weights, FIELDS] int64. clips: [rows] float32, in the order of the table. WEIGHTS: a power of two.

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
    n = tl.load(entry + 4).to(tl.int32)
    if n <= SMALL:
        clip = row_of_weight(w_ptr, out_ptr, row, hint, n, STEPS, LOW, HIGH, METHOD, SMALL, True)
    elif n <= LARGE:
        clip = row_of_weight(w_ptr, out_ptr, row, hint, n, STEPS, LOW, HIGH, METHOD, LARGE, True)
    else:
        clip = row_of_weight(w_ptr, out_ptr, row, hint, n, STEPS, LOW, HIGH, METHOD, LARGE, False)
    tl.store(clips_ptr + program, clip)


@functools.lru_cache(maxsize=64)
def _table(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The entries on the device. Parameters stay where they are, and so, mostly, does what is allocated for them."""
    return torch.tensor(entries, dtype=torch.int64, device=device)


def fake_quantize_weights(
    weights: list[Tensor],
    hints: list[Tensor],
    bits: list[int],
    dims: list[int],
    method: str,
    *,
    out: list[Tensor],
    clips: Tensor,
    small: int = SMALL,
    large: int = LARGE,
) -> bool:
    """Write levels into out and clips into clips, in one launch for each run of equal bits and dtype.

    False, and nothing written, where the ops have to do it one by one: for rows that do not lie in one piece, for
    other dtypes and methods, and while a CUDA graph is captured, which would keep addresses that nobody holds.
    """
    capturing = clips.is_cuda and torch.cuda.is_current_stream_capturing()
    if method not in METHODS or capturing:
        return False
    # Of each launch: bits, the first weight, the first row, and the table.
    launches: list[tuple[int, Tensor, int, list[tuple[int, ...]]]] = []
    # A hint that had to be converted has to live until the launch.
    kept, row = [], 0
    for w, hint, b, dim, to in zip(weights, hints, bits, dims, out, strict=True):
        layout = native.channel_layout(w, dim)
        in_pieces = layout is None or (layout[0] > 1 and layout[1] > 1)
        if w.dtype not in FLOATS or in_pieces or not native.same_layout(to, w):
            return False
        rows = w.shape[dim]
        kept.append(native.checked(hint, (rows,)))
        if not launches or launches[-1][0] != b or launches[-1][1].dtype is not w.dtype:
            launches.append((b, w, row, []))
        entries = launches[-1][-1]
        entries.append((w.data_ptr(), to.data_ptr(), kept[-1].data_ptr(), row - launches[-1][2], w.numel() // rows))
        row += rows
    ends = [begin for _, _, begin, _ in launches[1:]] + [row]
    for (b, of, begin, entries), end in zip(launches, ends, strict=True):
        grid = Grid(b, signed=True)
        fake_quantize_weights_kernel[(end - begin,)](
            _table(tuple(entries), clips.device),
            clips[begin:],
            of,
            len(entries),
            STEPS=grid.steps,
            LOW=grid.low,
            HIGH=grid.high,
            METHOD=METHODS.index(method),
            WEIGHTS=triton.next_power_of_2(len(entries)),
            SMALL=small,
            LARGE=large,
            num_warps=WARPS,
        )
    return True
