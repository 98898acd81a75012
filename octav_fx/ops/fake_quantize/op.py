"""torch.ops.octav.fake_quantize: round to the grid of a given clip, with a gradient of our own."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.ops import native
from octav_fx.ops.fake_quantize import reference
from octav_fx.quant.axis import clip_shape
from octav_fx.quant.grid import Grid


@torch.library.custom_op("octav::fake_quantize", mutates_args=(), tags=native.LAYOUT_AGNOSTIC)
def fake_quantize(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, gradient: str) -> Tensor:
    """See reference.py."""
    return _like(x, reference.fake_quantize(x, clip, bits, signed, dim, gradient))


@torch.library.custom_op("octav::fake_quantize_backward", mutates_args=(), tags=native.LAYOUT_AGNOSTIC)
def fake_quantize_backward(
    grad: Tensor, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str
) -> Tensor:
    """See reference.py."""
    return _like(x, reference.fake_quantize_backward(grad, x, clip, signed, dim, gradient))


@fake_quantize.register_fake
def _(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, gradient: str) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str) -> Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


@fake_quantize.register_kernel("cpu")
def _(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, gradient: str) -> Tensor:
    layout = native.channel_layout(x, dim)
    library = native.library()
    if library is None or layout is None or x.dtype is not torch.float32:
        return _like(x, reference.fake_quantize(x, clip, bits, signed, dim, gradient))
    out, grid = torch.empty_like(x), Grid(bits, signed)
    clip = native.checked(clip, clip_shape(x, dim))
    library.octav_fake_quantize(
        x.data_ptr(), clip.data_ptr(), out.data_ptr(), *layout, grid.steps, grid.low, grid.high, torch.get_num_threads()
    )
    return out


@fake_quantize_backward.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str) -> Tensor:
    layout = native.channel_layout(x, dim)
    library = native.library()
    native_dtypes = x.dtype is torch.float32 and grad.dtype is torch.float32
    if library is None or layout is None or gradient == "ste" or not native_dtypes:
        return _like(x, reference.fake_quantize_backward(grad, x, clip, signed, dim, gradient))
    out = torch.empty_like(x)
    # Autograd may hand over another layout than that of x; both are then walked in the order of x.
    grad = _like(x, grad)
    clip = native.checked(clip, clip_shape(x, dim))
    library.octav_fake_quantize_backward(
        grad.data_ptr(),
        x.data_ptr(),
        clip.data_ptr(),
        out.data_ptr(),
        *layout,
        signed,
        gradient == "mad",
        torch.get_num_threads(),
    )
    return out


def _like(x: Tensor, value: Tensor) -> Tensor:
    """The values in the memory layout that empty_like(x) has, which is what the fake kernels promise."""
    if value.stride() == x.stride() and native.is_dense(x):
        return value
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def save_for_backward(ctx: Any, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str) -> None:
    """What the gradient needs; the straight-through one needs nothing."""
    if gradient == "ste":
        ctx.save_for_backward()
    else:
        ctx.save_for_backward(x, clip)
    ctx.signed, ctx.dim, ctx.gradient = signed, dim, gradient


def gradient_of_x(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of x from what save_for_backward kept."""
    if ctx.gradient == "ste":
        return grad
    return torch.ops.octav.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.signed, ctx.dim, ctx.gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, clip, _, signed, dim, gradient = inputs
    save_for_backward(ctx, x, clip, signed, dim, gradient)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, clip, signed, dim, gradient = inputs
    save_for_backward(ctx, x, clip, signed, dim, gradient)


fake_quantize.register_autograd(
    lambda ctx, grad: (gradient_of_x(ctx, grad), None, None, None, None, None), setup_context=_save
)
# The gradient is linear in grad, with the same factors: that makes second derivatives right.
fake_quantize_backward.register_autograd(
    lambda ctx, grad: (gradient_of_x(ctx, grad), None, None, None, None, None), setup_context=_save_factors
)
