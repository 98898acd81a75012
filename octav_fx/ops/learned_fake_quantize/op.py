"""torch.ops.octav.learned_fake_quantize: round to the grid of a clip that is a parameter, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.clips.learned import clip_from_parameter
from octav_fx.formats.spec import spec_of
from octav_fx.ops.learned_fake_quantize import reference
from octav_fx.ops.register import register_op

_SETTINGS = "str spec, str method"


def _empty(x: Tensor, parameter: Tensor, spec: str, method: str, is_data: bool) -> Tensor:
    return torch.empty_like(x)


def _composed(
    x: Tensor,
    parameter: Tensor,
    spec: str,
    method: str,
    is_data: bool,
    out: Tensor,
) -> bool:
    """See reference.py. Composed of the op for a given clip, so that each device runs the kernel it has."""
    clip = clip_from_parameter(parameter, spec_of(spec).format, method)
    torch.ops.octav.fake_quantize(x, clip, spec, "pwl", out=out)
    return True


learned_fake_quantize = register_op(
    "learned_fake_quantize",
    f"Tensor x, Tensor parameter, {_SETTINGS}, bool is_data",
    empty=_empty,
    reference=reference.learned_fake_quantize,
    cpu=_composed,
    cuda=_composed,
)


def _empty_gradient(grad: Tensor, x: Tensor, parameter: Tensor, spec: str, method: str) -> Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


learned_fake_quantize_backward = register_op(
    "learned_fake_quantize_backward",
    f"Tensor grad, Tensor x, Tensor parameter, {_SETTINGS}",
    empty=_empty_gradient,
    reference=reference.learned_fake_quantize_backward,
)


def _empty_parameter_gradient(
    grad: Tensor,
    x: Tensor,
    parameter: Tensor,
    spec: str,
    method: str,
    is_data: bool,
) -> Tensor:
    return torch.empty_like(parameter)


learned_parameter_backward = register_op(
    "learned_parameter_backward",
    f"Tensor grad, Tensor x, Tensor parameter, {_SETTINGS}, bool is_data",
    empty=_empty_parameter_gradient,
    reference=reference.learned_parameter_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parameter, *settings, is_data = inputs
    ctx.save_for_backward(x, parameter)
    ctx.settings, ctx.is_data = settings, is_data


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, parameter = ctx.saved_tensors
    of_x = of_parameter = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.octav.learned_fake_quantize_backward(grad, x, parameter, *ctx.settings)
    if ctx.needs_input_grad[1]:
        of_parameter = torch.ops.octav.learned_parameter_backward(grad, x, parameter, *ctx.settings, ctx.is_data)
    return of_x, of_parameter, *[None] * 3


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, parameter, *ctx.settings = inputs
    ctx.save_for_backward(x, parameter)


def _of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.octav.learned_fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 4


def _of_parameter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, parameter = ctx.saved_tensors
    slopes = reference.learned_slopes(x.detach(), parameter.detach(), *ctx.settings)
    shared = spec_of(ctx.settings[0]).granularity
    return shared.along(grad, x) * slopes, *[None] * 5


# Both gradients are linear in grad, with the same factors: that makes second derivatives right.
torch.library.register_autograd("octav::learned_fake_quantize", _gradients, setup_context=_save)
torch.library.register_autograd("octav::learned_fake_quantize_backward", _of_backward, setup_context=_save_factors)
torch.library.register_autograd(
    "octav::learned_parameter_backward", _of_parameter_backward, setup_context=_save_factors
)
