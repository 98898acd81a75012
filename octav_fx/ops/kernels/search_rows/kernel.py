"""clips/search.py in Triton, and the largest magnitude of rows: several rows for each program, which keeps them all.

A program can write the rows rounded to the clips that it found, as levels or as codes.

Sums are added up in the order of search.folded, so that clips are equal to the bit where the lines of sixteen columns
are a power of two in number, as they are in groups; elsewhere sums may differ in their last place.
"""

import functools
import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.clips import search
from octav_fx.clips.methods import searches
from octav_fx.formats.format import Format
from octav_fx.formats.scales import SCALES, tensor_scale
from octav_fx.formats.spec import Spec
from octav_fx.ops.fake_quantize.kernel import (
    EVEN,
    FLOATS,
    kind_of,
    level_of,
    representable,
    rounded,
    step_of,
    tables_of,
    to_mantissa,
)
from octav_fx.ops.kernels.solve_rows.kernel import power_of_two
from octav_fx.ops.quantize.kernel import code_for_backward, code_of, codes_of

# Elements that a program holds, 8 registers for each of 256 threads, and the longest row, 16 for each of 512.
ELEMENTS: Final = 2048
LONGEST: Final = 2**13
# The longest that is rounded, too: registers hold it twice, as it was given and as it is searched.
LONGEST_ROUNDED: Final = 2**12
# What is written of rows besides their clips.
NOTHING, LEVELS, CODES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_COLUMNS = tl.constexpr(search.COLUMNS)
_BFLOAT16, _FLOAT16, _E8M0, _E4M3 = (tl.constexpr(list(SCALES).index(name)) for name in list(SCALES)[1:])


@triton.jit
def stored(step, unit, SCALE: tl.constexpr):
    """Return the nearest number of a format of scales to a step that is not negative: formats/scales.py."""
    if SCALE == _BFLOAT16:
        bits = step.to(tl.int32, bitcast=True)
        step = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    elif SCALE == _FLOAT16:
        number = tl.maximum(to_mantissa(tl.minimum(step, 65504.0), 10, -14), 2.0**-24)
        step = tl.where(step > 0, number, 0.0)
    elif SCALE == _E8M0:
        power = ((step.to(tl.int32, bitcast=True) + 0x400000) & 0x7F800000).to(tl.float32, bitcast=True)
        # Subnormal numbers by their bits: as literals they would be float64.
        small = tl.where(step.to(tl.int32, bitcast=True) < 0x600000, 0x400000, 0x800000).to(tl.float32, bitcast=True)
        power = tl.where(step < 2.0**-126, small, power)
        step = tl.where(step > 0, tl.minimum(power, 2.0**127), 0.0)
    elif SCALE == _E4M3:
        ratio = tl.where(unit > 0, tl.div_rn(step, tl.where(unit > 0, unit, 1.0) + step * 0.0), 0.0)
        number = tl.maximum(to_mantissa(tl.minimum(ratio, 448.0), 3, -6), 2.0**-9)
        step = tl.where(step > 0, number * unit, 0.0)
    return step


@triton.jit
def stored_in_units(step, up, down, unit, SCALE: tl.constexpr):
    """Return the same for a step in the units of a row."""
    return stored(step * up, unit, SCALE) * down if SCALE > 0 else step


@triton.jit
def folded(x, ROWS: tl.constexpr, HALVINGS: tl.constexpr):
    """Return the sums of rows [ROWS, 2**HALVINGS] in the order of search.folded."""
    for i in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, [ROWS, 2, 1 << (HALVINGS - 1 - i)]), 1)
    return tl.reshape(x, [ROWS])


@triton.jit
def reciprocal(step):
    """Return 1 / step, rounded to the nearest; 1 for a step of 0."""
    return tl.div_rn(step * 0.0 + 1.0, tl.where(step > 0, step, 1.0))


@triton.jit
def levels_of(
    x,
    inverse,
    there,
    levels_ptr,
    edges_ptr,
    edges,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
):
    """Return the levels of rows with these steps, given by 1 / step, and how far off they are, in steps.

    0 behind the end of rows.
    """
    ratio = x * inverse[:, None]
    level = rounded(ratio, levels_ptr, edges_ptr, edges, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT)
    return tl.where(there, level, 0.0), tl.where(there, ratio - level, 0.0)


@triton.jit
def search_rows_kernel(
    x_ptr,
    clip_ptr,
    out_ptr,
    unit_ptr,
    shares_ptr,
    levels_ptr,
    edges_ptr,
    rows,
    n,
    shares,
    edges,
    ceiling,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    STEPS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
    SCALE: tl.constexpr,
    SEARCH: tl.constexpr,
    COARSE: tl.constexpr,
    WRITES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BELOW: tl.constexpr,
    SATURATED: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """x, out: [rows, n] contiguous. clip: [rows] float32. SEARCH: else the largest magnitude. COARSE: search.COARSE.

    WRITES: what of x is written to out. LOW .. SIGNED: of codes.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, 1 << HALVINGS)
    there = i[None, :] < n
    offsets, mask = row[:, None] * n + i[None, :], (row[:, None] < rows) & there
    given = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(tl.abs(given) < float("inf"), given, 0.0)
    if LEAST >= 0:
        x = tl.maximum(x, 0.0)
    above, below = tl.max(tl.maximum(x, 0.0), 1), tl.min(tl.minimum(x, 0.0), 1)
    largest = tl.maximum(above, -below)
    unit = tl.load(unit_ptr)
    if SEARCH:
        down, up = power_of_two(largest)
        x = x * down[:, None]
        whole = tl.div_rn(above * down, above * 0.0 + GREATEST)
        if LEAST < 0:
            whole = tl.maximum(whole, tl.div_rn(below * down, below * 0.0 + LEAST))
        if COARSE:
            refined = whole
        else:
            # search._best_fit.
            refined, smallest = largest * 0.0 + 1.0, largest * 0.0 + float("inf")
            square, per_whole = folded(x * x, ROWS, HALVINGS), reciprocal(whole)
            for attempt in range(shares):
                share = tl.load(shares_ptr + attempt)
                inverse = per_whole * reciprocal(share)
                level, off = levels_of(
                    x, inverse, there, levels_ptr, edges_ptr, edges, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT
                )
                error, slope = folded(off * off, ROWS, HALVINGS), folded(off * level, ROWS, HALVINGS)
                levels = square * (inverse * inverse) - slope - slope - error
                gain = tl.where(levels > 0, tl.div_rn(slope, tl.where(levels > 0, levels, 1.0)), 0.0)
                error = (error - slope * gain) * (share * share)
                better = (error < smallest) & (whole > 0)
                refined, smallest = tl.where(better, share + share * gain, refined), tl.where(better, error, smallest)
            refined = refined * whole
        best, least = largest * 0.0, largest * 0.0 + float("inf")
        # The largest magnitude, and what is compared with it.
        for attempt in range(1 + (shares if COARSE else 1)):
            step = refined * tl.load(shares_ptr + tl.maximum(attempt - 1, 0)) if COARSE else refined
            step = tl.where(attempt == 0, tl.div_rn(largest * down, largest * 0.0 + STEPS), step)
            step = stored_in_units(step, up, down, unit, SCALE)
            _, off = levels_of(
                x,
                reciprocal(step),
                there,
                levels_ptr,
                edges_ptr,
                edges,
                KIND,
                LEAST,
                GREATEST,
                MANTISSA,
                LEAST_EXPONENT,
            )
            usable = (step > 0) & (step < float("inf"))
            error = tl.where(usable, folded(off * off, ROWS, HALVINGS) * (step * step), float("inf"))
            # The first is taken whatever its error is: of scales too small for the row it is infinite.
            better = (error < least) | (attempt == 0)
            best, least = tl.where(better, step, best), tl.where(better, error, least)
        clip = best * STEPS * up
    else:
        clip = largest
        if SCALE > 0:
            clip = stored(tl.div_rn(largest, largest * 0.0 + STEPS), unit, SCALE) * STEPS
    clip = tl.minimum(clip, 3.4028234663852886e38)
    tl.store(clip_ptr + row, clip, mask=row < rows)
    if WRITES != NOTHING:
        step = step_of(clip, STEPS, KIND == EVEN)[:, None] + tl.zeros_like(given)
        level = level_of(given, step, levels_ptr, edges_ptr, edges, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT)
        if WRITES == LEVELS:
            level = representable(level * step, x_ptr.dtype.element_ty)
            level = tl.where(tl.abs(given) < float("inf"), level, given)
            tl.store(out_ptr + offsets, level.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            code = code_of(level, edges_ptr, edges, LOW, KIND, MANTISSA, LEAST_EXPONENT)
            clip = clip[:, None] + tl.zeros_like(given)
            code = code_for_backward(code, given, clip, ceiling, LOW, HIGH, BELOW, SATURATED, NOT_FINITE, SIGNED)
            tl.store(out_ptr + offsets, code.to(out_ptr.dtype.element_ty), mask=mask)


def search_rows(x: Tensor, spec: Spec, method: str, *, out: Tensor) -> bool:
    """Write the clips of x into out; False where only the reference will do."""
    shared = spec.granularity
    fits = out.shape == shared.clip_shape(x.shape) and out.dtype is torch.float32
    if not fits or not x.numel() or (clips := clips_of(shared.rows(x).contiguous(), spec, method)) is None:
        return False
    out.copy_(shared.of_rows(clips, x.shape))
    return True


def clips_of(
    rows: Tensor, spec: Spec, method: str, out: Tensor | None = None, ceiling: float | None = None
) -> Tensor | None:
    """Return the clips [R] of rows [R, N], contiguous; None where only the reference will do.

    out, if given: where rows go, rounded to their clips, as levels or as codes by its dtype; [R, N] contiguous.
    """
    form, searched, (count, n) = spec.format, searches(spec, method), rows.shape
    columns = max(triton.next_power_of_2(n), search.COLUMNS)
    longest = LONGEST if out is None else LONGEST_ROUNDED
    if rows.dtype not in FLOATS or not (searched or method == "max") or columns > longest:
        return None
    clips = rows.new_empty(count, dtype=torch.float32)
    unit = tensor_scale(rows.float(), form) if spec.scale == "e4m3" else clips.new_ones(())
    shares, (levels, edges) = _shares(form, spec.scale, n, rows.device), tables_of(form, rows.device)
    per_program = max(ELEMENTS // columns, 1)
    warps = min(max(per_program * columns // 256, 1), 16)
    writes = NOTHING if out is None else LEVELS if out.is_floating_point() else CODES
    # By itself an assembler may give threads of so large a program half of the registers that there are for them.
    registers = {"maxnreg": 128} if warps == 16 and not torch.version.hip else {}
    search_rows_kernel[(triton.cdiv(count, per_program),)](
        *(rows, clips, clips if out is None else out, unit, shares, levels, edges),
        *(count, n, len(shares), len(edges), math.inf if ceiling is None else float(ceiling)),
        **kind_of(form),
        SCALE=list(SCALES).index(spec.scale),
        SEARCH=searched,
        COARSE=spec.scale in search.COARSE,
        WRITES=writes.value,
        **codes_of(form),
        ROWS=per_program,
        HALVINGS=columns.bit_length() - 1,
        num_warps=warps,
        # A product that is added would be rounded once instead of twice.
        enable_fp_fusion=False,
        **registers,
    )
    return clips


@functools.cache
def _shares(form: Format, scale: str, n: int, device: torch.device) -> Tensor:
    """Return the shares of candidates on a device."""
    return torch.tensor(search.candidates(form, scale, n), device=device)
