"""torch.ops.octav.fake_quantize_weights: all weights of a model at once, by channel; on a GPU in one launch.

It comes after differentiation: the gradient of each weight is a fake_quantize_backward of its own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from octav_fx.ops.register import LAYOUT_AGNOSTIC, has_triton

_NAME = "octav::fake_quantize_weights"

torch.library.define(
    _NAME,
    "(Tensor[] weights, Tensor[] hints, str[] specs, str method, ScalarType? dtype=None) -> (Tensor[], Tensor)",
    tags=LAYOUT_AGNOSTIC,
)


def _empty(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    rows = sum(len(hint) for hint in hints)
    clips = torch.empty(rows, dtype=torch.float32, device=weights[0].device if weights else None)
    return [torch.empty_like(w, dtype=dtype) for w in weights], clips


def one_by_one(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See reference.py. Composed of the two ops, so that each device runs the kernels it has."""
    quantized, clips = _empty(weights, hints, specs, method, dtype)
    _write(range(len(weights)), weights, hints, specs, method, quantized, clips)
    return quantized, clips


def _write(
    indices: Iterable[int],
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    quantized: list[Tensor],
    clips: Tensor,
) -> None:
    parts = clips.split([len(hint) for hint in hints])
    for i in indices:
        w, spec = weights[i], specs[i]
        torch.ops.octav.optimal_clip.out(w, hints[i], spec, method, out=parts[i])
        torch.ops.octav.fake_quantize.out(w, parts[i], spec, "ste", quantized[i].dtype, out=quantized[i])


def _cuda(
    weights: list[Tensor],
    hints: list[Tensor],
    specs: list[str],
    method: str,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    if not has_triton():
        return one_by_one(weights, hints, specs, method, dtype)
    from octav_fx.ops.fake_quantize_weights import kernel

    quantized, clips = _empty(weights, hints, specs, method, dtype)
    with torch.cuda.device(clips.device):
        left = kernel.fake_quantize_weights(weights, hints, specs, method, out=quantized, clips=clips)
    _write(left, weights, hints, specs, method, quantized, clips)
    return quantized, clips


torch.library.register_fake(_NAME, _empty)
torch.library.impl(_NAME, "CompositeExplicitAutograd", one_by_one)
torch.library.impl(_NAME, "CUDA", _cuda)
fake_quantize_weights = torch.ops.octav.fake_quantize_weights
