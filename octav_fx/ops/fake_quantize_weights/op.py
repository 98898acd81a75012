"""torch.ops.octav.fake_quantize_weights: all weights of a model at once, by channel; on a GPU in one launch.

It comes after differentiation: the gradient of each weight is a fake_quantize_backward of its own.
"""

import torch
from torch import Tensor

from octav_fx.ops.register import LAYOUT_AGNOSTIC, has_triton

_NAME = "octav::fake_quantize_weights"

torch.library.define(
    _NAME,
    "(Tensor[] weights, Tensor[] hints, str[] specs, str method) -> (Tensor[], Tensor)",
    tags=LAYOUT_AGNOSTIC,
)


def _empty(weights: list[Tensor], hints: list[Tensor], specs: list[str], method: str) -> tuple[list[Tensor], Tensor]:
    rows = sum(hint.numel() for hint in hints)
    clips = torch.empty(rows, dtype=torch.float32, device=weights[0].device if weights else None)
    return [torch.empty_like(w) for w in weights], clips


def one_by_one(
    weights: list[Tensor], hints: list[Tensor], specs: list[str], method: str
) -> tuple[list[Tensor], Tensor]:
    """See reference.py. Composed of the two ops, so that each device runs the kernels it has."""
    quantized, clips = _empty(weights, hints, specs, method)
    first = 0
    for w, hint, spec, out in zip(weights, hints, specs, quantized, strict=True):
        clip = clips[first : first + len(hint)]
        torch.ops.octav.optimal_clip.out(w, hint, spec, method, out=clip)
        torch.ops.octav.fake_quantize.out(w, clip, spec, "ste", out=out)
        first += len(clip)
    return quantized, clips


def _cuda(weights: list[Tensor], hints: list[Tensor], specs: list[str], method: str) -> tuple[list[Tensor], Tensor]:
    if has_triton():
        from octav_fx.ops.fake_quantize_weights import kernel

        quantized, clips = _empty(weights, hints, specs, method)
        with torch.cuda.device(clips.device):
            written = kernel.fake_quantize_weights(weights, hints, specs, method, out=quantized, clips=clips)
        if written:
            return quantized, clips
    return one_by_one(weights, hints, specs, method)


torch.library.register_fake(_NAME, _empty)
torch.library.impl(_NAME, "CompositeExplicitAutograd", one_by_one)
torch.library.impl(_NAME, "CUDA", _cuda)
fake_quantize_weights = torch.ops.octav.fake_quantize_weights
