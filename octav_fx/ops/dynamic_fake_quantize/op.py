"""torch.ops.octav.dynamic_fake_quantize: find the clip and round to its grid; the one node of a live quantizer."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops.fake_quantize.op import gradient_of_x, save_for_backward
from octav_fx.ops.quantize_rows.op import is_one_pass
from octav_fx.ops.register import LAYOUT_AGNOSTIC

_NAME = "octav::dynamic_fake_quantize"

torch.library.define(
    _NAME,
    "(Tensor x, Tensor hint, str spec, str method, str gradient) -> (Tensor, Tensor)",
    tags=LAYOUT_AGNOSTIC,
)


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _(x: Tensor, hint: Tensor, spec: str, method: str, gradient: str) -> tuple[Tensor, Tensor]:
    """See reference.py. Composed of other ops, so that each device runs the kernels it has."""
    if is_one_pass(spec_of(spec), method):
        rounded: tuple[Tensor, Tensor] = torch.ops.octav.quantize_rows(x, spec, method, x.dtype)
        return rounded
    clip = torch.ops.octav.optimal_clip(x, hint, spec, method)
    return torch.ops.octav.fake_quantize(x, clip, spec, gradient), clip


@torch.library.register_fake(_NAME)
def _(x: Tensor, hint: Tensor, spec: str, method: str, gradient: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(spec_of(spec).clip_shape(x.shape), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, spec, _, gradient = inputs
    clip = output[1]
    ctx.mark_non_differentiable(clip)
    save_for_backward(ctx, x, clip, spec, gradient)


torch.library.register_autograd(
    _NAME, lambda ctx, grad, _: (gradient_of_x(ctx, grad), None, None, None, None), setup_context=_save
)

dynamic_fake_quantize = torch.ops.octav.dynamic_fake_quantize
