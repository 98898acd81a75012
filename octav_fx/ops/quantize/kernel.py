"""quantize in Triton. See reference.py, equal bit for bit."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.format import Format
from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize.kernel import (
    BLOCK,
    EVEN,
    FLOATING_POINT,
    FLOATS,
    TABLE,
    clip_at,
    elementwise,
    kind_of,
    level_of,
    offsets_of,
    step_of,
    tables_of,
)


@triton.jit
def code_of(
    level,
    edges_ptr,
    edges,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
):
    """Return the codes of levels, in steps, as floats."""
    code = level
    if KIND == TABLE:
        code = tl.zeros_like(level) + LOW
        for i in range(edges):
            code += tl.where(level > tl.load(edges_ptr + i), 1.0, 0.0)
    elif KIND == FLOATING_POINT:
        # The place of the leading bit and the bits behind it, counted from the least normal level.
        magnitude = tl.abs(level)
        smallest = tl.zeros_like(level) + 2.0**LEAST_EXPONENT
        beyond = magnitude.to(tl.int32, bitcast=True) - smallest.to(tl.int32, bitcast=True)
        normal = ((beyond >> (23 - MANTISSA)) + (1 << MANTISSA)).to(tl.float32)
        place = tl.where(magnitude < smallest, magnitude * 2.0 ** (MANTISSA - LEAST_EXPONENT), normal)
        code = tl.where(level < 0, -place, place)
    return code


@triton.jit
def code_for_backward(
    code,
    x,
    clip,
    ceiling,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BELOW: tl.constexpr,
    SATURATED: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Return the codes of x with those that say what backward asks about it: what the reference writes, as int32."""
    code = tl.where(x > clip, HIGH + 1.0, code)
    if SIGNED:
        code = tl.where(x < -clip, BELOW + 0.0, code)
    else:
        code = tl.where(x < 0, BELOW + 0.0, code)
        code = tl.where(x == 0, LOW - 1.0, code)
        code = tl.where(x >= ceiling, code + SATURATED, code)
    return tl.where(tl.abs(x) < float("inf"), code, NOT_FINITE + 0.0).to(tl.int32)


@triton.jit
def quantize_kernel(
    x_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    ceiling,
    levels_ptr,
    edges_ptr,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    STEPS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
    EDGES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BELOW: tl.constexpr,
    SATURATED: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    SIGNED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, out: [n] as they lie in memory. clip: [channels] float32. ceiling: inf if there is none. edges: of a table."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    clip = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL) + tl.zeros_like(x)
    step = step_of(clip, STEPS, KIND == EVEN)
    level = level_of(x, step, levels_ptr, edges_ptr, EDGES, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT)
    code = code_of(level, edges_ptr, EDGES, LOW, KIND, MANTISSA, LEAST_EXPONENT)
    code = code_for_backward(code, x, clip, ceiling, LOW, HIGH, BELOW, SATURATED, NOT_FINITE, SIGNED)
    tl.store(out_ptr + offsets, code.to(out_ptr.dtype.element_ty), mask=mask)


def codes_of(form: Format) -> dict[str, Any]:
    """Return the constants with which kernels write codes of a format."""
    bounds = {"LOW": form.low, "HIGH": form.high, "BELOW": form.underflow_code, "SATURATED": form.ceiling_flag}
    return {**bounds, "NOT_FINITE": torch.iinfo(form.codes_dtype).min, "SIGNED": form.signed}


def quantize(
    x: Tensor,
    clip: Tensor,
    spec: str,
    ceiling: float | None = None,
    *,
    out: Tensor,
    block: int = BLOCK,
) -> bool:
    """Write the reference's result into out; False where only that will do."""
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    if x.dtype not in FLOATS or out.dtype is not form.codes_dtype or x.shape != out.shape:
        return False
    levels, edges = tables_of(form, x.device)
    constants = {"levels_ptr": levels, "edges_ptr": edges, "EDGES": len(edges), **kind_of(form), **codes_of(form)}
    top = torch.inf if ceiling is None else float(ceiling)
    return elementwise(quantize_kernel, [x], clip, represented.granularity, out, block, ceiling=top, **constants)
