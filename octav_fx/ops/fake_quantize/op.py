"""torch.ops.octav.fake_quantize: round to the grid of a given clip, with a gradient of our own."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize import reference
from octav_fx.ops.levels import levels_of
from octav_fx.ops.register import register_op


def _empty(x: Tensor, clip: Tensor, spec: str, gradient: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _cpu(
    x: Tensor,
    clip: Tensor,
    spec: str,
    gradient: str,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor,
) -> bool:
    represented, library = spec_of(spec), cpu.library()
    form, clip = represented.fitted(clip)
    levels = levels_of(form)
    fits = out.shape == x.shape and out.dtype is (dtype or x.dtype)
    if library is None or levels is None or not fits or (types := cpu.types_of("fake_quantize", x, out)) is None:
        return False
    x_type, out_type = types

    def run(inputs: list[Tensor], clip: Tensor, out: Tensor, layout: tuple[int, int, int]) -> None:
        pointers = (inputs[0].data_ptr(), x_type, clip.data_ptr(), out.data_ptr(), out_type)
        library.octav_fake_quantize(*pointers, *layout, ctypes.byref(levels), torch.get_num_threads())

    return cpu.each_stretch(run, [x], clip, represented.granularity, out)


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.fake_quantize import kernel

    return kernel.fake_quantize(*args, out=out)


fake_quantize = register_op(
    "fake_quantize",
    "Tensor x, Tensor clip, str spec, str gradient, ScalarType? dtype=None",
    empty=_empty,
    reference=reference.fake_quantize,
    cpu=_cpu,
    cuda=_cuda,
)


def _empty_gradient(grad: Tensor, x: Tensor, clip: Tensor, spec: str, gradient: str) -> Tensor:
    return torch.empty_like(x)


def _cpu_gradient(grad: Tensor, x: Tensor, clip: Tensor, spec: str, gradient: str, out: Tensor) -> bool:
    represented, library = spec_of(spec), cpu.library()
    form, clip = represented.fitted(clip)
    fits = out.shape == x.shape == grad.shape and out.dtype is x.dtype and gradient != "ste"
    if library is None or not fits or (types := cpu.types_of("fake_quantize_backward", grad, x)) is None:
        return False
    grad_type, x_type = types
    kind = (form.signed, gradient == "mad")

    def run(inputs: list[Tensor], clip: Tensor, out: Tensor, layout: tuple[int, int, int]) -> None:
        grad, x = (given.data_ptr() for given in inputs)
        pointers = (grad, grad_type, x, x_type, clip.data_ptr(), out.data_ptr())
        library.octav_fake_quantize_backward(*pointers, *layout, *kind, torch.get_num_threads())

    return cpu.each_stretch(run, [grad, x], clip, represented.granularity, out)


def _cuda_gradient(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.fake_quantize import kernel

    return kernel.fake_quantize_backward(*args, out=out)


fake_quantize_backward = register_op(
    "fake_quantize_backward",
    "Tensor grad, Tensor x, Tensor clip, str spec, str gradient",
    empty=_empty_gradient,
    reference=reference.fake_quantize_backward,
    cpu=_cpu_gradient,
    cuda=_cuda_gradient,
)


def save_for_backward(ctx: Any, x: Tensor, clip: Tensor, spec: str, gradient: str) -> None:
    """Return what the gradient needs; the straight-through one needs nothing."""
    if gradient == "ste":
        ctx.save_for_backward()
    else:
        ctx.save_for_backward(x, clip)
    ctx.spec, ctx.gradient = spec, gradient


def gradient_of_x(ctx: Any, grad: Tensor) -> Tensor:
    """Return the gradient of x from what save_for_backward kept."""
    if ctx.gradient == "ste":
        return grad
    return torch.ops.octav.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.spec, ctx.gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, clip, spec, gradient, _ = inputs
    save_for_backward(ctx, x, clip, spec, gradient)
    ctx.dtype = x.dtype


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, clip, spec, gradient = inputs
    save_for_backward(ctx, x, clip, spec, gradient)
    ctx.dtype = grad.dtype


# The gradient is linear in grad, with the same factors: that makes second derivatives right.
for _name, _setup in (("fake_quantize", _save), ("fake_quantize_backward", _save_factors)):
    torch.library.register_autograd(
        f"octav::{_name}",
        lambda ctx, grad: (gradient_of_x(ctx, grad).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)),
        setup_context=_setup,
    )
