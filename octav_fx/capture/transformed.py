"""Quantizers inside of transforms of torch.func, which take gradients by rules of functorch's own.

They write no hint, but for vmap alone: it is the mean of the clips of the samples, as of so many calls.

    vmap(grad(loss))    -> every example has the clips that it would have alone

The ops' own gradients are rules of torch.library, and functorch takes none of those.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from octav_fx.compat.tensors import mean_of_samples, transform, transforms, without_transforms
from octav_fx.nn import FakeQuantizer, as_autocast


@contextmanager
def transformed(quantizers: Iterable[FakeQuantizer]) -> Iterator[None]:
    """Let quantizers round inside by rules that functorch takes; nested in another such region, do nothing."""
    own = [quantizer for quantizer in quantizers if "forward" not in vars(quantizer)]
    for quantizer in own:
        quantizer.__dict__["forward"] = functools.partial(_forward, quantizer)
    try:
        yield
    finally:
        for quantizer in own:
            del quantizer.__dict__["forward"]


def _forward(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    settings, spec = quantizer.settings, str(quantizer.spec)
    if quantizer.running:
        x = as_autocast(x)
    clip = quantizer.clip
    if clip is None:
        clip = torch.ops.octav.optimal_clip(x.detach(), quantizer.hint, spec, settings.method)
        if not quantizer.by_row and transforms() == {"Vmap"}:
            mean = mean_of_samples(clip)
            with without_transforms(), torch.no_grad():
                quantizer.keep(mean)
    return _rounded(x, clip, spec, settings.gradient)


def _rounded(*args: Any) -> Tensor:
    return _Rounded.apply(*args) if transform() is not None else torch.ops.octav.fake_quantize(*args)


def _scaled(*args: Any) -> Tensor:
    return _Scaled.apply(*args) if transform() is not None else torch.ops.octav.fake_quantize_backward(*args)


class _Rounded(torch.autograd.Function):
    """x [...], clip, spec, gradient -> x on the grid of the clip [...]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        # Below the level that takes this gradient there may be another one; what is batched has no gradient there.
        return _rounded(*args) if transform() == "Grad" else torch.ops.octav.fake_quantize(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, clip, ctx.spec, ctx.gradient = inputs
        ctx.save_for_backward(x, clip)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.gradient == "ste":
            return gradient, None, None, None
        return _scaled(gradient, *ctx.saved_tensors, ctx.spec, ctx.gradient), None, None, None


class _Scaled(torch.autograd.Function):
    """gradient [...], x [...], clip, spec, gradient's kind -> the gradient of x [...]; linear in the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _scaled(*args) if transform() == "Grad" else torch.ops.octav.fake_quantize_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, clip, ctx.spec, ctx.gradient = inputs
        ctx.save_for_backward(x, clip)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _scaled(gradient, *ctx.saved_tensors, ctx.spec, ctx.gradient), None, None, None, None
