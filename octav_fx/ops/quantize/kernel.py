"""quantize in Triton. See reference.py, equal bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize.kernel import BLOCK, FLOATS, clip_at, elementwise, nearest, offsets_of


@triton.jit
def quantize_kernel(
    x_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    ceiling,
    STEPS: tl.constexpr,
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
    """x, out: [n] as they lie in memory. clip: [channels] float32. ceiling: inf if there is none."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    clip = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL)
    code = nearest(x, clip * (1.0 / STEPS), LOW, HIGH)
    code = tl.where(x > clip, HIGH + 1.0, code)
    if SIGNED:
        code = tl.where(x < -clip, BELOW + 0.0, code)
    else:
        code = tl.where(x < 0, BELOW + 0.0, code)
        code = tl.where(x == 0, LOW - 1.0, code)
        code = tl.where(x >= ceiling, code + SATURATED, code)
    code = tl.where(tl.abs(x) < float("inf"), code, NOT_FINITE + 0.0)
    tl.store(out_ptr + offsets, code.to(tl.int32).to(out_ptr.dtype.element_ty), mask=mask)


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
    grid = represented.format
    if not isinstance(grid, Grid):
        return False
    if x.dtype not in FLOATS or out.dtype is not grid.codes_dtype or x.shape != out.shape:
        return False
    return elementwise(
        quantize_kernel,
        [x],
        clip,
        represented.granularity,
        out,
        block,
        ceiling=torch.inf if ceiling is None else float(ceiling),
        STEPS=grid.steps,
        LOW=grid.low,
        HIGH=grid.high,
        BELOW=grid.underflow_code,
        SATURATED=grid.ceiling_flag,
        NOT_FINITE=torch.iinfo(out.dtype).min,
        SIGNED=grid.signed,
    )
