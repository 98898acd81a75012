"""torch.ops.octav.fake_quantize: round to the grid of a given clip, with a gradient of our own."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, gradient: str) -> Tensor:
    return torch.empty_like(x)


def _cpu(x: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, gradient: str, out: Tensor) -> bool:
    layout = cpu.channel_layout(x, dim)
    library = cpu.library()
    floats = x.dtype is torch.float32 and out.dtype is torch.float32
    if library is None or layout is None or not floats or not cpu.same_layout(out, x):
        return False
    grid = Grid(bits, signed)
    clip = cpu.checked(clip, clip_shape(x, dim))
    library.octav_fake_quantize(
        x.data_ptr(), clip.data_ptr(), out.data_ptr(), *layout, grid.steps, grid.low, grid.high, torch.get_num_threads()
    )
    return True


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.fake_quantize import kernel

    return kernel.fake_quantize(*args, out=out)


fake_quantize = register_op(
    "fake_quantize",
    "Tensor x, Tensor clip, int bits, bool signed, int? dim, str gradient",
    empty=_empty,
    reference=reference.fake_quantize,
    cpu=_cpu,
    cuda=_cuda,
)


def _empty_gradient(grad: Tensor, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str) -> Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


def _cpu_gradient(
    grad: Tensor, x: Tensor, clip: Tensor, signed: bool, dim: int | None, gradient: str, out: Tensor
) -> bool:
    layout = cpu.channel_layout(x, dim)
    library = cpu.library()
    floats = all(tensor.dtype is torch.float32 for tensor in (grad, x, out))
    if library is None or layout is None or gradient == "ste" or not floats or not cpu.same_layout(out, x):
        return False
    if not cpu.same_layout(grad, x):
        # Autograd may hand over another layout than that of x; both are then walked in the order of x.
        grad = torch.empty_like(x).copy_(grad)
    clip = cpu.checked(clip, clip_shape(x, dim))
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
    return True


def _cuda_gradient(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.fake_quantize import kernel

    return kernel.fake_quantize_backward(*args, out=out)


fake_quantize_backward = register_op(
    "fake_quantize_backward",
    "Tensor grad, Tensor x, Tensor clip, bool signed, int? dim, str gradient",
    empty=_empty_gradient,
    reference=reference.fake_quantize_backward,
    cpu=_cpu_gradient,
    cuda=_cuda_gradient,
)


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


# The gradient is linear in grad, with the same factors: that makes second derivatives right.
for _name, _setup in (("fake_quantize", _save), ("fake_quantize_backward", _save_factors)):
    torch.library.register_autograd(
        f"octav::{_name}",
        lambda ctx, grad: (gradient_of_x(ctx, grad), None, None, None, None, None),
        setup_context=_setup,
    )
