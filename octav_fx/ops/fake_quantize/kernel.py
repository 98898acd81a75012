"""fake_quantize and its gradient in Triton, and what all elementwise kernels are made of. See reference.py."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one program, 16 for each of its threads: two loads of 16 bytes of a half-precision tensor.
BLOCK: Final = 2048


@triton.jit
def offsets_of(n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return the elements of this program, and which of them there are. WIDE: n does not fit 31 bits."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < n


@triton.jit
def clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL: tl.constexpr):
    """Return the clip of each element: of the tensor, or of the channel in the middle of (outer, channels, inner)."""
    return tl.load(clip_ptr + (offsets // inner % channels if PER_CHANNEL else 0))


@triton.jit
def nearest(x, step, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the code from LOW to HIGH nearest to x / step, ties to even, as a float; 0 for step 0, NaN for NaN."""
    # The default division is an approximation, and moves ties.
    quotient = tl.div_rn(x, tl.where(step > 0, step, 1.0))
    # Cut above the tie below LOW, which is even and gets it: what rounds to -0 on an unsigned grid has to stay that.
    quotient = tl.where(quotient < LOW - 0.5, LOW, quotient)
    quotient = tl.where(quotient > HIGH, HIGH, quotient)
    # From 2**23 on floats are integers: adding it rounds. The sign comes from the quotient, for zeros have one.
    rounded = (tl.abs(quotient) + 8388608.0) - 8388608.0
    sign = quotient.to(tl.int32, bitcast=True) & -2147483648
    signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(step > 0, signed, 0.0)


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, out: [n] as they lie in memory. clip: [channels] float32."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Not a division, which is an approximation; STEPS is a power of two.
    step = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL) * (1.0 / STEPS)
    level = nearest(value, step, LOW, HIGH) * step
    level = tl.where(tl.abs(value) < float("inf"), level, value)
    tl.store(out_ptr + offsets, level.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr,
    x_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    SIGNED: tl.constexpr,
    MAD: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad, x, out: [n] as they lie in memory. clip: [channels] float32. Factors as in clips/gradients.py."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    clip = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL)
    magnitude = tl.abs(x)
    factor = tl.where(magnitude <= clip, 1.0, 0.0)
    if MAD:
        # What is inside is divided by one, and nothing by zero.
        factor = tl.div_rn(tl.where(magnitude <= clip, 1.0, clip), tl.where(magnitude <= clip, 1.0, magnitude))
    if not SIGNED:
        factor = tl.where(x >= 0, factor, 0.0)
    tl.store(out_ptr + offsets, (grad * factor).to(out_ptr.dtype.element_ty), mask=mask)


def elementwise(
    kernel: Any, inputs: list[Tensor], clip: Tensor, dim: int | None, out: Tensor, block: int, **constants: Any
) -> bool:
    """Launch kernel(*inputs, clip, out, n, channels, inner) over all elements; False where out has gaps.

    An input that does not lie as out does (strided, expanded, permuted) is copied into that layout first.
    """
    n, layout = out.numel(), cpu.channel_layout(out, dim)
    if not n or layout is None:
        return not n
    _, channels, inner = layout
    clip = cpu.checked(clip, clip_shape(out, dim))
    lying = [x if cpu.same_layout(x, out) else torch.empty_like(out, dtype=x.dtype).copy_(x) for x in inputs]
    sizes = {"PER_CHANNEL": dim is not None, "BLOCK": block, "WIDE": n + block > 2**31}
    kernel[(triton.cdiv(n, block),)](*lying, clip, out, n, channels, inner, **sizes, **constants)
    return True


def fake_quantize(
    x: Tensor,
    clip: Tensor,
    spec: str,
    gradient: str,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor,
    block: int = BLOCK,
) -> bool:
    """Write the reference's result into out; False where only that will do."""
    plain = spec_of(spec).plain
    if plain is None or x.dtype not in FLOATS or out.dtype not in FLOATS or x.shape != out.shape:
        return False
    grid, dim = plain
    codes = {"STEPS": grid.steps, "LOW": grid.low, "HIGH": grid.high}
    return elementwise(fake_quantize_kernel, [x], clip, dim, out, block, **codes)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    clip: Tensor,
    spec: str,
    gradient: str,
    *,
    out: Tensor,
    block: int = BLOCK,
) -> bool:
    """Write the reference's result into out; False where only that will do."""
    floats = x.dtype in FLOATS and grad.dtype in FLOATS and out.dtype is x.dtype
    plain = spec_of(spec).plain
    if plain is None or gradient == "ste" or not floats or not x.shape == grad.shape == out.shape:
        return False
    grid, dim = plain
    kind = {"SIGNED": grid.signed, "MAD": gradient == "mad"}
    return elementwise(fake_quantize_backward_kernel, [grad, x], clip, dim, out, block, **kind)
