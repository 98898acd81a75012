"""dequantize in Triton. See reference.py, equal bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize.kernel import BLOCK, FLOATS, clip_at, elementwise, offsets_of, representable


@triton.jit
def dequantize_kernel(
    codes_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
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
    """codes, out: [n] as they lie in memory. clip: [channels] float32."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    stored = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    code = stored
    if not SIGNED:
        code = tl.where(code >= SATURATED, code - SATURATED, code)
    code = tl.minimum(tl.maximum(code, LOW), HIGH)
    step = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL) * (1.0 / STEPS)
    level = representable(code.to(tl.float32) * step, out_ptr.dtype.element_ty)
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
    grid = represented.format
    if not isinstance(grid, Grid):
        return False
    fits = codes.dtype is grid.codes_dtype and codes.shape == out.shape
    if dtype not in FLOATS or out.dtype is not dtype or not fits:
        return False
    return elementwise(
        dequantize_kernel,
        [codes],
        clip,
        represented.granularity,
        out,
        block,
        STEPS=grid.steps,
        LOW=grid.low,
        HIGH=grid.high,
        SATURATED=grid.ceiling_flag,
        NOT_FINITE=torch.iinfo(codes.dtype).min,
        SIGNED=grid.signed,
    )
