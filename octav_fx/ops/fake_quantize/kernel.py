"""fake_quantize and its gradient in Triton, and what all elementwise kernels are made of. See reference.py."""

import functools
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.codebook import Codebook
from octav_fx.formats.floats import FloatFormat
from octav_fx.formats.format import Format
from octav_fx.formats.granularity import Granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.kmeans import KMeans
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one program, 16 for each of its threads: two loads of 16 bytes of a half-precision tensor.
BLOCK: Final = 2048
# How levels are found: as integers, as floating-point numbers, one by one in a table.
EVEN, FLOATING_POINT, TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
    # The tie below LOW goes to LOW where that is even: what rounds to -0 on an unsigned grid has to stay that.
    quotient = tl.where(quotient < LOW - 0.5, LOW, quotient)
    if LOW % 2 != 0:
        # Of a narrow grid it would go to the code that is left out.
        quotient = tl.where(quotient == LOW - 0.5, LOW, quotient)
    quotient = tl.where(quotient > HIGH, HIGH, quotient)
    # From 2**23 on floats are integers: adding it rounds. The sign comes from the quotient, for zeros have one.
    rounded = (tl.abs(quotient) + 8388608.0) - 8388608.0
    sign = quotient.to(tl.int32, bitcast=True) & -2147483648
    signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(step > 0, signed, 0.0)


@triton.jit
def to_multiple(x, unit):
    """Return the nearest multiple of unit, a power of two, ties to even, for |x| < 2**22 * unit."""
    large = unit * 12582912.0
    return (x + large) - large


@triton.jit
def to_mantissa(x, MANTISSA: tl.constexpr, LEAST_EXPONENT: tl.constexpr):
    """Return the nearest number with so many bits of mantissa, ties to even; none overflows."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return to_multiple(x, tl.maximum(power, 2.0**LEAST_EXPONENT) * 2.0**-MANTISSA)


@triton.jit
def rounded(
    ratio,
    levels_ptr,
    edges_ptr,
    edges,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
):
    """Return the nearest levels, in steps. Only a table has levels and edges."""
    if KIND == TABLE:
        level = tl.zeros_like(ratio) + tl.load(levels_ptr)
        for i in range(edges):
            level = tl.where(ratio > tl.load(edges_ptr + i), tl.load(levels_ptr + i + 1), level)
    else:
        level = tl.minimum(tl.maximum(ratio, LEAST), GREATEST)
        level = to_multiple(level, 1.0) if KIND == EVEN else to_mantissa(level, MANTISSA, LEAST_EXPONENT)
    return level


@triton.jit
def step_of(clip, STEPS: tl.constexpr, IS_EVEN: tl.constexpr):
    """Return clip / STEPS [...], rounded to the nearest. IS_EVEN: of integers, whose STEPS are a power of two."""
    return clip * (1.0 / STEPS) if IS_EVEN else tl.div_rn(clip, tl.zeros_like(clip) + STEPS)


@triton.jit
def level_of(
    x,
    step,
    levels_ptr,
    edges_ptr,
    edges,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
):
    """Return the levels nearest to x, in steps, ties to the even code; 0 for step 0. What rounds to -0 stays that."""
    if KIND == EVEN:
        return nearest(x, step, LEAST, GREATEST)
    ratio = tl.div_rn(x, tl.where(step > 0, step, 1.0))
    level = rounded(ratio, levels_ptr, edges_ptr, edges, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT)
    if KIND == FLOATING_POINT:
        sign = ratio.to(tl.int32, bitcast=True) & -2147483648
        level = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(step > 0, level, 0.0)


@triton.jit
def representable(level, TYPE: tl.constexpr):
    """Return the nearest finite number of a type to a level, in float32; NaN, of a clip that is none, stays."""
    if tl.float16 == TYPE:
        return _bounded(level, 65504.0)
    elif tl.bfloat16 == TYPE:
        return _bounded(level, 3.3895313892515355e38)
    return _bounded(level, 3.4028234663852886e38)


@triton.jit
def _bounded(level, greatest):
    keep: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(level, -greatest, propagate_nan=keep), greatest, propagate_nan=keep)


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
    level = representable(nearest(value, step, LOW, HIGH) * step, x_ptr.dtype.element_ty)
    level = tl.where(tl.abs(value) < float("inf"), level, value)
    tl.store(out_ptr + offsets, level.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fake_quantize_levels_kernel(
    x_ptr,
    clip_ptr,
    out_ptr,
    n,
    channels,
    inner,
    levels_ptr,
    edges_ptr,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    STEPS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
    EDGES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, out: [n] as they lie in memory. clip: [channels] float32. levels, edges: of a table."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    clip = clip_at(clip_ptr, offsets, channels, inner, PER_CHANNEL) + tl.zeros_like(value)
    step = step_of(clip, STEPS, KIND == EVEN)
    level = level_of(value, step, levels_ptr, edges_ptr, EDGES, KIND, LEAST, GREATEST, MANTISSA, LEAST_EXPONENT)
    level = representable(level * step, x_ptr.dtype.element_ty)
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
    kernel: Any, inputs: list[Tensor], clip: Tensor, shared: Granularity, out: Tensor, block: int, **constants: Any
) -> bool:
    """Launch kernel(*inputs, clip, out, n, channels, inner) over all elements; False where out has gaps.

    What lies otherwise than the kernel reads or writes it is copied: see cpu.each_stretch. Rows are channels, one
    behind the other.
    """

    def run(lying: list[Tensor], clip: Tensor, out: Tensor, layout: tuple[int, int, int]) -> None:
        n, (_, channels, inner) = out.numel(), layout
        sizes = {"PER_CHANNEL": shared.axis is not None, "BLOCK": block, "WIDE": n + block > 2**31}
        kernel[(triton.cdiv(n, block),)](*lying, clip, out, n, channels, inner, **sizes, **constants)

    return not out.numel() or cpu.each_stretch(run, inputs, clip, shared, out)


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
    if x.dtype not in FLOATS or out.dtype not in FLOATS or x.shape != out.shape:
        return False
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    if isinstance(form, Grid):
        codes = {"STEPS": form.steps, "LOW": form.low, "HIGH": form.high}
        return elementwise(fake_quantize_kernel, [x], clip, represented.granularity, out, block, **codes)
    levels, edges = tables_of(form, x.device)
    constants = {"levels_ptr": levels, "edges_ptr": edges, "EDGES": len(edges), **kind_of(form)}
    return elementwise(fake_quantize_levels_kernel, [x], clip, represented.granularity, out, block, **constants)


def kind_of(form: Format) -> dict[str, Any]:
    """Return the constants with which kernels round to the levels of a format."""
    exponents = (form.mantissa_bits, form.least_exponent) if isinstance(form, FloatFormat) else (0, 0)
    kind = EVEN if isinstance(form, Grid) else FLOATING_POINT if isinstance(form, FloatFormat) else TABLE
    # Levels that were found in a tensor are read, and no constants: they are others at every step.
    least, greatest = (-1.0, 1.0) if isinstance(form, KMeans) else (float(form.least), float(form.greatest))
    return {
        **{"KIND": kind.value, "LEAST": least, "GREATEST": greatest, "STEPS": float(form.steps)},
        **{"MANTISSA": exponents[0], "LEAST_EXPONENT": exponents[1]},
    }


def tables_of(form: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return levels and edges, float32, on a device; some number each of even levels, where nobody reads any."""
    if isinstance(form, KMeans) and form.table is not None:
        return form.table, form.edges(torch.float32)
    return _known_tables(form, device)


@functools.cache
def _known_tables(form: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(form, Codebook):
        return torch.tensor(form.table, device=device), form.edges(torch.float32).to(device)
    return torch.zeros(1, device=device), torch.zeros(1, device=device)


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
    if gradient == "ste" or not floats or not x.shape == grad.shape == out.shape:
        return False
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    kind = {"SIGNED": form.signed, "MAD": gradient == "mad"}
    return elementwise(fake_quantize_backward_kernel, [grad, x], clip, represented.granularity, out, block, **kind)
