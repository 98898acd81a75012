"""dequantize in Triton. See reference.py, equal bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize.kernel import (
    BLOCK,
    FLOATS,
    clip_at,
    elementwise,
    offsets_of,
    representable,
    step_of,
    tables_of,
)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    levels_ptr,
    EVEN: tl.constexpr,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SATURATED: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    SIGNED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """codes, out: [n] as they lie in memory. clip: [channels] float32. EVEN: codes are levels."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    stored = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    code = stored
    if not SIGNED:
        code = tl.where(code >= SATURATED, code - SATURATED, code)
    code = tl.minimum(tl.maximum(code, LOW), HIGH)
    level = code.to(tl.float32) if EVEN else tl.load(levels_ptr + (code - LOW))
    clip = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL) + tl.zeros_like(level)
    level = representable(level * step_of(clip, STEPS, EVEN), out_ptr.dtype.element_ty)
    level = tl.where(stored == NOT_FINITE, float("nan"), level)
    tl.store(out_ptr + offsets, level.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(
    codes: Tensor,
    clip: Tensor,
    spec: str,
    dtype: torch.dtype,
    *,
    out: Tensor,
    block: int = BLOCK,
) -> bool:
    """Write the reference's result into out; False where only that will do."""
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    fits = codes.dtype is form.codes_dtype and codes.shape == out.shape
    if dtype not in FLOATS or out.dtype is not dtype or not fits:
        return False
    return elementwise(
        dequantize_kernel,
        [codes],
        clip,
        represented.granularity,
        out,
        block,
        levels_ptr=tables_of(form, codes.device)[0],
        EVEN=isinstance(form, Grid),
        STEPS=float(form.steps),
        LOW=form.low,
        HIGH=form.high,
        SATURATED=form.ceiling_flag,
        NOT_FINITE=torch.iinfo(codes.dtype).min,
        SIGNED=form.signed,
    )
